// expand_products: P = g.T @ (a - mean) [K, C], sum(g) [K] and, if wanted, u = g @ Wg [M, C] in storage dtype, for
// gradients g [M, K] below a mask and activations a [M, C]. Each share of the rows gives its own products; a second
// kernel adds them in order and, in 16 bits, takes sum(g) mean.T off; float32 takes the mean off a before the product.
//
// In 16 bits a tile has 128 of g's columns and 128 of a's (64 where a has no more, or an access has not 16 bytes), in
// float32 64 and 64: g is read once for each tile along a, and a once for each along g. Writes shares * K * C float32.
// With u: reads g, a and, for each share, Wg once, and writes u.
#include "device/outer_product.h"
#include "launchers.h"

namespace resfuse::cuda {
namespace {

using namespace outer;

template <class T>
using Narrow = Short<T, 128, 64, 4, 64, 3, false>;
template <class T>
using Square = Short<T, 128, 128, 4, 64, 3, false>;

template <class Math, bool kWhole>
__global__ void __launch_bounds__(Math::kThreads, Math::kBlocks)
products_kernel(Gradient g, Activation a, const float* __restrict__ mean, float* __restrict__ products,
                float* __restrict__ sums, int64_t rows, int64_t each) {
  using T = typename Math::Storage;
  SHARED_DYNAMIC(unsigned char, smem);
  SHARED_ARRAY(float, vectors, 2 * Math::kRight);
  SHARED_ARRAY(float, total, Math::kLeft);
  if (int(threadIdx.x) < Math::kLeft) total[int(threadIdx.x)] = 0.0f;
  const int k0 = int(blockIdx.x) * Math::kLeft, c0 = int(blockIdx.y) * Math::kRight;
  const int64_t share = blockIdx.z;
  const Steps<Math> steps(share, each, rows);
  Chunks<Math, GradientTile<T>, kWhole, Math::kLeft> left(g, k0, nullptr);
  Chunks<Math, ActivationTile<T, Math::kRight>, kWhole, Math::kRight> right(a, c0, vectors);
  __syncthreads();  // the vectors and totals are whole
  if constexpr (Math::kCentred) load_vector(right.pivot, mean, right.tile.first, a.x.channels, 0.0f);
  typename Math::Sums found;
  add_rows(found, smem, left, right, steps, true, blockIdx.y == 0 ? total : nullptr);
#pragma unroll
  for (int n = 0; n < Math::Sums::kCount; ++n) {
    const int k = k0 + found.row(n), c = c0 + found.column(n);
    if (k < g.channels && c < a.x.channels) products[(share * g.channels + k) * a.x.channels + c] = found.at(n);
  }
  if (blockIdx.y != 0) return;
  Math::each_column(total, left, smem, [&](int column, float sum, float) {
    if (k0 + column < g.channels) sums[share * g.channels + k0 + column] = sum;
  });
}

// With u: a block has all of g's columns, at most 256, and all of a's, at most 64. Its eight warps have 32 rows of P
// each, and of a step's 32 x 64 values of u 16 x 16 each. Wg lies in shared memory throughout.
template <class T>
using WithU = Short<T, 256, 64, 8, 32, 3, false>;
constexpr int kMostOuter = 256, kMostInner = 64, kWgBytes = kMostOuter * kMostInner * 2;

template <class T>
__global__ void __launch_bounds__(WithU<T>::kThreads, WithU<T>::kBlocks)
products_u_kernel(Gradient g, Activation a, const T* __restrict__ wg, float* __restrict__ products,
                  float* __restrict__ sums, T* __restrict__ u, int64_t rows, int64_t each) {
  using Math = WithU<T>;
  SHARED_DYNAMIC(unsigned char, smem);
  SHARED_ARRAY(float, vectors, 2 * Math::kRight);
  SHARED_ARRAY(float, total, Math::kLeft);
  if (int(threadIdx.x) < Math::kLeft) total[int(threadIdx.x)] = 0.0f;
  const int64_t share = blockIdx.x;
  const Steps<Math> steps(share, each, rows);
  const int K = g.channels, C = a.x.channels, tid = int(threadIdx.x), warp = tid >> 5;
  Chunks<Math, GradientTile<T>, true, Math::kLeft> left(g, 0, nullptr);
  Chunks<Math, ActivationTile<T, Math::kRight>, true, Math::kRight> right(a, 0, vectors);
  __syncthreads();  // the vectors and totals are whole
  unsigned char *const weights = smem, *const stages = smem + kWgBytes;
  for (int i = tid; i < kMostOuter * kMostInner / kVector; i += Math::kThreads) {
    const int k = i / (kMostInner / kVector), c = i % (kMostInner / kVector);
    const bool valid = k < K && c * kVector < C;
    cp_async_16(smem_address(weights + Math::offset(k, c)), wg + (valid ? int64_t(k) * C + c * kVector : 0), valid);
  }
  typename Math::Sums found;
  add_rows(found, stages, left, right, steps, true, total, [&](const unsigned char* stage, int step) {
    const int row = (warp & 1) * 16, column = (warp >> 1) * 16;
    const uint32_t of_rows = smem_address(stage) + Math::offset(row + (lane() & 15), lane() >> 4);
    const uint32_t of_wg = smem_address(weights) + Math::offset(lane() & 15, column / 8 + (lane() >> 4));
    float of_u[2][4] = {};
#pragma unroll 4
    for (int k = 0; k < kMostOuter / 16; ++k) {
      uint32_t x[4], y[4];
      ldmatrix_x4(x, (of_rows ^ k % 4 * 32) + k / 4 * Math::offset(0, 8));
      ldmatrix_x4_trans(y, of_wg + k * 2048);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t of_column[2] = {y[j * 2], y[j * 2 + 1]};
        multiply(of_u[j], x, of_column, T{});
      }
    }
    T* const to = u + int64_t(steps.at(step)) * C;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = row + (lane() >> 2) + h * 8, c = column + j * 8 + (lane() & 3) * 2;
        if (r < steps.inside(step) && c < C) store_pair(to + r * C + c, of_u[j][h * 2], of_u[j][h * 2 + 1]);
      }
  });
#pragma unroll
  for (int n = 0; n < Math::Sums::kCount; ++n) {
    const int k = found.row(n), c = found.column(n);
    if (k < K && c < C) products[(share * K + k) * C + c] = found.at(n);
  }
  Math::each_column(total, left, stages, [&](int column, float sum, float) {
    if (column < K) sums[share * K + column] = sum;
  });
}

constexpr int kElements = 32, kLanes = 8;

// Thread (lane, element): every kLanes-th share of an element, in order.
__global__ void __launch_bounds__(kElements * kLanes)
sum_kernel(const float* __restrict__ products, const float* __restrict__ sums, const float* __restrict__ mean,
           float* __restrict__ result, float* __restrict__ total, int64_t shares, int K, int C) {
  SHARED_ARRAY(float, found, 2 * kElements * kLanes);
  const int tid = int(threadIdx.x), lane = tid / kElements;
  const int64_t element = int64_t(blockIdx.x) * kElements + tid % kElements, size = int64_t(K) * C;
  float product = 0.0f, sum = 0.0f;
  const int64_t k = element / C;
  if (element < size) {
#pragma unroll 4
    for (int64_t share = lane; share < shares; share += kLanes) {
      product += products[share * size + element];
      sum += sums[share * K + k];
    }
  }
  found[tid] = product;
  found[kElements * kLanes + tid] = sum;
  __syncthreads();
  if (lane != 0 || element >= size) return;
  for (int other = kElements; other < kElements * kLanes; other += kElements) {
    product += found[tid + other];
    sum += found[kElements * kLanes + tid + other];
  }
  if (mean != nullptr) product -= sum * mean[element % C];
  result[element] = product;
  if (element % C == 0) total[k] = sum;
}

}  // namespace

bool gives_u(DType dtype, int outer, int inner, bool even) {
  return dtype != DType::kFloat && even && outer <= kMostOuter && inner <= kMostInner;
}

namespace {

// f called with how products of a dtype are taken.
template <class F>
auto with_products(DType dtype, int inner, bool even, bool tf32, const F& f) {
  const bool narrow = inner <= 64 || !even;
  if (dtype == DType::kFloat) return tf32 ? f(Tf32{}) : f(Exact{});
  if (dtype == DType::kBFloat16) return narrow ? f(Narrow<__nv_bfloat16>{}) : f(Square<__nv_bfloat16>{});
  return narrow ? f(Narrow<__half>{}) : f(Square<__half>{});
}

dim3 product_tiles(DType dtype, int outer, int inner, bool even) {
  return with_products(dtype, inner, even, false, [&](auto math) {
    using Math = decltype(math);
    return dim3(unsigned((outer + Math::kLeft - 1) / Math::kLeft), unsigned((inner + Math::kRight - 1) / Math::kRight));
  });
}

}  // namespace

int64_t expand_shares(DType dtype, int64_t rows, int outer, int inner, bool even, bool with_u) {
  const dim3 tiles = product_tiles(dtype, outer, inner, even);
  return product_shares(dtype, rows, with_u ? 1 : int64_t(tiles.x) * tiles.y);
}

int expand_products(DType dtype, const Gradient& g, const Activation& a, bool tf32, const float* mean, const void* wg,
                    float* products, float* sums, void* u, float* result, float* total, int64_t rows, bool even,
                    void* stream) {
  const int64_t shares = expand_shares(dtype, rows, g.channels, a.x.channels, even, u != nullptr);
  const int64_t each = product_rows(rows, shares);
  const auto on = static_cast<cudaStream_t>(stream);
  const auto start = [&](auto math) {
    using Math = decltype(math);
    auto kernel = products_kernel<Math, true>;
    if constexpr (Math::kRight == 64) kernel = even ? kernel : products_kernel<Math, false>;
    dim3 grid = product_tiles(dtype, g.channels, a.x.channels, even);
    grid.z = unsigned(shares);
    return launch(kernel, grid, dim3(Math::kThreads), Math::kStages * kStageBytes<Math>, on, g, a, mean, products, sums,
                  rows, each);
  };
  const auto start_with_u = [&](auto stored) {
    using T = decltype(stored);
    using Math = WithU<T>;
    return launch(products_u_kernel<T>, dim3(unsigned(shares)), dim3(Math::kThreads),
                  kWgBytes + Math::kStages * kStageBytes<Math>, on, g, a, static_cast<const T*>(wg), products, sums,
                  static_cast<T*>(u), rows, each);
  };
  int error;
  if (u != nullptr)
    error = dtype == DType::kBFloat16 ? start_with_u(__nv_bfloat16{}) : start_with_u(__half{});
  else
    error = with_products(dtype, a.x.channels, even, tf32, start);
  if (error != cudaSuccess) return error;
  if (dtype == DType::kFloat) mean = nullptr;
  const int64_t size = int64_t(g.channels) * a.x.channels;
  const dim3 few(unsigned((size + kElements - 1) / kElements));
  return launch(sum_kernel, few, dim3(kElements * kLanes), 0, on, products, sums, mean, result, total, shares, g.channels,
                a.x.channels);
}

}  // namespace resfuse::cuda
