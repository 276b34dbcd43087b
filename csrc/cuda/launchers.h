// What the operators start: one function for each primitive, without a CUDA or torch header. Each returns 0 or the
// launch's error; `stream` is a cudaStream_t. even: rows and vectors allow accesses of 16 bytes (device/rows.h).
#pragma once

#include "arguments.h"

namespace resfuse::cuda {

// Shares of the rows, one a block of kTileChannels channels: about kMostBlocks blocks, whole waves of two or three on an
// H100's 132 multiprocessors, of kShareRows rows at least, for which a thread asks at once. They do not depend on the
// device, so that the order of a sum does not either.
constexpr int64_t kMostBlocks = 792, kShareRows = 128, kTileChannels = 64;
inline int64_t rows_each(int64_t rows, int channels) {
  const int64_t tiles = (channels + kTileChannels - 1) / kTileChannels;
  const int64_t most = tiles < kMostBlocks ? kMostBlocks / tiles : 1;
  const int64_t each = (rows + most - 1) / most;
  return (each + kShareRows - 1) / kShareRows * kShareRows;
}
inline int64_t shares(int64_t rows, int channels) {
  return rows == 0 ? 0 : (rows + rows_each(rows, channels) - 1) / rows_each(rows, channels);
}

// partial [shares, 2, C]; mean and biased variance [C].
int bn_stats(DType dtype, const void* z, float* partial, float* mean, float* var, int64_t rows, int channels, bool even,
             void* stream);

// mean and biased variance of all rows from those of shares of `each` rows, partial [shares, 2, C] (mean, sum of squares).
int merge_moments(const float* partial, float* mean, float* var, int rows, int each, int shares, int channels,
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

// Of g its part up to the masks, and mean; partial [shares, 2, C].
int bn_reduce(DType dtype, const Gradient& g, const float* invstd, const float* gamma, float* partial,
              const ReduceResults& results, int64_t rows, bool even, void* stream);

// Products of transposed activations: shares of the rows so that there are about kProductBlocks blocks, one wave of two
// on each of an H100's 132 multiprocessors (three in float32), for each share one of each tile. tf32: what a product of
// float32 reads is rounded to it; a covariance's own products are exact.
constexpr int64_t kProductBlocks = 264, kWideProductBlocks = 396, kProductStep = 64, kLeastProductRows = 256;
inline int64_t product_rows(int64_t rows, int64_t shares) {
  const int64_t each = (rows + shares - 1) / shares;
  return (each + kProductStep - 1) / kProductStep * kProductStep;
}
inline int64_t product_shares(DType dtype, int64_t rows, int64_t tiles) {
  const int64_t blocks = dtype == DType::kFloat ? kWideProductBlocks : kProductBlocks;
  const int64_t wanted = tiles < blocks ? blocks / tiles : 1, most = (rows + kLeastProductRows - 1) / kLeastProductRows;
  const int64_t each = product_rows(rows, wanted < most ? wanted : most);
  return (rows + each - 1) / each;
}
int64_t covariance_shares(DType dtype, int64_t rows, int channels);
int64_t expand_shares(DType dtype, int64_t rows, int outer, int inner, bool even, bool with_u);

// result = g.T @ a - total mean.T [K, C] and total = sum(g) [K], g up to its mask; mean may be null. products
// [shares, K, C], sums [shares, K]. u = g @ wg [M, C] unless null, with wg [K, C], where gives_u.
bool gives_u(DType dtype, int outer, int inner, bool even);
int expand_products(DType dtype, const Gradient& g, const Activation& a, bool tf32, const float* mean, const void* wg,
                    float* products, float* sums, void* u, float* result, float* total, int64_t rows, bool even,
                    void* stream);

// mean [C] and biased covariance [C, C]; sums [shares, C], twice in float32, squares [shares, C, C], of
// which tiles below the diagonal are not written.
int covariance(DType dtype, const Activation& a, bool tf32, float* sums, float* squares, float* mean, float* cov,
               int64_t rows, bool even, void* stream);

// Products by rows: a tile has row_tile rows, of which there are row_tiles. A weight [K, C] gives a @ W.T or dz @ W.
// partial [row_tiles, 2, K], or null where no statistics are wanted.
int row_tile(DType dtype);
int row_tiles(DType dtype, int64_t rows);

// z [M, K] = a @ weight.T, and its mean and biased variance [K].
int conv_stats(DType dtype, const Activation& a, const void* weight, bool tf32, void* z, float* partial, float* mean,
               float* var, int64_t rows, int outputs, bool even, void* stream);

// sum.out [M, K], whose main branch is sum.scale * (a @ weight.T) + sum.shift; with second_weight [K, D] its residual is
// sum.residual_scale * (second @ second_weight.T) + sum.residual_shift.
int expand(DType dtype, const Activation& a, const void* weight, const Activation& second, const void* second_weight,
           bool tf32, const Sum& sum, float* partial, float* mean, float* var, bool even, void* stream);

// da [M, C] = g @ wg - q_scale * (a @ q) - c, g up to its mask; u, float32 where wide_u, stands for g @ wg; q and c may
// be null. relu: 0 where a <= 0.
int expand_dgrad(DType dtype, const Gradient& g, const void* u, bool wide_u, const Activation& a, const void* wg,
                 const void* q, const float* q_scale, const float* c, bool relu, bool tf32, void* da, int64_t rows,
                 bool even, void* stream);

// da [M, C] = g @ weight + add, add up to its mask; where g has a z, g itself to dz [M, K] unless null.
int conv_dgrad(DType dtype, const Gradient& g, const void* weight, const Gradient& add, bool tf32, void* dz, void* da,
               int64_t rows, int channels, bool even, void* stream);

// out [N*P*Q, C]: maxima of act(scale * z + shift), rounded; argmax uint8 [N*P*Q, C]: row * columns + column in the
// window. The first maximum wins, and the last NaN.
int bn_relu_max_pool(DType dtype, const void* z, const float* scale, const float* shift, bool relu, void* out,
                     uint8_t* argmax, const Pool& pool, int64_t out_rows, int channels, bool even, void* stream);

// dy [N*H*W, C]: what of dout [N*P*Q, C] went through each pixel.
int max_pool_backward(DType dtype, const void* dout, const uint8_t* argmax, void* dy, const Pool& pool, int64_t rows,
                      int channels, bool even, void* stream);

// mean = weight @ mean_a and var = rowsum((weight @ cov) * weight), clamped at 0, each [K]; weight [K, C], cov [C, C]
// symmetric.
int expand_stats(DType dtype, const void* weight, const float* mean_a, const float* cov, float* mean, float* var,
                 int outer, int inner, bool even, void* stream);

// products [K, C], sum_g, scale and invstd [K], weight and wg [K, C] stored, mean [C], cov [C, C].
struct CoefficientOperands {
  const float *products, *sum_g;
  const void *weight, *wg;
  const float *mean, *cov, *scale, *invstd;
};

// dgamma [K], dweight [K, C], q [C, C] stored, q_scale [1], c [C]; on the way factor [K], full [C, C] and largest
// [coefficient_tiles].
struct CoefficientResults {
  float *dgamma, *dweight;
  void* q;
  float *q_scale, *c;
  float *factor, *full;
  uint32_t* largest;
};
int64_t coefficient_tiles(int inner);
int expand_coefficients(DType dtype, const CoefficientOperands& from, const CoefficientResults& to, int64_t count,
                        int outer, int inner, bool even, void* stream);

// y = act(scale * z + shift) [M, C]; act a number of common/activations.h from leaky_relu on, slope leaky ReLU's.
int bn_act(DType dtype, const void* z, const float* scale, const float* shift, int act, float slope, void* y,
           int64_t rows, int channels, bool even, void* stream);

// Of g dout (the gradient dy of y), z, scale, shift and mean; partial [shares, 2, C], results without bn_scale, dz
// [M, C]. batch: mean and invstd are those of the batch, not constants.
int bn_act_backward(DType dtype, Gradient g, int act, float act_slope, const float* invstd, float* partial,
                    const ReduceResults& results, bool batch, void* dz, int64_t rows, bool even, void* stream);

// bn_reduce's second kernel alone.
int add_shares(const float* partial, const float* invstd, const float* gamma, const ReduceResults& results,
               int64_t rows, int shares, int channels, void* stream);

}  // namespace resfuse::cuda
