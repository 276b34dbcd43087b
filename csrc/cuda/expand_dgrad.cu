// expand_dgrad: da = g @ Wg - q_scale * (a @ q) - c [M, C], rounded once, 0 where a's ReLU has nothing (a <= 0).
//
// The product of a comes first: q_scale, a power of two, then scales it exactly, and that of g is added to the same sums.
// u, if given, is g @ Wg. Reads g's recipe (or u) and a, Wg and q once for each tile of columns and of rows, as
// conv_stats.cu has them, and of a its own column again for the mask; writes da.
#include "device/row_product.h"
#include "launchers.h"

namespace resfuse::cuda {
namespace {

using namespace by_rows;

template <class T, bool kWhole>
DEVICE_FN void add_u(float (&y)[kVector], const void* u, int64_t at, int left) {
  const Raw<T> raw = load_raw<kWhole>(static_cast<const T*>(u) + at, left);
#pragma unroll
  for (int i = 0; i < kVector; ++i) y[i] = y[i] + to_float(raw.v[i]);
}

template <class Math, bool kWhole>
__global__ void __launch_bounds__(Math::kThreads, kWhole ? Math::kBlocks : 1)
dgrad_kernel(Gradient g, const void* __restrict__ u, bool wide_u, Activation a,
             const typename Math::Storage* __restrict__ wg, const typename Math::Storage* __restrict__ q,
             const float* __restrict__ q_scale, const float* __restrict__ c, bool relu,
             typename Math::Storage* __restrict__ da, int rows) {
  using T = typename Math::Storage;
  SHARED_DYNAMIC(unsigned char, smem);
  const int channels = a.x.channels;
  const Tile<Math> tile(rows, channels);
  typename Math::Sums found;
  if (q != nullptr) {
    ActivationRows<Math, kWhole> left(a, tile.begin, tile.inside);
    add_product<Math>(found, smem, left, Weight<Math, kWhole>{q, channels, channels, tile.first});
    const float factor = -*q_scale;
#pragma unroll
    for (int n = 0; n < Math::Sums::kCount; ++n) found.at(n) *= factor;
  }
  if (u == nullptr) {
    GradientRows<Math, kWhole, false> left(g, tile.begin, tile.inside);
    add_product<Math>(found, smem, left, Weight<Math, kWhole>{wg, g.channels, channels, tile.first});
  }
  float* const sums = reinterpret_cast<float*>(smem);
  put_sums<Math>(sums, found);
  __syncthreads();  // the sums are whole
  const Finish<Math> mine;
  const int first = tile.first + mine.column, left = channels - first;
  if (left <= 0) return;
  float centre[kVector], scale[kVector], shift[kVector];
  load_vector(centre, c, first, channels, 0.0f);
  load_vector(scale, a.scale, first, channels, 1.0f);
  load_vector(shift, a.shift, first, channels, 0.0f);
  const float bound = lower_bound(a.relu);
  for (int row = mine.row; row < tile.inside; row += mine.kApart) {
    const int64_t at = int64_t(tile.begin + row) * channels + first;
    float y[kVector];
    mine.get(y, sums, row);
    if (u != nullptr) {
      if (wide_u)
        add_u<float, kWhole>(y, u, at, left);
      else
        add_u<T, kWhole>(y, u, at, left);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) y[i] = y[i] - centre[i];
    if (relu) {
      const Raw<T> x = load_raw<kWhole>(row_of<T>(a.x, tile.begin + row) + first, left);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float value = to_float(x.v[i]);
        const float made = a.scale != nullptr ? rounded<T>(at_least(affine(value, scale[i], shift[i]), bound)) : value;
        if (made <= 0.0f) y[i] = 0.0f;
      }
    }
    store_raw<kWhole>(da + at, to_raw(y, T{}), left);
  }
}

}  // namespace

int expand_dgrad(DType dtype, const Gradient& g, const void* u, bool wide_u, const Activation& a, const void* wg,
                 const void* q, const float* q_scale, const float* c, bool relu, bool tf32, void* da, int64_t rows,
                 bool even, void* stream) {
  return with_math<false, 64>(dtype, a.x.channels, even, tf32, [&](auto math) {
    using Math = decltype(math);
    using T = typename Math::Storage;
    auto kernel = dgrad_kernel<Math, true>;
    if constexpr (Math::kRagged) kernel = even ? kernel : dgrad_kernel<Math, false>;
    return launch(kernel, tiles<Math>(rows, a.x.channels), dim3(Math::kThreads),
                  kSharedBytes<Math, ActivationRows<Math, true>>, static_cast<cudaStream_t>(stream), g, u, wide_u, a,
                  static_cast<const T*>(wg), static_cast<const T*>(q), q_scale, c, relu, static_cast<T*>(da), int(rows));
  });
}

}  // namespace resfuse::cuda
