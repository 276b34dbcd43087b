// bn_act_backward: BatchNorm's backward of d = dy * act'(scale * z + shift), which is nowhere stored.
//   dbeta = sum(d)     dgamma = invstd * sum(d * (z - mean))
//   dz = scale * (d - mean_dy - (z - mean) * slope)     or, of constant statistics, scale * d
//
// The sums need every row before the first dz is known: one pass takes them in shares of the rows, bn_reduce's second
// kernel adds the shares in order, another makes d again. Each pass reads dy and z once, the second writes dz: five
// tensors in all, where a stored d would make six.
#include "device/activation.h"
#include "device/gradient.h"
#include "launchers.h"

namespace resfuse::cuda {
namespace {

// d of a row's eight channels. act_slope is leaky ReLU's; Gradient has a slope too.
template <class T>
DEVICE_FN void below_act(float (&d)[kVector], const GradientRaw<T>& raw, const GradientVectors& vectors, Act act,
                         float act_slope) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) d[i] = affine(to_float(raw.z.v[i]), vectors.scale[i], vectors.shift[i]);
  act_slopes(d, act, act_slope);
#pragma unroll
  for (int i = 0; i < kVector; ++i) d[i] = to_float(raw.dout.v[i]) * d[i];
}

template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 2)
act_sums_kernel(Gradient g, Act act, float act_slope, float* __restrict__ partial, int64_t rows, int64_t each) {
  store_sums<T, kWhole>(g, Place(rows, each), partial, [&](float (&d)[kVector], const auto& raw, const auto& vectors) {
    below_act(d, raw, vectors, act, act_slope);
  });
}

template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 2)
act_dgrad_kernel(Gradient g, Act act, float act_slope, T* __restrict__ dz, int64_t rows, int64_t each) {
  write_rows<T, kWhole>(g, Place(rows, each), dz, [&](float (&d)[kVector], const auto& raw, const auto& vectors) {
    below_act(d, raw, vectors, act, act_slope);
    norm_values(d, g, raw, vectors);
  });
}

}  // namespace

int bn_act_backward(DType dtype, Gradient g, int act, float act_slope, const float* invstd, float* partial,
                    const ReduceResults& results, bool batch, void* dz, int64_t rows, bool even, void* stream) {
  const int64_t each = rows_each(rows, g.channels), count = shares(rows, g.channels);
  const dim3 grid(unsigned(tiles(g.channels)), unsigned(count));
  const auto on = static_cast<cudaStream_t>(stream);
  const auto kind = static_cast<Act>(act);
  int error = with_storage(dtype, [&](auto stored) {
    using T = decltype(stored);
    const auto kernel = even ? act_sums_kernel<T, true> : act_sums_kernel<T, false>;
    return launch(kernel, grid, dim3(kThreads), 0, on, g, kind, act_slope, partial, rows, each);
  });
  if (error == cudaSuccess) error = add_shares(partial, invstd, nullptr, results, rows, int(count), g.channels, stream);
  if (error != cudaSuccess) return error;
  if (batch) g.mean_dy = results.mean_dy, g.slope = results.slope;
  return with_storage(dtype, [&](auto stored) {
    using T = decltype(stored);
    const auto kernel = even ? act_dgrad_kernel<T, true> : act_dgrad_kernel<T, false>;
    return launch(kernel, grid, dim3(kThreads), 0, on, g, kind, act_slope, static_cast<T*>(dz), rows, each);
  });
}

}  // namespace resfuse::cuda
