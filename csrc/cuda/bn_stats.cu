// bn_stats: mean and biased variance of each channel. Reads z once, M*C values, and writes two partial sums a share.
//
// A thread takes its rows one after the other (Welford), then the threads of a channel and the shares are merged in
// order (Chan): n = n_a + n_b, d = mean_b - mean_a, mean = mean_a + d n_b / n, M2 = M2_a + M2_b + d^2 n_a n_b / n.
#include "device/shares.h"
#include "launchers.h"

namespace resfuse::cuda {
namespace {

constexpr int kUnroll = 4;  // rows asked for at once

struct Moments {
  float count, mean, squares;

  DEVICE_MEMBER void merge(float other_count, float other_mean, float other_squares) {
    if (other_count == 0.0f) return;
    const float total = count + other_count, apart = other_mean - mean, share = other_count / total;
    mean += apart * share;
    squares += other_squares + apart * apart * count * share;
    count = total;
  }
};

template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 2)
moments_kernel(const T* __restrict__ z, float* __restrict__ partial, int64_t rows, int64_t each, int channels) {
  SHARED_ARRAY(float, means, kDown * kColumns);
  SHARED_ARRAY(float, squares, kDown * kColumns);
  const Place place(rows, each);
  const int left = channels - place.first;
  float mean[kVector] = {}, m2[kVector] = {}, count = 0.0f;
  if (left > 0) {
    for (int64_t row = place.begin + place.down; row < place.end; row += kUnroll * kDown) {
      Raw<T> raw[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (row + u * kDown < place.end) raw[u] = load_raw<kWhole>(z + (row + u * kDown) * channels + place.first, left);
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
    Moments all = {0.0f, 0.0f, 0.0f};
    for (int d = 0; d < kDown; ++d) {
      const int64_t own = place.end - place.begin - d;
      const float of_thread = own > 0 ? float((own + kDown - 1) / kDown) : 0.0f;
      all.merge(of_thread, means[d * kColumns + column], squares[d * kColumns + column]);
    }
    partial[(int64_t(blockIdx.y) * 2 + 0) * channels + channel] = all.mean;
    partial[(int64_t(blockIdx.y) * 2 + 1) * channels + channel] = all.squares;
  }
}

__global__ void __launch_bounds__(kThreads, 2)
merge_kernel(const float* __restrict__ partial, float* __restrict__ mean, float* __restrict__ var, int64_t rows,
             int64_t each, int channels) {
  SHARED_ARRAY(float, found, 3 * kThreads);
  const int tid = int(threadIdx.x), lane = tid / kMergeChannels;
  const int channel = int(blockIdx.x) * kMergeChannels + tid % kMergeChannels;
  Moments all = {0.0f, 0.0f, 0.0f};
  if (channel < channels) {
    for (int64_t share = lane; share * each < rows; share += kMergeLanes) {
      const int64_t left = rows - share * each;
      const float* const at = partial + share * 2 * channels + channel;
      all.merge(float(left < each ? left : each), at[0], at[channels]);
    }
  }
  found[tid] = all.count;
  found[kThreads + tid] = all.mean;
  found[2 * kThreads + tid] = all.squares;
  __syncthreads();
  if (lane != 0 || channel >= channels) return;
  for (int other = kMergeChannels; other < kThreads; other += kMergeChannels)
    all.merge(found[tid + other], found[kThreads + tid + other], found[2 * kThreads + tid + other]);
  mean[channel] = all.mean;
  var[channel] = all.squares / float(rows);
}

}  // namespace

int bn_stats(DType dtype, const void* z, float* partial, float* mean, float* var, int64_t rows, int channels, bool even,
             void* stream) {
  const int64_t each = rows_each(rows);
  const dim3 grid(unsigned(tiles(channels)), unsigned(shares(rows)));
  const auto on = static_cast<cudaStream_t>(stream);
  const int error = with_storage(dtype, [&](auto stored) {
    using T = decltype(stored);
    const auto kernel = even ? moments_kernel<T, true> : moments_kernel<T, false>;
    return launch(kernel, grid, dim3(kThreads), 0, on, static_cast<const T*>(z), partial, rows, each, channels);
  });
  if (error != cudaSuccess) return error;
  const dim3 few(unsigned((channels + kMergeChannels - 1) / kMergeChannels));
  return launch(merge_kernel, few, dim3(kThreads), 0, on, partial, mean, var, rows, each, channels);
}

}  // namespace resfuse::cuda
