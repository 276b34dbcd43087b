// covariance: mean [C] and biased covariance [C, C] of the rows of an activation, of the rounded values that a product
// reads.
//
//   of each share: p = mean of its first rows (float32; 0 in 16 bits),  S = sum(a - p),  G = (a - p).T @ (a - p)
//                  mean_s = p + S / n,  M2_s = G - S S.T / n
//   of all:        mean = sum(n_s mean_s) / M,  cov = (sum(M2_s) + sum(n_s (mean_s - mean)(mean_s - mean).T)) / M
//
// Reads a, and in float32 the first 16 rows of each share again, once for each 64 columns: of the pairs of tiles those on
// and above the diagonal are computed. A second kernel takes the means, a third adds the shares in order.
#include "device/outer_product.h"
#include "device/shares.h"
#include "launchers.h"

namespace resfuse::cuda {
namespace {

using namespace outer;

constexpr int kCovarianceTile = 64;

template <class T>
using Of16 = Short<T, kCovarianceTile, kCovarianceTile, 4, 64, 4, true>;

// The pair-th of the pairs of tiles on and above the diagonal.
struct Pair {
  int up = 0, across = 0;

  DEVICE_MEMBER explicit Pair(int pair) {
    while (pair > across) pair -= ++across;
    up = pair;
  }
};

// sums, pivots [shares, C]: S and p; no pivots in 16 bits.
template <class Math, bool kWhole>
__global__ void __launch_bounds__(Math::kThreads, Math::kBlocks)
covariance_kernel(Activation a, bool tf32, float* __restrict__ sums, float* __restrict__ pivots,
                  float* __restrict__ squares, int64_t rows, int64_t each) {
  using T = typename Math::Storage;
  SHARED_DYNAMIC(unsigned char, smem);
  SHARED_ARRAY(float, vectors, 4 * Math::kLeft);
  SHARED_ARRAY(float, total, Math::kLeft);
  if (int(threadIdx.x) < Math::kLeft) total[int(threadIdx.x)] = 0.0f;
  const Pair pair(int(blockIdx.x));
  const int r0 = pair.up * Math::kLeft, c0 = pair.across * Math::kRight, channels = a.x.channels;
  const bool both = r0 != c0;
  const int64_t share = blockIdx.y;
  const Steps<Math> steps(share, each, rows);
  Chunks<Math, ActivationTile<T, Math::kLeft>, kWhole, Math::kLeft> left(a, r0, vectors);
  Chunks<Math, ActivationTile<T, Math::kRight>, kWhole, Math::kRight> right(a, c0, vectors + 2 * Math::kLeft);
  __syncthreads();  // the vectors and totals are whole
  left.tf32 = right.tf32 = tf32;
  if constexpr (Math::kCentred) {
    centre(left, smem, steps);
    if (both) centre(right, smem, steps);
  }
  typename Math::Sums found;
  add_rows(found, smem, left, right, steps, both, both ? nullptr : total);
#pragma unroll
  for (int n = 0; n < Math::Sums::kCount; ++n) {
    const int r = r0 + found.row(n), c = c0 + found.column(n);
    if (r < channels && c < channels) squares[(share * channels + r) * channels + c] = found.at(n);
  }
  if (both) return;
  Math::each_column(total, left, smem, [&](int column, float sum, float pivot) {
    if (r0 + column >= channels) return;
    sums[share * channels + r0 + column] = sum;
    if (pivots != nullptr) pivots[share * channels + r0 + column] = pivot;
  });
}

// What the shares found: of share s its rows, and of a channel p and S.
struct Shares {
  const float *sums, *pivots;
  int64_t count, rows, each;
  int channels;

  DEVICE_MEMBER float size(int64_t share) const {
    const int64_t left = rows - share * each;
    return float(left < each ? left : each);
  }
  DEVICE_MEMBER float sum(int64_t share, int c) const { return sums[share * channels + c]; }
  DEVICE_MEMBER float pivot(int64_t share, int c) const {
    return pivots != nullptr ? pivots[share * channels + c] : 0.0f;
  }
};

__global__ void __launch_bounds__(kMergeThreads)
mean_kernel(Shares shares, float* __restrict__ mean) {
  SHARED_ARRAY(float, scratch, kMergeThreads);
  const int lane = int(threadIdx.x) / kMergeChannels;
  const int c = int(blockIdx.x) * kMergeChannels + int(threadIdx.x) % kMergeChannels;
  float total[1] = {};
  if (c < shares.channels) {
#pragma unroll 4
    for (int64_t share = lane; share < shares.count; share += kMergeLanes)
      total[0] += shares.sum(share, c) + shares.pivot(share, c) * shares.size(share);
  }
  add_lanes(total, scratch);
  if (lane == 0 && c < shares.channels) mean[c] = total[0] / float(shares.rows);
}

constexpr int kElements = 32, kLanes = 16;

// Thread (lane, element): every kLanes-th share of an element, in order. Below the diagonal of tiles: its mirror image.
__global__ void __launch_bounds__(kElements * kLanes)
merge_kernel(Shares shares, const float* __restrict__ squares, const float* __restrict__ mean, float* __restrict__ cov,
             int tile) {
  SHARED_ARRAY(float, found, kElements * kLanes);
  const int tid = int(threadIdx.x), lane = tid / kElements, channels = shares.channels;
  const int64_t element = int64_t(blockIdx.x) * kElements + tid % kElements, size = int64_t(channels) * channels;
  int r = int(element / channels), c = int(element % channels);
  if (r / tile > c / tile) {
    const int other = r;
    r = c, c = other;
  }
  float total = 0.0f;
  if (element < size) {
    const float of_row = mean[r], of_column = mean[c];
#pragma unroll 4
    for (int64_t share = lane; share < shares.count; share += kLanes) {
      const float n = shares.size(share), sum = shares.sum(share, r), part = shares.sum(share, c) / n;
      const float x = shares.pivot(share, r) + sum / n - of_row, y = shares.pivot(share, c) + part - of_column;
      total += squares[(share * channels + r) * channels + c] - sum * part + x * y * n;
    }
  }
  found[tid] = total;
  __syncthreads();
  if (lane != 0 || element >= size) return;
  for (int other = kElements; other < kElements * kLanes; other += kElements) total += found[tid + other];
  cov[element] = total / float(shares.rows);
}

}  // namespace

int64_t covariance_shares(DType dtype, int64_t rows, int channels) {
  const int64_t tiles = (channels + kCovarianceTile - 1) / kCovarianceTile;
  return product_shares(dtype, rows, tiles * (tiles + 1) / 2);
}

int covariance(DType dtype, const Activation& a, bool tf32, float* sums, float* squares, float* mean, float* cov,
               int64_t rows, bool even, void* stream) {
  const int channels = a.x.channels, tiles = (channels + kCovarianceTile - 1) / kCovarianceTile;
  const int64_t count = covariance_shares(dtype, rows, channels), each = product_rows(rows, count);
  float* const pivots = dtype == DType::kFloat ? sums + count * channels : nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  const auto start = [&](auto math) {
    using Math = decltype(math);
    const auto kernel = even ? covariance_kernel<Math, true> : covariance_kernel<Math, false>;
    return launch(kernel, dim3(unsigned(tiles * (tiles + 1) / 2), unsigned(count)), dim3(Math::kThreads),
                  Math::kStages * kStageBytes<Math>, on, a, tf32, sums, pivots, squares, rows, each);
  };
  int error;
  if (dtype == DType::kFloat)
    error = start(Exact{});
  else
    error = dtype == DType::kBFloat16 ? start(Of16<__nv_bfloat16>{}) : start(Of16<__half>{});
  if (error != cudaSuccess) return error;
  const Shares shares = {sums, pivots, count, rows, each, channels};
  const dim3 few(unsigned((channels + kMergeChannels - 1) / kMergeChannels));
  error = launch(mean_kernel, few, dim3(kMergeThreads), 0, on, shares, mean);
  if (error != cudaSuccess) return error;
  const dim3 many(unsigned((int64_t(channels) * channels + kElements - 1) / kElements));
  return launch(merge_kernel, many, dim3(kElements * kLanes), 0, on, shares, squares, mean, cov, kCovarianceTile);
}

}  // namespace resfuse::cuda
