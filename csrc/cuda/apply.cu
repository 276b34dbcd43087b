// apply: a block's last step on a main branch that is scale * z + shift,
//
//   out = act(factor * (gate * row_scale[n] * main + (1 - gate) * residual)),   mask = not (out <= 0)
//
// Reads z and the residual once (and the gate, if there is one), writes out and one bit for each of its values.
#include "device/sum.h"
#include "launchers.h"

namespace resfuse::cuda {
namespace {

// What there is beside the main branch: nothing; a residual of all channels; any of it. Each has the registers, and so
// the loads in flight, that it needs.
constexpr int kNothing = 0, kResidual = 1, kAnything = 2;

template <class T, int kBeside, bool kWhole>
__global__ void __launch_bounds__(kThreads, kBeside == kNothing ? 3 : 2) apply_kernel(Sum p, int64_t each) {
  constexpr bool kAny = kBeside == kAnything;
  constexpr int kUnroll = kRows<T, kWhole, kBeside + 1>;
  const Place place(p.rows, each);
  const int left = p.channels - place.first;
  if (left <= 0) return;
  const bool added = kBeside == kResidual || (kAny && p.residual.data != nullptr);
  float scale[kVector], shift[kVector], residual_scale[kVector], residual_shift[kVector];
  load_vector(scale, p.scale, place.first, p.channels, 1.0f);
  load_vector(shift, p.shift, place.first, p.channels, 0.0f);
  if (added) {
    load_vector(residual_scale, p.residual_scale, place.first, p.channels, 1.0f);
    load_vector(residual_shift, p.residual_shift, place.first, p.channels, 0.0f);
  }
  const float bound = lower_bound(p.relu);
  for (int first = place.begin + place.down; first < place.end; first += kUnroll * kDown) {
    Raw<T> main[kUnroll], residual[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int row = first + u * kDown;
      if (row >= place.end) break;
      main[u] = load_raw<kWhole>(row_of<T>(p.z, row) + place.first, left);
      if (added) residual[u] = load_residual<T, kWhole>(p, row, place.first);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int row = first + u * kDown;
      if (row >= place.end) break;
      float y[kVector], r[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) y[i] = affine(to_float(main[u].v[i]), scale[i], shift[i]);
      if (added) residual_values(r, p, residual[u], residual_scale, residual_shift);
      write_sum<T, kAny, kWhole>(p, row, place.first, y, added, r, bound);
    }
  }
}

}  // namespace

int apply(DType dtype, const Sum& sum, bool even, void* stream) {
  const dim3 grid(unsigned(tiles(sum.channels)), unsigned(shares(sum.rows, sum.channels)));
  const bool residual = sum.residual.data != nullptr;
  const bool any = !even || sum.row_scale != nullptr || sum.gate != nullptr || sum.factor != 1.0f ||
                   (residual && sum.residual.channels != sum.channels);
  return with_storage(dtype, [&](auto stored) {
    using T = decltype(stored);
    auto kernel = even ? apply_kernel<T, kAnything, true> : apply_kernel<T, kAnything, false>;
    if (!any) kernel = residual ? apply_kernel<T, kResidual, true> : apply_kernel<T, kNothing, true>;
    return launch(kernel, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream), sum,
                  rows_each(sum.rows, sum.channels));
  });
}

}  // namespace resfuse::cuda
