// expand_stats: the statistics of a @ W.T from those of a, in float32:
//
//   mean = W @ mean_a,   var = rowsum((W @ cov) * W), clamped at 0
//
// A block has 16 rows of W and takes 64 columns of W @ cov after the other. cov is symmetric: tiles of 64 x 64 above
// the diagonal count twice, those below are not read. W is read once and, for each 64 columns, again up to their last;
// the tiles of cov once for each 16 rows of W. Multiply-adds bound the time, K * C * (C + 64) / 2 on K / 16 blocks.
#include "device/small_product.h"
#include "launchers.h"

namespace resfuse::cuda {
namespace {

constexpr int kRowsOfW = 16;
using Product = small::Tile<kRowsOfW, small::kDepth>;

// How often a depth counts in the tile of columns from `column` on.
struct Times {
  int column;
  DEVICE_MEMBER float operator()(int depth) const { return depth < column ? 2.0f : 1.0f; }
};

template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 2)
expand_stats_kernel(small::Matrix<T> weight, const float* __restrict__ mean_a, const float* __restrict__ cov,
                    float* __restrict__ mean, float* __restrict__ var) {
  SHARED_ARRAY(float, smem, Product::kFloats);
  const int K = weight.rows, C = weight.columns, k0 = int(blockIdx.x) * kRowsOfW;
  small::Slice<T, kWhole, kRowsOfW, false, Times> left(weight, k0, Times{0});
  small::Slice<float, kWhole, small::kDepth, true> right({cov, C, C}, 0);
  float centre = 0.0f, square = 0.0f;
  left.load(0);
  right.load(0);
  for (int c0 = 0; c0 < C; c0 += small::kDepth) {
    const int next = c0 + small::kDepth;
    Product product;
    product.add(smem, left, right, next < C ? next : C);
    if (next < C) {
      left.factor.column = right.first = next;
      left.load(0);
      right.load(0);
    }
    float t[kVector], of_mean[kVector];
    product.total(t, smem);
    if (!Product::has()) continue;
    const int c = c0 + Product::column();
    const Raw<T> raw = small::load_chunk<kWhole>(weight, k0 + Product::row(), c);
    load_vector(of_mean, mean_a, c, C, 0.0f);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (c + i >= C) break;
      const float w = to_float(raw.v[i]);
      centre = __fmaf_rn(w, of_mean[i], centre);
      square = __fmaf_rn(w, t[i], square);
    }
  }
  if (!Product::has()) return;
  centre = small::sum_of_lanes<Product::kOfRow>(centre);
  square = small::sum_of_lanes<Product::kOfRow>(square);
  const int k = k0 + Product::row();
  if (Product::column() != 0 || k >= K) return;
  mean[k] = centre;
  var[k] = at_least(square, 0.0f);
}

}  // namespace

int expand_stats(DType dtype, const void* weight, const float* mean_a, const float* cov, float* mean, float* var,
                 int outer, int inner, bool even, void* stream) {
  return with_storage(dtype, [&](auto stored) {
    using T = decltype(stored);
    const auto kernel = even ? expand_stats_kernel<T, true> : expand_stats_kernel<T, false>;
    const small::Matrix<T> w = {static_cast<const T*>(weight), outer, inner};
    return launch(kernel, dim3(unsigned((outer + kRowsOfW - 1) / kRowsOfW)), dim3(kThreads), 0,
                  static_cast<cudaStream_t>(stream), w, mean_a, cov, mean, var);
  });
}

}  // namespace resfuse::cuda
