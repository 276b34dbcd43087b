// bn_act_backward: BatchNorm's backward of d = dy * act'(scale * z + shift), which is nowhere stored.
//   dbeta = sum(d)     dgamma = invstd * sum(d * (z - mean))
//   dz = scale * (d - mean_dy - (z - mean) * slope)     or, of constant statistics, scale * d
//
// The sums need every row before the first dz is known: one pass takes them in shares of the rows, bn_reduce's second
// kernel adds the shares in order, another makes d again. Each pass reads dy and z once, the second writes dz: five
// tensors in all, where a stored d would make six.
#include "device/activation.h"
#include "device/gradient.h"
#include "device/shares.h"
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
  SHARED_ARRAY(float, scratch, kDown * kColumns);
  SHARED_ARRAY(float, result, 2 * kColumns);
  constexpr int kUnroll = kRows<T, kWhole, 2>;
  const Place place(rows, each);
  const GradientVectors vectors(g, place.first);
  float sums[2][kVector] = {};
  if (place.first < g.channels) {
    for (int first = place.begin + place.down; first < place.end; first += kUnroll * kDown) {
      GradientRaw<T> raw[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (first + u * kDown < place.end) raw[u] = load_gradient<T, kWhole>(g, first + u * kDown, place.first);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (first + u * kDown >= place.end) break;
        float d[kVector];
        below_act(d, raw[u], vectors, act, act_slope);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          sums[0][i] += d[i];
          sums[1][i] += d[i] * (to_float(raw[u].z.v[i]) - vectors.mean[i]);
        }
      }
    }
  }
  add_threads(result, scratch, sums);
  const int which = int(threadIdx.x) / kColumns, column = int(threadIdx.x) % kColumns;
  const int channel = int(blockIdx.x) * kColumns + column;
  if (which < 2 && channel < g.channels)
    partial[(int64_t(blockIdx.y) * 2 + which) * g.channels + channel] = result[which * kColumns + column];
}

template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 2)
act_dgrad_kernel(Gradient g, Act act, float act_slope, T* __restrict__ dz, int64_t rows, int64_t each) {
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
      float d[kVector];
      below_act(d, raw[u], vectors, act, act_slope);
      norm_values(d, g, raw[u], vectors);
      store_raw<kWhole>(dz + int64_t(row) * g.channels + place.first, to_raw(d, T{}), left);
    }
  }
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
