// covariance: mean [C] and biased covariance [C, C] of the rows of an activation, of the rounded values that a product
// reads.
//
//   of each share: p = mean of its first rows (float32; 0 in 16 bits),  S = sum(a - p),  G = (a - p).T @ (a - p)
//                  mean_s = p + S / n,  M2_s = G - S S.T / n
//   of all:        mean = sum(n_s mean_s) / M,  cov = (sum(M2_s) + sum(n_s (mean_s - mean)(mean_s - mean).T)) / M
//
// Reads a, and in float32 the first 16 rows of each share again, once for each 64 columns: of the pairs of tiles those on
// and above the diagonal are computed.
#include "device/outer_product.h"
#include "launchers.h"

namespace resfuse::cuda {
namespace {

using namespace outer;

template <class Math, bool kWhole>
__global__ void __launch_bounds__(kBlock, 3)
covariance_kernel(Activation a, bool tf32, float* __restrict__ means, float* __restrict__ squares, int64_t rows,
                  int64_t each) {
  using T = typename Math::Storage;
  SHARED_DYNAMIC(unsigned char, smem);
  SHARED_ARRAY(float, of_rows, kTile);
  SHARED_ARRAY(float, of_columns, kTile);
  if (blockIdx.x > blockIdx.y) return;
  const int r0 = int(blockIdx.x) * kTile, c0 = int(blockIdx.y) * kTile, channels = a.x.channels;
  const int64_t share = blockIdx.z, begin = share * each, end = begin + each < rows ? begin + each : rows;
  const int chunk = int(threadIdx.x) % kChunks * kVector;
  const ActivationTile<T> up(a, r0 + chunk), across(a, c0 + chunk);
  Chunks<Math, ActivationTile<T>, kWhole> left(up, r0), right(across, c0);
  left.tf32 = right.tf32 = tf32;
  const bool both = blockIdx.x != blockIdx.y;
  if constexpr (Math::kCentred) {
    centre<Math>(left, of_rows, smem, begin, end);
    if (both) centre<Math>(right, of_columns, smem, begin, end);
  }
  typename Math::Sums sums;
  add_rows<Math>(sums, smem, left, right, begin, end, both);
  add_columns(of_rows, reinterpret_cast<float*>(smem), left);
  if (both) add_columns(of_columns, reinterpret_cast<float*>(smem), right);
  const float* const across_sums = both ? of_columns : of_rows;
  const float count = float(end - begin);
#pragma unroll
  for (int n = 0; n < 32; ++n) {
    const int r = sums.row(n), c = sums.column(n);
    if (r0 + r < channels && c0 + c < channels)
      squares[(share * channels + r0 + r) * channels + c0 + c] = sums.at(n) - of_rows[r] * (across_sums[c] / count);
  }
  if (both || left.row != 0) return;
#pragma unroll
  for (int j = 0; j < kVector; ++j)
    if (left.first + j < channels)
      means[share * channels + left.first + j] = left.pivot[j] + of_rows[chunk + j] / count;
}

constexpr int kElements = 32, kLanes = 8;

__global__ void mean_kernel(const float* __restrict__ means, float* __restrict__ mean, int64_t shares, int64_t rows,
                            int64_t each, int channels) {
  const int c = int(blockIdx.x) * kElements + int(threadIdx.x);
  if (c >= channels) return;
  float total = 0.0f;
  for (int64_t share = 0; share < shares; ++share) {
    const int64_t left = rows - share * each;
    total += means[share * channels + c] * float(left < each ? left : each);
  }
  mean[c] = total / float(rows);
}

// Thread (lane, element): every kLanes-th share of an element, in order. Below the diagonal of tiles: its mirror image.
__global__ void __launch_bounds__(kElements * kLanes)
merge_kernel(const float* __restrict__ means, const float* __restrict__ squares, const float* __restrict__ mean,
             float* __restrict__ cov, int64_t shares, int64_t rows, int64_t each, int channels) {
  SHARED_ARRAY(float, found, kElements * kLanes);
  const int tid = int(threadIdx.x), lane = tid / kElements;
  const int64_t element = int64_t(blockIdx.x) * kElements + tid % kElements, size = int64_t(channels) * channels;
  int r = int(element / channels), c = int(element % channels);
  if (r / kTile > c / kTile) {
    const int other = r;
    r = c, c = other;
  }
  float total = 0.0f;
  if (element < size) {
    for (int64_t share = lane; share < shares; share += kLanes) {
      const int64_t left = rows - share * each;
      const float x = means[share * channels + r] - mean[r], y = means[share * channels + c] - mean[c];
      total += squares[(share * channels + r) * channels + c] + x * y * float(left < each ? left : each);
    }
  }
  found[tid] = total;
  __syncthreads();
  if (lane != 0 || element >= size) return;
  for (int other = kElements; other < kElements * kLanes; other += kElements) total += found[tid + other];
  cov[element] = total / float(rows);
}

}  // namespace

int covariance(DType dtype, const Activation& a, bool tf32, float* means, float* squares, float* mean, float* cov,
               int64_t rows, bool even, void* stream) {
  const int channels = a.x.channels;
  const int64_t shares = product_shares(rows, channels, channels), each = product_rows(rows, shares);
  const unsigned tiles = unsigned((channels + kTile - 1) / kTile);
  const auto on = static_cast<cudaStream_t>(stream);
  const auto start = [&](auto math) {
    using Math = decltype(math);
    const auto kernel = even ? covariance_kernel<Math, true> : covariance_kernel<Math, false>;
    return launch(kernel, dim3(tiles, tiles, unsigned(shares)), dim3(kBlock), kSharedBytes, on, a, tf32, means, squares,
                  rows, each);
  };
  int error = dtype == DType::kFloat ? start(Exact{}) : with_short(dtype, start);
  if (error != cudaSuccess) return error;
  const dim3 few(unsigned((channels + kElements - 1) / kElements));
  error = launch(mean_kernel, few, dim3(kElements), 0, on, means, mean, shares, rows, each, channels);
  if (error != cudaSuccess) return error;
  const dim3 many(unsigned((int64_t(channels) * channels + kElements - 1) / kElements));
  return launch(merge_kernel, many, dim3(kElements * kLanes), 0, on, means, squares, mean, cov, shares, rows, each,
                channels);
}

}  // namespace resfuse::cuda
