// bn_reduce: the two sums of BatchNorm's backward, sum(dy) and sum(dy * (z - mean)), and what its input gradient needs of
// them. Reads dy's recipe and z once, M*C values each; a second kernel adds the shares in order.
#include "device/gradient.h"
#include "device/shares.h"
#include "launchers.h"

namespace resfuse::cuda {
namespace {

template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 2)
reduce_kernel(Gradient g, const float* __restrict__ mean, float* __restrict__ partial, int64_t rows, int64_t each) {
  SHARED_ARRAY(float, scratch, kDown * kColumns);
  SHARED_ARRAY(float, result, 2 * kColumns);
  constexpr int kUnroll = kRows<T, kWhole, 2>;
  const Place place(rows, each);
  const GradientVectors vectors(g, place.first);
  float centre[kVector], sums[2][kVector] = {};
  load_vector(centre, mean, place.first, g.channels, 0.0f);
  if (place.first < g.channels) {
    for (int first = place.begin + place.down; first < place.end; first += kUnroll * kDown) {
      GradientRaw<T> raw[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (first + u * kDown < place.end) raw[u] = load_gradient<T, kWhole>(g, first + u * kDown, place.first);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (first + u * kDown >= place.end) break;
        float dy[kVector];
        masked_values(dy, g, raw[u], vectors);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          sums[0][i] += dy[i];
          sums[1][i] += dy[i] * (to_float(raw[u].z.v[i]) - centre[i]);
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

int bn_reduce(DType dtype, const Gradient& g, const float* mean, const float* invstd, const float* gamma, float* partial,
              const ReduceResults& results, int64_t rows, bool even, void* stream) {
  const int64_t count = shares(rows, g.channels);
  const dim3 grid(unsigned(tiles(g.channels)), unsigned(count));
  const int error = with_storage(dtype, [&](auto stored) {
    using T = decltype(stored);
    const auto kernel = even ? reduce_kernel<T, true> : reduce_kernel<T, false>;
    return launch(kernel, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream), g, mean, partial, rows,
                  rows_each(rows, g.channels));
  });
  if (error != cudaSuccess) return error;
  return add_shares(partial, invstd, gamma, results, rows, int(count), g.channels, stream);
}

}  // namespace resfuse::cuda
