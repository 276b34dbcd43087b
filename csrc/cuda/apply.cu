// apply: a block's last step on a main branch that is scale * z + shift,
//
//   out = act(factor * (gate * row_scale[n] * main + (1 - gate) * residual)),   mask = not (out <= 0)
//
// Reads z and the residual once (and the gate, if there is one), writes out and one bit for each of its values.
#include "device/rows.h"
#include "launchers.h"

namespace resfuse::cuda {
namespace {

template <class T, bool kWhole>
DEVICE_FN Raw<T> load_residual(const Sum& p, int row, int first) {
  const Rows& r = p.residual;
  const T* const at = row_of<T>(r, row);
  if (r.channels == p.channels) return load_raw<kWhole>(at + first, p.channels - first);
  Raw<T> raw;  // between channels of zeros
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const int own = first + i - p.before;
    raw.v[i] = own >= 0 && own < r.channels ? at[own] : Stored<T>::from(0.0f);
  }
  return raw;
}

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
  const float bound = lower_bound(p.relu), residual_bound = lower_bound(p.residual_relu);
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
      float y[kVector], open[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) y[i] = affine(to_float(main[u].v[i]), scale[i], shift[i]);
      if (kAny && p.row_scale != nullptr) {
        const float weight = p.row_scale[sample_of(row, p.pixels)];
#pragma unroll
        for (int i = 0; i < kVector; ++i) y[i] = y[i] * weight;
      }
      if (kAny && p.gate != nullptr) {
        const T* const at = static_cast<const T*>(p.gate) + int64_t(row) * p.channels + place.first;
        const Raw<T> gate = load_raw<kWhole>(at, left);
#pragma unroll
        for (int i = 0; i < kVector; ++i) open[i] = to_float(gate.v[i]), y[i] = y[i] * open[i];
      }
      if (added) {
        float r[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) r[i] = to_float(residual[u].v[i]);
        if (p.residual_scale != nullptr) {
#pragma unroll
          for (int i = 0; i < kVector; ++i)
            r[i] = at_least(affine(r[i], residual_scale[i], residual_shift[i]), residual_bound);
        }
        if (kAny && p.gate != nullptr) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) r[i] = r[i] * (1.0f - open[i]);
        }
#pragma unroll
        for (int i = 0; i < kVector; ++i) y[i] = y[i] + r[i];
      }
      if (kAny && p.factor != 1.0f) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) y[i] = y[i] * p.factor;
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) y[i] = at_least(y[i], bound);
      const Raw<T> out = to_raw(y, T{});
      store_raw<kWhole>(static_cast<T*>(p.out) + int64_t(row) * p.channels + place.first, out, left);
      if (p.mask == nullptr) continue;
      uint32_t bits = 0;
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        bits |= uint32_t((kWhole || i < left) && passes_gradient(to_float(out.v[i]))) << i;
      p.mask[int64_t(row) * ((p.channels + 7) / 8) + place.first / 8] = uint8_t(bits);
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
