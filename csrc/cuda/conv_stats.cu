// conv_stats of a 1x1: z = a @ W.T [M, K], rounded once, and the mean and biased variance of each of its columns as they
// are stored.
//
// Reads a and W once for each tile of columns (128 wide; 64 in float32, where K is no more, and where an access has not 16
// bytes) and of rows, writes z and two partial sums of each column for each 128 rows (64 in float32).
#include "device/row_product.h"
#include "launchers.h"

namespace resfuse::cuda {
namespace {

using namespace by_rows;

// partial [tiles, 2, K], or null.
template <class Math, bool kWhole>
__global__ void __launch_bounds__(Math::kThreads, kWhole ? Math::kBlocks : 1)
conv_kernel(Activation a, const typename Math::Storage* __restrict__ weight, typename Math::Storage* __restrict__ z,
            float* __restrict__ partial, int rows, int outputs) {
  using T = typename Math::Storage;
  SHARED_DYNAMIC(unsigned char, smem);
  SHARED_ARRAY(float, scratch, Math::kThreads);
  const Tile<Math> tile(rows, outputs);
  ActivationRows<Math, kWhole> left(a, tile.begin, tile.inside);
  typename Math::Sums found;
  add_product<Math>(found, smem, left, Weight<Math, kWhole>{weight, a.x.channels, outputs, tile.first});
  float* const sums = reinterpret_cast<float*>(smem);
  put_sums<Math>(sums, found);
  __syncthreads();  // the sums are whole
  const Finish<Math> mine;
  const int channels_left = outputs - tile.first - mine.column;
  if (channels_left > 0) {
    for (int row = mine.row; row < tile.inside; row += mine.kApart) {
      float y[kVector];
      mine.get(y, sums, row);
      const Raw<T> stored = to_raw(y, T{});
      store_raw<kWhole>(z + int64_t(tile.begin + row) * outputs + tile.first + mine.column, stored, channels_left);
      if (partial != nullptr) mine.put(sums, row, stored);
    }
  }
  if (partial != nullptr) store_moments<Math>(partial, scratch, sums, tile, outputs);
}

}  // namespace

int row_tiles(DType dtype, int64_t rows) {
  const int each = row_tile(dtype);
  return int((rows + each - 1) / each);
}

int row_tile(DType dtype) { return dtype == DType::kFloat ? Exact<true>::kRows : Short<__half, 64, true>::kRows; }

int conv_stats(DType dtype, const Activation& a, const void* weight, bool tf32, void* z, float* partial, float* mean,
               float* var, int64_t rows, int outputs, bool even, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const int error = with_math<true, 64>(dtype, outputs, even, tf32, [&](auto math) {
    using Math = decltype(math);
    using T = typename Math::Storage;
    auto kernel = conv_kernel<Math, true>;
    if constexpr (Math::kRagged) kernel = even ? kernel : conv_kernel<Math, false>;
    return launch(kernel, tiles<Math>(rows, outputs), dim3(Math::kThreads),
                  kSharedBytes<Math, ActivationRows<Math, true>>, on, a, static_cast<const T*>(weight),
                  static_cast<T*>(z), partial, int(rows), outputs);
  });
  if (error != cudaSuccess || partial == nullptr) return error;
  return merge_moments(partial, mean, var, int(rows), row_tile(dtype), row_tiles(dtype, rows), outputs, stream);
}

}  // namespace resfuse::cuda
