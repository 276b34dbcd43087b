// bn_stats: mean and biased variance of each channel. Reads z once, M*C values, and writes two partial sums a share.
//
// A thread takes its rows one after the other (Welford). Of the threads of a channel, and of the shares, first the mean
// is taken and then M2 = sum(M2_i + n_i (mean_i - mean)^2), in a fixed order.
#include "device/shares.h"
#include "launchers.h"

namespace resfuse::cuda {
namespace {

template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 3)
moments_kernel(const T* __restrict__ z, float* __restrict__ partial, int64_t rows, int64_t each, int channels) {
  SHARED_ARRAY(float, means, kDown * kColumns);
  SHARED_ARRAY(float, squares, kDown * kColumns);
  constexpr int kUnroll = kRows<T, kWhole>;
  const Place place(rows, each);
  const int left = channels - place.first;
  const T* const from = z + place.first;
  float mean[kVector] = {}, m2[kVector] = {}, count = 0.0f;
  if (left > 0) {
    for (int row = place.begin + place.down; row < place.end; row += kUnroll * kDown) {
      Raw<T> raw[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (row + u * kDown < place.end) raw[u] = load_raw<kWhole>(from + int64_t(row + u * kDown) * channels, left);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (row + u * kDown >= place.end) break;
        count += 1.0f;
        const float share = 1.0f / count;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const float v = to_float(raw[u].v[i]), apart = v - mean[i];
          mean[i] += apart * share;
          m2[i] += apart * (v - mean[i]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    means[place.down * kColumns + place.across * kVector + i] = mean[i];
    squares[place.down * kColumns + place.across * kVector + i] = m2[i];
  }
  __syncthreads();
  const int column = int(threadIdx.x), channel = int(blockIdx.x) * kColumns + column;
  if (column < kColumns && channel < channels) {
    const int own = place.end - place.begin;
    const auto of_thread = [&](int d) { return own > d ? float((own - d + kDown - 1) / kDown) : 0.0f; };
    float total = 0.0f, all = 0.0f;
#pragma unroll 8
    for (int d = 0; d < kDown; ++d) total += of_thread(d) * means[d * kColumns + column];
    const float centre = total / float(own);
#pragma unroll 8
    for (int d = 0; d < kDown; ++d) {
      const float apart = means[d * kColumns + column] - centre;
      all += squares[d * kColumns + column] + of_thread(d) * (apart * apart);
    }
    partial[(int64_t(blockIdx.y) * 2 + 0) * channels + channel] = centre;
    partial[(int64_t(blockIdx.y) * 2 + 1) * channels + channel] = all;
  }
}

__global__ void __launch_bounds__(kMergeThreads)
merge_kernel(const float* __restrict__ partial, float* __restrict__ mean, float* __restrict__ var, int rows, int each,
             int shares, int channels) {
  SHARED_ARRAY(float, scratch, kMergeThreads);
  const int lane = int(threadIdx.x) / kMergeChannels;
  const int channel = int(blockIdx.x) * kMergeChannels + int(threadIdx.x) % kMergeChannels;
  const auto size = [&](int share) { return float(rows - share * each < each ? rows - share * each : each); };
  float total[1] = {}, all[1] = {};
  if (channel < channels) {
#pragma unroll 8
    for (int share = lane; share < shares; share += kMergeLanes)
      total[0] += size(share) * partial[int64_t(share) * 2 * channels + channel];
  }
  add_lanes(total, scratch);
  const float centre = total[0] / float(rows);
  if (channel < channels) {
#pragma unroll 8
    for (int share = lane; share < shares; share += kMergeLanes) {
      const float* const at = partial + int64_t(share) * 2 * channels + channel;
      const float apart = at[0] - centre;
      all[0] += at[channels] + size(share) * (apart * apart);
    }
  }
  add_lanes(all, scratch);
  if (lane != 0 || channel >= channels) return;
  mean[channel] = centre;
  var[channel] = all[0] / float(rows);
}

}  // namespace

int bn_stats(DType dtype, const void* z, float* partial, float* mean, float* var, int64_t rows, int channels, bool even,
             void* stream) {
  const int64_t each = rows_each(rows, channels), count = shares(rows, channels);
  const dim3 grid(unsigned(tiles(channels)), unsigned(count));
  const auto on = static_cast<cudaStream_t>(stream);
  const int error = with_storage(dtype, [&](auto stored) {
    using T = decltype(stored);
    const auto kernel = even ? moments_kernel<T, true> : moments_kernel<T, false>;
    return launch(kernel, grid, dim3(kThreads), 0, on, static_cast<const T*>(z), partial, rows, each, channels);
  });
  if (error != cudaSuccess) return error;
  return merge_moments(partial, mean, var, int(rows), int(each), int(count), channels, stream);
}

int merge_moments(const float* partial, float* mean, float* var, int rows, int each, int shares, int channels,
                  void* stream) {
  const dim3 few(unsigned((channels + kMergeChannels - 1) / kMergeChannels));
  return launch(merge_kernel, few, dim3(kMergeThreads), 0, static_cast<cudaStream_t>(stream), partial, mean, var, rows,
                each, shares, channels);
}

}  // namespace resfuse::cuda
