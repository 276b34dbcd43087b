// expand: a block's last step on a main branch whose 1x1 is never stored,
//
//   out = act(factor * (gate * row_scale[n] * (scale * (a @ W.T) + shift) + (1 - gate) * residual)),  mask = not (out <= 0)
//
// where the residual may be such a product as well (a projection), and the moments of out as it is stored.
//
// Reads a and W (both products') once for each tile of columns and of rows, as conv_stats.cu has them, the residual and the
// gate once; writes out, a bit for each of its values, and two partial sums of each column for each tile of rows.
#include "device/row_product.h"
#include "device/sum.h"
#include "launchers.h"

namespace resfuse::cuda {
namespace {

using namespace by_rows;

// kSecond: the residual is a second product.
template <class Math, bool kWhole, bool kSecond>
__global__ void __launch_bounds__(Math::kThreads, kWhole && !kSecond ? Math::kBlocks : 1)
expand_kernel(Activation a, const typename Math::Storage* __restrict__ weight, Activation second,
              const typename Math::Storage* __restrict__ second_weight, Sum p, float* __restrict__ partial) {
  using T = typename Math::Storage;
  SHARED_DYNAMIC(unsigned char, smem);
  SHARED_ARRAY(float, scratch, Math::kThreads);
  const Tile<Math> tile(int(p.rows), p.channels);
  typename Math::Sums found;
  {
    ActivationRows<Math, kWhole> left(a, tile.begin, tile.inside);
    add_product<Math>(found, smem, left, Weight<Math, kWhole>{weight, a.x.channels, p.channels, tile.first});
  }
  float* const sums = reinterpret_cast<float*>(smem);
  float* const beside = sums + kSumBytes<Math> / 4;
  if constexpr (kSecond) {
    typename Math::Sums of_second;
    ActivationRows<Math, kWhole> left(second, tile.begin, tile.inside);
    add_product<Math>(
        of_second, smem, left, Weight<Math, kWhole>{second_weight, second.x.channels, p.channels, tile.first});
    put_sums<Math>(beside, of_second);
  }
  put_sums<Math>(sums, found);
  __syncthreads();  // the sums are whole
  const Finish<Math> mine;
  const int first = tile.first + mine.column;
  if (first < p.channels) {
    float scale[kVector], shift[kVector], residual_scale[kVector], residual_shift[kVector];
    load_vector(scale, p.scale, first, p.channels, 1.0f);
    load_vector(shift, p.shift, first, p.channels, 0.0f);
    load_vector(residual_scale, p.residual_scale, first, p.channels, 1.0f);
    load_vector(residual_shift, p.residual_shift, first, p.channels, 0.0f);
    const bool added = kSecond || p.residual.data != nullptr;
    const float bound = lower_bound(p.relu);
    for (int row = mine.row; row < tile.inside; row += mine.kApart) {
      float y[kVector], r[kVector];
      mine.get(y, sums, row);
#pragma unroll
      for (int i = 0; i < kVector; ++i) y[i] = affine(y[i], scale[i], shift[i]);
      if constexpr (kSecond) {
        mine.get(r, beside, row);
#pragma unroll
        for (int i = 0; i < kVector; ++i) r[i] = affine(r[i], residual_scale[i], residual_shift[i]);
      } else if (added) {
        const Raw<T> raw = load_residual<T, kWhole>(p, tile.begin + row, first);
        residual_values(r, p, raw, residual_scale, residual_shift);
      }
      const Raw<T> stored = write_sum<T, true, kWhole>(p, tile.begin + row, first, y, added, r, bound);
      if (partial != nullptr) mine.put(sums, row, stored);
    }
  }
  if (partial != nullptr) store_moments<Math>(partial, scratch, sums, tile, p.channels);
}

}  // namespace

int expand(DType dtype, const Activation& a, const void* weight, const Activation& second, const void* second_weight,
           bool tf32, const Sum& sum, float* partial, float* mean, float* var, bool even, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const bool beside = second_weight != nullptr;
  // Sums of two products take the registers, and their tiles the shared memory, of one twice as wide.
  const int error = with_math<true, 128>(dtype, beside ? 64 : sum.channels, even, tf32, [&](auto math) {
    using Math = decltype(math);
    using T = typename Math::Storage;
    auto kernel = expand_kernel<Math, true, false>;
    if constexpr (Math::kColumns == 64) kernel = beside ? expand_kernel<Math, true, true> : kernel;
    if constexpr (Math::kRagged) {
      if (!even) kernel = beside ? expand_kernel<Math, false, true> : expand_kernel<Math, false, false>;
    }
    return launch(kernel, tiles<Math>(sum.rows, sum.channels), dim3(Math::kThreads),
                  kSharedBytes<Math, ActivationRows<Math, true>>, on, a, static_cast<const T*>(weight), second,
                  static_cast<const T*>(second_weight), sum, partial);
  });
  if (error != cudaSuccess || partial == nullptr) return error;
  return merge_moments(
      partial, mean, var, int(sum.rows), row_tile(dtype), row_tiles(dtype, sum.rows), sum.channels, stream);
}

}  // namespace resfuse::cuda
