// bn_dgrad, select: a gradient's recipe (device/gradient.h) as a tensor, rounded once. Reads dout and what the recipe has
// of z and mask, writes one tensor.
#include "device/gradient.h"
#include "launchers.h"

namespace resfuse::cuda {
namespace {

template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 2)
bn_dgrad_kernel(Gradient g, T* __restrict__ out, int64_t rows, int64_t each) {
  write_rows<T, kWhole>(g, Place(rows, each), out, [&](float (&v)[kVector], const auto& raw, const auto& vectors) {
    gradient_values(v, g, raw, vectors);
  });
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
