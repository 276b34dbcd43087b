// expand_products: P = g.T @ (a - mean) [K, C], sum(g) [K] and, if wanted, u = g @ Wg [M, C] in storage dtype, for
// gradients g [M, K] below a mask and activations a [M, C]. Each share of the rows gives its own products; a second kernel adds them in order and, in 16 bits, takes
// sum(g) mean.T off; float32 subtracts the mean from a before the product.
//
// Reads g once for each 64 columns of a, and a once for each 64 of g; writes shares * K * C float32. With u: reads g, a and,
// for each share, Wg once, and writes u.
#include "device/outer_product.h"
#include "launchers.h"

namespace resfuse::cuda {
namespace {

using namespace outer;

template <class Math, bool kWhole>
__global__ void __launch_bounds__(kBlock, 3)
products_kernel(Gradient g, Activation a, const float* __restrict__ mean, float* __restrict__ products,
                float* __restrict__ sums, int64_t rows, int64_t each) {
  using T = typename Math::Storage;
  SHARED_DYNAMIC(unsigned char, smem);
  SHARED_ARRAY(float, total, kTile);
  const int k0 = int(blockIdx.x) * kTile, c0 = int(blockIdx.y) * kTile;
  const int64_t share = blockIdx.z, begin = share * each, end = begin + each < rows ? begin + each : rows;
  const GradientTile<T> of_g(g, k0);
  Chunks<Math, GradientTile<T>, kWhole> left(of_g, k0);
  const int chunk = int(threadIdx.x) % kChunks * kVector;
  const ActivationTile<T> of_a(a, c0 + chunk);
  Chunks<Math, ActivationTile<T>, kWhole> right(of_a, c0);
  if constexpr (Math::kCentred) load_vector(right.pivot, mean, c0 + chunk, a.x.channels, 0.0f);
  typename Math::Sums found;
  add_rows<Math>(found, smem, left, right, begin, end, true);
#pragma unroll
  for (int n = 0; n < 32; ++n) {
    const int k = k0 + found.row(n), c = c0 + found.column(n);
    if (k < g.channels && c < a.x.channels)
      products[(share * g.channels + k) * a.x.channels + c] = found.at(n);
  }
  add_columns(total, reinterpret_cast<float*>(smem), left);
  const int column = int(threadIdx.x);
  if (blockIdx.y == 0 && column < kTile && k0 + column < g.channels) sums[share * g.channels + k0 + column] = total[column];
}

// With u: a block has all of g's columns, at most 256, and all of a's, at most 64. Its eight warps have 32 rows of P each,
// and of a step's 32 x 64 values of u 16 x 16 each. Wg lies in shared memory throughout.
constexpr int kWideBlock = 256, kTiles = 4, kWideStage = (kTiles + 1) * kTileBytes, kWgBytes = kTiles * kTile * kTile * 2;

template <class T>
__global__ void __launch_bounds__(kWideBlock, 1)
products_u_kernel(Gradient g, Activation a, const T* __restrict__ wg, float* __restrict__ products,
                  float* __restrict__ sums, T* __restrict__ u, int64_t rows, int64_t each) {
  using Math = Short<T>;
  using OfG = Chunks<Math, GradientTile<T>, true, kWideBlock>;
  SHARED_DYNAMIC(unsigned char, smem);
  SHARED_ARRAY(float, total, kTile);
  const int64_t share = blockIdx.x, begin = share * each, end = begin + each < rows ? begin + each : rows;
  const int K = g.channels, C = a.x.channels, tid = int(threadIdx.x), warp = tid >> 5;
  const GradientTile<T> of_g(g, 0);
  const ActivationTile<T> of_a(a, tid % kChunks * kVector);
  OfG left[kTiles] = {{of_g, 0}, {of_g, kTile}, {of_g, 2 * kTile}, {of_g, 3 * kTile}};
  Chunks<Math, ActivationTile<T>, true, kWideBlock> right(of_a, 0);
  unsigned char *const weights = smem, *const stages = smem + kWgBytes;
  for (int i = tid; i < kTiles * kTile * kChunks; i += kWideBlock) {
    const int k = i / kChunks, c = i % kChunks;
    const bool valid = k < K && c * kVector < C;
    cp_async_16(smem_address(weights + Math::offset(k, c)), wg + (valid ? int64_t(k) * C + c * kVector : 0), valid);
  }
  const auto load = [&](int64_t step) {
    unsigned char* const stage = stages + step % kStages * kWideStage;
    const int64_t at = begin + step * Math::kStep;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) left[t].load(stage + t * kTileBytes, at, end);
    right.load(stage + kTiles * kTileBytes, at, end);
    cp_async_commit();
  };
  float p[2][8][4] = {};
  const int64_t steps = (end - begin + Math::kStep - 1) / Math::kStep;
  load(0);
  load(1);
  for (int64_t step = 0; step < steps; ++step) {
    cp_async_wait<1>();
    unsigned char* const stage = stages + step % kStages * kWideStage;
    const int64_t at = begin + step * Math::kStep;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) left[t].prepare(stage + t * kTileBytes, at, end);
    right.prepare(stage + kTiles * kTileBytes, at, end);
    __syncthreads();  // the tiles are whole; and everybody has left the stage that is loaded next
    load(step + 2);
    const uint32_t of_rows = smem_address(stage), of_right = of_rows + kTiles * kTileBytes;
    const uint32_t of_left = of_rows + (warp >> 1) * kTileBytes, of_wg = smem_address(weights);
#pragma unroll
    for (int k = 0; k < Math::kStep / 16; ++k) {
      uint32_t x[2][4], y[4][4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        ldmatrix_x4_trans(x[i], of_left + Math::offset(k * 16 + (lane() >> 4) * 8 + (lane() & 7),
                                                       (warp & 1) * 4 + i * 2 + ((lane() >> 3) & 1)));
#pragma unroll
      for (int j = 0; j < 4; ++j)
        ldmatrix_x4_trans(y[j], of_right + Math::offset(k * 16 + (lane() & 15), j * 2 + (lane() >> 4)));
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const uint32_t of_column[2] = {y[j / 2][j % 2 * 2], y[j / 2][j % 2 * 2 + 1]};
          multiply(p[i][j], x[i], of_column, T{});
        }
    }
    float found[2][4] = {};
    const int row = (warp & 1) * 16, column = (warp >> 1) * 16;
#pragma unroll 4
    for (int k = 0; k < kTiles * kTile / 16; ++k) {
      uint32_t x[4], y[4];
      ldmatrix_x4(x, of_rows + k / 4 * kTileBytes + Math::offset(row + (lane() & 15), k % 4 * 2 + (lane() >> 4)));
      ldmatrix_x4_trans(y, of_wg + Math::offset(k * 16 + (lane() & 15), column / 8 + (lane() >> 4)));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t of_column[2] = {y[j * 2], y[j * 2 + 1]};
        multiply(found[j], x, of_column, T{});
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t index = at + row + (lane() >> 2) + h * 8;
        const int c = column + j * 8 + (lane() & 3) * 2;
        if (index < end && c < C) store_pair(u + index * C + c, found[j][h * 2], found[j][h * 2 + 1]);
      }
  }
  cp_async_wait<0>();
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int k = warp * 32 + i * 16 + (lane() >> 2) + (e >> 1) * 8, c = j * 8 + (lane() & 3) * 2 + (e & 1);
        if (k < K && c < C) products[(share * K + k) * C + c] = p[i][j][e];
      }
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    add_columns(total, reinterpret_cast<float*>(stages), left[t]);
    if (tid < kTile && t * kTile + tid < K) sums[share * K + t * kTile + tid] = total[tid];
  }
}

constexpr int64_t kLeastRows = 8 * kProductStep;  // of a share: fewer steps would not fill the ring
constexpr int kElements = 32, kLanes = 8;

// Thread (lane, element): every kLanes-th share of an element, in order.
__global__ void __launch_bounds__(kElements * kLanes)
sum_kernel(const float* __restrict__ products, const float* __restrict__ sums, const float* __restrict__ mean,
           float* __restrict__ result, float* __restrict__ total, int64_t shares, int K, int C) {
  SHARED_ARRAY(float, found, 2 * kElements * kLanes);
  const int tid = int(threadIdx.x), lane = tid / kElements;
  const int64_t element = int64_t(blockIdx.x) * kElements + tid % kElements, size = int64_t(K) * C;
  float product = 0.0f, sum = 0.0f;
  if (element < size) {
    for (int64_t share = lane; share < shares; share += kLanes) {
      product += products[share * size + element];
      sum += sums[share * K + element / C];
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
  if (element % C == 0) total[element / C] = sum;
}

}  // namespace

bool gives_u(DType dtype, int outer, int inner, bool even) {
  return dtype != DType::kFloat && even && outer <= kTiles * kTile && inner <= kTile;
}

int64_t product_shares(int64_t rows, int left, int right) {
  const int64_t tiles = int64_t((left + kTile - 1) / kTile) * ((right + kTile - 1) / kTile);
  const int64_t wanted = tiles < kProductBlocks ? kProductBlocks / tiles : 1, most = (rows + kLeastRows - 1) / kLeastRows;
  const int64_t each = product_rows(rows, wanted < most ? wanted : most);
  return (rows + each - 1) / each;
}

int expand_products(DType dtype, const Gradient& g, const Activation& a, bool tf32, const float* mean, const void* wg,
                    float* products, float* sums, void* u, float* result, float* total, int64_t rows, bool even,
                    void* stream) {
  const int64_t shares = product_shares(rows, g.channels, a.x.channels), each = product_rows(rows, shares);
  const dim3 grid(unsigned((g.channels + kTile - 1) / kTile), unsigned((a.x.channels + kTile - 1) / kTile), unsigned(shares));
  const auto on = static_cast<cudaStream_t>(stream);
  const auto start = [&](auto math) {
    using Math = decltype(math);
    const auto kernel = even ? products_kernel<Math, true> : products_kernel<Math, false>;
    return launch(kernel, grid, dim3(kBlock), kSharedBytes, on, g, a, mean, products, sums, rows, each);
  };
  const auto start_with_u = [&](auto math) {
    using T = typename decltype(math)::Storage;
    return launch(products_u_kernel<T>, dim3(unsigned(shares)), dim3(kWideBlock), kWgBytes + kStages * kWideStage, on, g, a,
                  static_cast<const T*>(wg), products, sums, static_cast<T*>(u), rows, each);
  };
  int error;
  if (u != nullptr)
    error = with_short(dtype, start_with_u);
  else if (dtype != DType::kFloat)
    error = with_short(dtype, start);
  else
    error = tf32 ? start(Tf32{}) : start(Exact{});
  if (error != cudaSuccess) return error;
  if (dtype == DType::kFloat) mean = nullptr;
  const int64_t size = int64_t(g.channels) * a.x.channels;
  const dim3 few(unsigned((size + kElements - 1) / kElements));
  return launch(sum_kernel, few, dim3(kElements * kLanes), 0, on, products, sums, mean, result, total, shares, g.channels,
                a.x.channels);
}

}  // namespace resfuse::cuda
