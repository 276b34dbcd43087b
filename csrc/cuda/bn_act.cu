// bn_act: y = act(scale * z + shift) of an activation other than ReLU, rounded once. Reads z once, writes y.
#include "device/activation.h"
#include "launchers.h"

namespace resfuse::cuda {
namespace {

template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 2)
bn_act_kernel(const T* __restrict__ z, const float* __restrict__ scales, const float* __restrict__ shifts, Act act,
              float slope, T* __restrict__ y, int64_t rows, int64_t each, int channels) {
  constexpr int kUnroll = kRows<T, kWhole>;
  const Place place(rows, each);
  const int left = channels - place.first;
  if (left <= 0) return;
  float scale[kVector], shift[kVector];
  load_vector(scale, scales, place.first, channels, 1.0f);
  load_vector(shift, shifts, place.first, channels, 0.0f);
  for (int first = place.begin + place.down; first < place.end; first += kUnroll * kDown) {
    Raw<T> raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t row = first + u * kDown;
      if (row < place.end) raw[u] = load_raw<kWhole>(z + row * channels + place.first, left);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t row = first + u * kDown;
      if (row >= place.end) break;
      float v[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] = affine(to_float(raw[u].v[i]), scale[i], shift[i]);
      act_values(v, act, slope);
      store_raw<kWhole>(y + row * channels + place.first, to_raw(v, T{}), left);
    }
  }
}

}  // namespace

int bn_act(DType dtype, const void* z, const float* scale, const float* shift, int act, float slope, void* y,
           int64_t rows, int channels, bool even, void* stream) {
  const dim3 grid(unsigned(tiles(channels)), unsigned(shares(rows, channels)));
  return with_storage(dtype, [&](auto stored) {
    using T = decltype(stored);
    const auto kernel = even ? bn_act_kernel<T, true> : bn_act_kernel<T, false>;
    return launch(kernel, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream), static_cast<const T*>(z), scale,
                  shift, static_cast<Act>(act), slope, static_cast<T*>(y), rows, rows_each(rows, channels), channels);
  });
}

}  // namespace resfuse::cuda
