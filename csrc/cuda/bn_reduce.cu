// bn_reduce: the two sums of BatchNorm's backward, sum(dy) and sum(dy * (z - mean)), and what its input gradient needs of
// them. Reads dy's recipe and z once, M*C values each; a second kernel adds the shares in order.
#include "device/gradient.h"
#include "launchers.h"

namespace resfuse::cuda {
namespace {

template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 2)
reduce_kernel(Gradient g, float* __restrict__ partial, int64_t rows, int64_t each) {
  store_sums<T, kWhole>(g, Place(rows, each), partial, [&](float (&dy)[kVector], const auto& raw, const auto& vectors) {
    masked_values(dy, g, raw, vectors);
  });
}

__global__ void __launch_bounds__(kMergeThreads)
results_kernel(const float* __restrict__ partial, const float* __restrict__ invstd, const float* __restrict__ gamma,
               ReduceResults results, int64_t rows, int shares, int channels) {
  SHARED_ARRAY(float, scratch, 2 * kMergeThreads);
  const int lane = int(threadIdx.x) / kMergeChannels;
  const int c = int(blockIdx.x) * kMergeChannels + int(threadIdx.x) % kMergeChannels;
  float sums[2] = {};
  if (c < channels) {
#pragma unroll 8
    for (int share = lane; share < shares; share += kMergeLanes) {
      const float* const at = partial + int64_t(share) * 2 * channels + c;
      sums[0] += at[0];
      sums[1] += at[channels];
    }
  }
  add_lanes(sums, scratch);
  if (lane != 0 || c >= channels) return;
  const float dy = sums[0], along = sums[1];
  const float inverse = invstd[c], count = float(rows);
  results.dbeta[c] = dy;
  results.dgamma[c] = along * inverse;
  results.mean_dy[c] = dy / count;
  results.slope[c] = along * inverse * inverse / count;
  if (results.bn_scale != nullptr) results.bn_scale[c] = gamma != nullptr ? gamma[c] * inverse : inverse;
}

}  // namespace

int add_shares(const float* partial, const float* invstd, const float* gamma, const ReduceResults& results,
               int64_t rows, int shares, int channels, void* stream) {
  const dim3 grid(unsigned((channels + kMergeChannels - 1) / kMergeChannels));
  return launch(results_kernel, grid, dim3(kMergeThreads), 0, static_cast<cudaStream_t>(stream), partial, invstd, gamma,
                results, rows, shares, channels);
}

int bn_reduce(DType dtype, const Gradient& g, const float* invstd, const float* gamma, float* partial,
              const ReduceResults& results, int64_t rows, bool even, void* stream) {
  const int64_t count = shares(rows, g.channels);
  const dim3 grid(unsigned(tiles(g.channels)), unsigned(count));
  const int error = with_storage(dtype, [&](auto stored) {
    using T = decltype(stored);
    const auto kernel = even ? reduce_kernel<T, true> : reduce_kernel<T, false>;
    return launch(kernel, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream), g, partial, rows,
                  rows_each(rows, g.channels));
  });
  if (error != cudaSuccess) return error;
  return add_shares(partial, invstd, gamma, results, rows, int(count), g.channels, stream);
}

}  // namespace resfuse::cuda
