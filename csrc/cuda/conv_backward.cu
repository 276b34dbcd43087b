// conv_backward of a 1x1, its input's gradient: da = dz @ W + add [M, C], rounded once, dz [M, K] being a gradient's recipe.
//
// Reads dz's recipe and W once for each tile of columns (128 wide; 64 through BatchNorm, in float32, where C is no more, and
// where an access has not 16 bytes) and of rows, and the addend once; writes da and, where dz is wanted, that as well, from the
// first of the tiles side by side: the weight's gradient (expand_products.cu) then reads it instead of two tensors.
#include "device/row_product.h"
#include "launchers.h"

namespace resfuse::cuda {
namespace {

using namespace by_rows;

template <class Math, bool kWhole, bool kBatchNorm>
__global__ void __launch_bounds__(Math::kThreads, kWhole ? Math::kBlocks : 1)
conv_dgrad_kernel(Gradient g, const typename Math::Storage* __restrict__ weight, Gradient add,
                  typename Math::Storage* __restrict__ dz, typename Math::Storage* __restrict__ da, int rows,
                  int channels) {
  using T = typename Math::Storage;
  SHARED_DYNAMIC(unsigned char, smem);
  const Tile<Math> tile(rows, channels);
  GradientRows<Math, kWhole, kBatchNorm> from(g, tile.begin, tile.inside, tile.first == 0 ? dz : nullptr);
  typename Math::Sums found;
  add_product<Math>(found, smem, from, Weight<Math, kWhole>{weight, g.channels, channels, tile.first});
  float* const sums = reinterpret_cast<float*>(smem);
  put_sums<Math>(sums, found);
  __syncthreads();  // the sums are whole
  const Finish<Math> mine;
  const int first = tile.first + mine.column, left = channels - first;
  if (left <= 0) return;
  for (int row = mine.row; row < tile.inside; row += mine.kApart) {
    float y[kVector];
    mine.get(y, sums, row);
    if (add.dout != nullptr) {
      const GradientRaw<T> raw = load_gradient<T, kWhole>(add, tile.begin + row, first);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float v = raw.bits >> i & 1 ? to_float(raw.dout.v[i]) : 0.0f;
        y[i] = y[i] + (raw.weight != 1.0f ? rounded<T>(v * raw.weight) : v);
      }
    }
    store_raw<kWhole>(da + int64_t(tile.begin + row) * channels + first, to_raw(y, T{}), left);
  }
}

// Two raw tensors a step: a ring of two stages.
template <class Math>
struct Two : Math {
  static constexpr int kStages = 2;
};

}  // namespace

int conv_dgrad(DType dtype, const Gradient& g, const void* weight, const Gradient& add, bool tf32, void* dz, void* da,
               int64_t rows, int channels, bool even, void* stream) {
  const bool batch_norm = g.z != nullptr;
  const auto start = [&](auto math, auto kernel, int shared) {
    using Math = decltype(math);
    using T = typename Math::Storage;
    return launch(kernel, tiles<Math>(rows, channels), dim3(Math::kThreads), shared, static_cast<cudaStream_t>(stream),
                  g, static_cast<const T*>(weight), add, static_cast<T*>(dz), static_cast<T*>(da), int(rows), channels);
  };
  return with_math<false, 0>(dtype, batch_norm ? 64 : channels, even, tf32, [&](auto math) {
    using Math = decltype(math);
    using Plain = GradientRows<Math, true, false>;
    if constexpr (Math::kColumns == 64) {
      using Through = Two<Math>;
      auto kernel = conv_dgrad_kernel<Through, true, true>;
      if constexpr (Math::kRagged) kernel = even ? kernel : conv_dgrad_kernel<Through, false, true>;
      if (batch_norm) return start(Through{}, kernel, kSharedBytes<Through, GradientRows<Through, true, true>>);
    }
    if constexpr (Math::kRagged) {
      if (!even) return start(math, conv_dgrad_kernel<Math, false, false>, kSharedBytes<Math, Plain>);
    }
    return start(math, conv_dgrad_kernel<Math, true, false>, kSharedBytes<Math, Plain>);
  });
}

}  // namespace resfuse::cuda
