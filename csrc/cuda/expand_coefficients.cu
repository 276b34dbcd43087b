// expand_coefficients: what expand_dgrad and the parameters need of P [K, C] and sum(g) [K], in float32:
//
//   T = W @ cov,  dgamma = invstd * rowsum(P * W),  dweight = scale * (P - dgamma * invstd * T)
//   Q = W.T @ diag(scale * invstd * dgamma / M) @ W = q_scale * q,  c = (sum(g) / M) @ Wg - q_scale * (mean @ q)
//
// Three launches. Tiles of T, 32 x 64: read W twice and P once for each 64 columns, P once more, and cov once for each
// 32 rows; write dweight. Tiles of Q, 32 x 32, with the largest |entry| of each: of n x n those on and above the
// diagonal, since Q is symmetric; read W n + 1 times. Columns of q: read Q and Wg once, write q.
#include "device/small_product.h"
#include "launchers.h"

namespace resfuse::cuda {
namespace {

constexpr int kRowsOfT = 32, kSideOfQ = 32;
using ProductT = small::Tile<kRowsOfT, small::kDepth>;
using ProductQ = small::Tile<kSideOfQ, kSideOfQ>;

// factor [K]: the diagonal between the two W of Q.
template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 2)
rows_kernel(small::Matrix<T> weight, const float* __restrict__ products, const float* __restrict__ cov,
            const float* __restrict__ scale, const float* __restrict__ invstd, float count, float* __restrict__ dgamma,
            float* __restrict__ factor, float* __restrict__ dweight) {
  SHARED_ARRAY(float, smem, ProductT::kFloats);
  const int K = weight.rows, C = weight.columns, k0 = int(blockIdx.y) * kRowsOfT, c0 = int(blockIdx.x) * small::kDepth;
  const small::Matrix<float> p = {products, K, C};
  small::Slice<T, kWhole, kRowsOfT, false> left(weight, k0);
  small::Slice<float, kWhole, small::kDepth, true> right({cov, C, C}, c0);
  left.load(0);
  right.load(0);
  const int k = k0 + ProductT::row();
  float own = 0.0f;
#pragma unroll 2
  for (int c = ProductT::column(); c < C; c += small::kDepth) {
    const Raw<T> of_w = small::load_chunk<kWhole>(weight, k, c);
    const Raw<float> of_p = small::load_chunk<kWhole>(p, k, c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) own = __fmaf_rn(of_p.v[i], to_float(of_w.v[i]), own);
  }
  const float inverse = k < K ? invstd[k] : 0.0f, times = k < K ? scale[k] : 0.0f;
  own = small::sum_of_lanes<ProductT::kOfRow>(own) * inverse;
  if (c0 == 0 && ProductT::column() == 0 && k < K) {
    dgamma[k] = own;
    factor[k] = times * inverse * own / count;
  }
  ProductT product;
  product.add(smem, left, right, C);
  float t[kVector];
  product.total(t, smem);
  const int c = c0 + ProductT::column();
  if (k >= K || c >= C) return;
  Raw<float> found = small::load_chunk<kWhole>(p, k, c);
#pragma unroll
  for (int i = 0; i < kVector; ++i) found.v[i] = times * (found.v[i] - own * inverse * t[i]);
  store_raw<kWhole>(dweight + int64_t(k) * C + c, found, C - c);
}

struct Diagonal {
  const float* factor;
  int K;
  DEVICE_MEMBER float operator()(int k) const { return k < K ? factor[k] : 0.0f; }
};

// largest: the bits of each tile's largest |entry|. As numbers they are in the entries' order, with inf and NaN last.
template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 2)
tiles_kernel(small::Matrix<T> weight, const float* __restrict__ factor, float* __restrict__ full,
             unsigned* __restrict__ largest) {
  if (blockIdx.y > blockIdx.x) return;  // its mirror image is computed
  SHARED_ARRAY(float, smem, ProductQ::kFloats);
  SHARED_ARRAY(unsigned, of_warp, kThreads / 32);
  const int K = weight.rows, C = weight.columns, r0 = int(blockIdx.y) * kSideOfQ, c0 = int(blockIdx.x) * kSideOfQ;
  small::Slice<T, kWhole, kSideOfQ, true> left(weight, r0);
  small::Slice<T, kWhole, kSideOfQ, true, Diagonal> right(weight, c0, Diagonal{factor, K});
  left.load(0);
  right.load(0);
  ProductQ product;
  product.add(smem, left, right, K);
  Raw<float> found;
  product.total(found.v, smem);
  const int r = r0 + ProductQ::row(), c = c0 + ProductQ::column();
  unsigned most = 0;
  if (ProductQ::has() && r < C && c < C) {
    store_raw<kWhole>(full + int64_t(r) * C + c, found, C - c);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (c + i >= C) break;
      const unsigned bits = __float_as_uint(found.v[i]) & 0x7fffffffu;
      most = bits > most ? bits : most;
      if (r0 != c0) full[int64_t(c + i) * C + r] = found.v[i];
    }
  }
  most = __reduce_max_sync(0xffffffffu, most);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = most;
  __syncthreads();  // every warp has said its own
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kThreads / 32; ++warp) most = of_warp[warp] > most ? of_warp[warp] : most;
  largest[blockIdx.x * (blockIdx.x + 1) / 2 + blockIdx.y] = most;
}

// The power of two at or below a number of these bits; 1 where it is 0, inf or NaN.
DEVICE_FN float power_of_two(unsigned bits) {
  if (bits == 0 || bits >= 0x7f800000u) return 1.0f;
  const unsigned exponent = bits & 0x7f800000u;
  return __uint_as_float(exponent != 0 ? exponent : 0x80000000u >> __clz(int(bits)));
}

// A block has 16 columns: two threads side by side, 128 rows deep.
constexpr int kColumnsOfQ = 16, kDownQ = kThreads / (kColumnsOfQ / kVector), kParts = kThreads / kColumnsOfQ;

template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 2)
columns_kernel(const float* __restrict__ full, const unsigned* __restrict__ largest, int tiles, small::Matrix<T> wg,
               const float* __restrict__ sum_g, const float* __restrict__ mean, float count, T* __restrict__ q,
               float* __restrict__ q_scale, float* __restrict__ c) {
  SHARED_ARRAY(float, scratch, kDownQ * kColumnsOfQ);
  SHARED_ARRAY(float, parts, kThreads);
  SHARED_ARRAY(unsigned, of_warp, kThreads / 32);
  const int K = wg.rows, C = wg.columns, tid = int(threadIdx.x), across = tid % 2, down = tid / 2;
  const int first = int(blockIdx.x) * kColumnsOfQ + across * kVector;
  unsigned most = 0;
  for (int i = tid; i < tiles; i += kThreads) most = largest[i] > most ? largest[i] : most;
  most = __reduce_max_sync(0xffffffffu, most);
  if (tid % 32 == 0) of_warp[tid / 32] = most;
  __syncthreads();  // every warp has said its own
  for (int warp = 0; warp < kThreads / 32; ++warp) most = of_warp[warp] > most ? of_warp[warp] : most;
  const float power = power_of_two(most);
  if (blockIdx.x == 0 && tid == 0) *q_scale = power;

  float total[kVector] = {}, shift[kVector] = {};
#pragma unroll 4
  for (int k = down; k < K; k += kDownQ) {
    const Raw<T> of_wg = small::load_chunk<kWhole>(wg, k, first);
    const float share = sum_g[k] / count;
#pragma unroll
    for (int i = 0; i < kVector; ++i) total[i] = __fmaf_rn(share, to_float(of_wg.v[i]), total[i]);
  }
  // From the rounded q: c from another would move the sums of the gradient's columns.
#pragma unroll 4
  for (int r = down; r < C; r += kDownQ) {
    const Raw<float> of_full = small::load_chunk<kWhole>(small::Matrix<float>{full, C, C}, r, first);
    float v[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = of_full.v[i] / power;
    const Raw<T> stored = to_raw(v, T{});
    if (first < C) store_raw<kWhole>(q + int64_t(r) * C + first, stored, C - first);
    const float centre = mean[r];
#pragma unroll
    for (int i = 0; i < kVector; ++i) shift[i] = __fmaf_rn(centre, to_float(stored.v[i]), shift[i]);
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    scratch[down * kColumnsOfQ + across * kVector + i] = total[i] - power * shift[i];
  __syncthreads();  // every thread's share is there
  const int column = tid % kColumnsOfQ, part = tid / kColumnsOfQ;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kDownQ / kParts; ++i) sum += scratch[(part * (kDownQ / kParts) + i) * kColumnsOfQ + column];
  parts[tid] = sum;
  __syncthreads();  // the parts are whole
  const int to = int(blockIdx.x) * kColumnsOfQ + column;
  if (part != 0 || to >= C) return;
#pragma unroll
  for (int i = 1; i < kParts; ++i) sum += parts[i * kColumnsOfQ + column];
  c[to] = sum;
}

}  // namespace

int64_t coefficient_tiles(int inner) {
  const int64_t side = (inner + kSideOfQ - 1) / kSideOfQ;
  return side * (side + 1) / 2;
}

int expand_coefficients(DType dtype, const CoefficientOperands& from, const CoefficientResults& to, int64_t count,
                        int outer, int inner, bool even, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const float M = float(count);
  const auto blocks = [](int size, int each) { return unsigned((size + each - 1) / each); };
  const dim3 of_t(blocks(inner, small::kDepth), blocks(outer, kRowsOfT));
  const dim3 of_q(blocks(inner, kSideOfQ), blocks(inner, kSideOfQ));
  return with_storage(dtype, [&](auto stored) {
    using T = decltype(stored);
    const small::Matrix<T> weight = {static_cast<const T*>(from.weight), outer, inner};
    const small::Matrix<T> wg = {static_cast<const T*>(from.wg), outer, inner};
    const auto rows = even ? rows_kernel<T, true> : rows_kernel<T, false>;
    const auto tiles = even ? tiles_kernel<T, true> : tiles_kernel<T, false>;
    const auto columns = even ? columns_kernel<T, true> : columns_kernel<T, false>;
    int error = launch(rows, of_t, dim3(kThreads), 0, on, weight, from.products, from.cov, from.scale, from.invstd, M,
                       to.dgamma, to.factor, to.dweight);
    if (error == cudaSuccess)
      error = launch(tiles, of_q, dim3(kThreads), 0, on, weight, to.factor, to.full, to.largest);
    if (error == cudaSuccess)
      error = launch(columns, dim3(blocks(inner, kColumnsOfQ)), dim3(kThreads), 0, on, to.full, to.largest,
                     int(coefficient_tiles(inner)), wg, from.sum_g, from.mean, M, static_cast<T*>(to.q), to.q_scale,
                     to.c);
    return error;
  });
}

}  // namespace resfuse::cuda
