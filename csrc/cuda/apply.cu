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
DEVICE_FN Raw<T> load_residual(const Sum& p, int64_t row, int first) {
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

template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 2) apply_kernel(Sum p, int64_t each) {
  constexpr int kUnroll = kRows<kWhole>;
  const Place place(p.rows, each);
  const int left = p.channels - place.first;
  if (left <= 0) return;
  float scale[kVector], shift[kVector], residual_scale[kVector], residual_shift[kVector];
  load_vector(scale, p.scale, place.first, p.channels, 1.0f);
  load_vector(shift, p.shift, place.first, p.channels, 0.0f);
  load_vector(residual_scale, p.residual_scale, place.first, p.channels, 1.0f);
  load_vector(residual_shift, p.residual_shift, place.first, p.channels, 0.0f);
  const float bound = lower_bound(p.relu), residual_bound = lower_bound(p.residual_relu);
  for (int64_t first = place.begin + place.down; first < place.end; first += kUnroll * kDown) {
    Raw<T> main[kUnroll], residual[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t row = first + u * kDown;
      if (row >= place.end) break;
      main[u] = load_raw<kWhole>(row_of<T>(p.z, row) + place.first, left);
      if (p.residual.data != nullptr) residual[u] = load_residual<T, kWhole>(p, row, place.first);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t row = first + u * kDown;
      if (row >= place.end) break;
      const float weight = p.row_scale != nullptr ? p.row_scale[row / p.pixels] : 1.0f;
      Raw<T> gate, out;
      if (p.gate != nullptr) gate = load_raw<kWhole>(static_cast<const T*>(p.gate) + row * p.channels + place.first, left);
      uint32_t bits = 0;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        float y = affine(to_float(main[u].v[i]), scale[i], shift[i]);
        if (p.row_scale != nullptr) y = y * weight;
        const float open = p.gate != nullptr ? to_float(gate.v[i]) : 1.0f;
        if (p.gate != nullptr) y = y * open;
        if (p.residual.data != nullptr) {
          float r = to_float(residual[u].v[i]);
          if (p.residual_scale != nullptr)
            r = clamp_below(affine(r, residual_scale[i], residual_shift[i]), residual_bound);
          if (p.gate != nullptr) r = r * (1.0f - open);
          y = y + r;
        }
        if (p.factor != 1.0f) y = y * p.factor;
        out.v[i] = Stored<T>::from(clamp_below(y, bound));
        bits |= uint32_t(i < left && passes_gradient(to_float(out.v[i]))) << i;
      }
      store_raw<kWhole>(static_cast<T*>(p.out) + row * p.channels + place.first, out, left);
      if (p.mask != nullptr) p.mask[row * ((p.channels + 7) / 8) + place.first / 8] = uint8_t(bits);
    }
  }
}

}  // namespace

int apply(DType dtype, const Sum& sum, bool even, void* stream) {
  const dim3 grid(unsigned(tiles(sum.channels)), unsigned(shares(sum.rows)));
  return with_storage(dtype, [&](auto stored) {
    using T = decltype(stored);
    const auto kernel = even ? apply_kernel<T, true> : apply_kernel<T, false>;
    return launch(kernel, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream), sum, rows_each(sum.rows));
  });
}

}  // namespace resfuse::cuda
