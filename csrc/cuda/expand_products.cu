// expand_products: P = g.T @ (a - mean) [K, C] and sum(g) [K], for gradients g [M, K] below a mask and activations
// a [M, C]. Each share of the rows gives its own products; a second kernel adds them in order and, in 16 bits, takes
// sum(g) mean.T off; float32 subtracts the mean from a before the product.
//
// Reads g once for each 64 columns of a, and a once for each 64 of g; writes shares * K * C float32.
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

int64_t product_shares(int64_t rows, int left, int right) {
  const int64_t tiles = int64_t((left + kTile - 1) / kTile) * ((right + kTile - 1) / kTile);
  const int64_t wanted = tiles < kProductBlocks ? kProductBlocks / tiles : 1, most = (rows + kLeastRows - 1) / kLeastRows;
  const int64_t each = product_rows(rows, wanted < most ? wanted : most);
  return (rows + each - 1) / each;
}

int expand_products(DType dtype, const Gradient& g, const Activation& a, bool tf32, const float* mean, float* products,
                    float* sums, float* result, float* total, int64_t rows, bool even, void* stream) {
  const int64_t shares = product_shares(rows, g.channels, a.x.channels), each = product_rows(rows, shares);
  const dim3 grid(unsigned((g.channels + kTile - 1) / kTile), unsigned((a.x.channels + kTile - 1) / kTile), unsigned(shares));
  const auto on = static_cast<cudaStream_t>(stream);
  const auto start = [&](auto math) {
    using Math = decltype(math);
    const auto kernel = even ? products_kernel<Math, true> : products_kernel<Math, false>;
    return launch(kernel, grid, dim3(kBlock), kSharedBytes, on, g, a, mean, products, sums, rows, each);
  };
  const int error = dtype != DType::kFloat ? with_short(dtype, start) : tf32 ? start(Tf32{}) : start(Exact{});
  if (error != cudaSuccess) return error;
  if (dtype == DType::kFloat) mean = nullptr;
  const int64_t size = int64_t(g.channels) * a.x.channels;
  const dim3 few(unsigned((size + kElements - 1) / kElements));
  return launch(sum_kernel, few, dim3(kElements * kLanes), 0, on, products, sums, mean, result, total, shares, g.channels,
                a.x.channels);
}

}  // namespace resfuse::cuda
