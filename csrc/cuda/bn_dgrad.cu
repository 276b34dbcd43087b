// bn_dgrad, select: a gradient's recipe (device/gradient.h) as a tensor, rounded once. Reads dout and what the recipe has
// of z and mask, writes one tensor.
#include "device/gradient.h"
#include "launchers.h"

namespace resfuse::cuda {
namespace {

template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 2)
bn_dgrad_kernel(Gradient g, T* __restrict__ out, int64_t rows, int64_t each) {
  constexpr int kUnroll = kRows<T, kWhole, 2>;
  const Place place(rows, each);
  const int left = g.channels - place.first;
  if (left <= 0) return;
  const GradientVectors vectors(g, place.first);
  for (int first = place.begin + place.down; first < place.end; first += kUnroll * kDown) {
    GradientRaw<T> raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (first + u * kDown < place.end) raw[u] = load_gradient<T, kWhole>(g, first + u * kDown, place.first);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int row = first + u * kDown;
      if (row >= place.end) break;
      float v[kVector];
      gradient_values(v, g, raw[u], vectors);
      store_raw<kWhole>(out + int64_t(row) * g.channels + place.first, to_raw(v, T{}), left);
    }
  }
}

}  // namespace

int bn_dgrad(DType dtype, const Gradient& g, void* out, int64_t rows, bool even, void* stream) {
  const dim3 grid(unsigned(tiles(g.channels)), unsigned(shares(rows, g.channels)));
  return with_storage(dtype, [&](auto stored) {
    using T = decltype(stored);
    const auto kernel = even ? bn_dgrad_kernel<T, true> : bn_dgrad_kernel<T, false>;
    return launch(kernel, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream), g, static_cast<T*>(out), rows,
                  rows_each(rows, g.channels));
  });
}

}  // namespace resfuse::cuda
