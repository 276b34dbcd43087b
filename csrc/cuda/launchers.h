// What the operators start: one function for each primitive, without a CUDA or torch header. Each returns 0 or the
// launch's error; `stream` is a cudaStream_t. even: rows and vectors allow accesses of 16 bytes (device/rows.h).
#pragma once

#include "arguments.h"

namespace resfuse::cuda {

// Shares of the rows, one a block: they do not depend on the device, so that the order of a sum does not either.
constexpr int64_t kMostShares = 1024, kShareRows = 32;
inline int64_t rows_each(int64_t rows) {
  const int64_t each = (rows + kMostShares - 1) / kMostShares;
  return (each + kShareRows - 1) / kShareRows * kShareRows;
}
inline int64_t shares(int64_t rows) {
  return rows == 0 ? 0 : (rows + rows_each(rows) - 1) / rows_each(rows);
}

// partial [shares, 2, C]; mean and biased variance [C].
int bn_stats(DType dtype, const void* z, float* partial, float* mean, float* var, int64_t rows, int channels, bool even,
             void* stream);

// scale = gamma * invstd, shift = beta - mean * scale, invstd = 1 / sqrt(var + eps); gamma and beta may be null.
int finalize(const float* mean, const float* var, const float* gamma, const float* beta, float eps, float* scale,
             float* shift, float* invstd, int channels, void* stream);

// running += momentum * (new - running), the variance unbiased; momentum < 0: 1 / the counter after its step.
int update_running(const float* mean, const float* var, int64_t count, float* running_mean, float* running_var,
                   int64_t* tracked, float momentum, int channels, void* stream);

int apply(DType dtype, const Sum& sum, bool even, void* stream);

// The recipe's tensor [M, C].
int bn_dgrad(DType dtype, const Gradient& g, void* out, int64_t rows, bool even, void* stream);

// Of g its part up to the masks; partial [shares, 2, C].
int bn_reduce(DType dtype, const Gradient& g, const float* mean, const float* invstd, const float* gamma, float* partial,
              const ReduceResults& results, int64_t rows, bool even, void* stream);

// Products of transposed activations: tiles of 64 x 64, and shares of the rows so that there are about kProductBlocks
// blocks. tf32: what a product of float32 reads is rounded to it; a covariance's own products are exact.
constexpr int64_t kProductBlocks = 1056, kProductStep = 32;
int64_t product_shares(int64_t rows, int left, int right);
inline int64_t product_rows(int64_t rows, int64_t shares) {
  const int64_t each = (rows + shares - 1) / shares;
  return (each + kProductStep - 1) / kProductStep * kProductStep;
}

// result = g.T @ a - total mean.T [K, C] and total = sum(g) [K], g up to its mask; mean may be null. products
// [shares, K, C], sums [shares, K]. u = g @ wg [M, C] unless null, with wg [K, C], where gives_u.
bool gives_u(DType dtype, int outer, int inner, bool even);
int expand_products(DType dtype, const Gradient& g, const Activation& a, bool tf32, const float* mean, const void* wg,
                    float* products, float* sums, void* u, float* result, float* total, int64_t rows, bool even,
                    void* stream);

// mean [C] and biased covariance [C, C]; means [shares, C], squares [shares, C, C], of which tiles below the diagonal are
// not written.
int covariance(DType dtype, const Activation& a, bool tf32, float* means, float* squares, float* mean, float* cov,
               int64_t rows, bool even, void* stream);

// out [N*P*Q, C]: maxima of act(scale * z + shift), rounded; argmax uint8 [N*P*Q, C]: row * columns + column in the
// window. The first maximum wins, and the last NaN.
int bn_relu_max_pool(DType dtype, const void* z, const float* scale, const float* shift, bool relu, void* out,
                     uint8_t* argmax, const Pool& pool, int64_t out_rows, int channels, bool even, void* stream);

// dy [N*H*W, C]: what of dout [N*P*Q, C] went through each pixel.
int max_pool_backward(DType dtype, const void* dout, const uint8_t* argmax, void* dy, const Pool& pool, int64_t rows,
                      int channels, bool even, void* stream);

}  // namespace resfuse::cuda
