// bn_relu_max_pool: maxima over windows of relu(scale * z + shift), which is never stored; and dout back to where they
// were.
//
// Forward reads z once for each window that holds it (from cache but for the first time), writes out and one byte for
// each value. Backward reads dout and the bytes of the windows over a pixel, and writes dy; sums in float32, rounded once.
#include "device/rows.h"
#include "launchers.h"

namespace resfuse::cuda {
namespace {

// A window's first tap, along one side, that is not padding.
DEVICE_FN int first_tap(int begin, int apart) {
  return begin < 0 ? (-begin + apart - 1) / apart : 0;
}

template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 2)
pool_kernel(const T* __restrict__ z, const float* __restrict__ scale, const float* __restrict__ shift, bool relu,
            T* __restrict__ out, uint8_t* __restrict__ argmax, Pool pool, int64_t rows, int64_t each, int channels) {
  const Place place(rows, each);
  const int left = channels - place.first;
  if (left <= 0) return;
  float factor[kVector], term[kVector];
  load_vector(factor, scale, place.first, channels, 1.0f);
  load_vector(term, shift, place.first, channels, 0.0f);
  const float bound = lower_bound(relu);
  const int pixels = pool.out_height * pool.out_width;
  for (int64_t row = place.begin + place.down; row < place.end; row += kDown) {
    const int64_t sample = row / pixels * pool.height * pool.width;
    const int pixel = int(row % pixels);
    const int line = pixel / pool.out_width * pool.down - pool.top;
    const int column = pixel % pool.out_width * pool.right - pool.left;
    const int r0 = first_tap(line, pool.apart), s0 = first_tap(column, pool.across);
    float best[kVector];
    Raw<uint8_t> at;
#pragma unroll
    for (int i = 0; i < kVector; ++i) best[i] = -INFINITY, at.v[i] = uint8_t(r0 * pool.columns + s0);
    for (int r = r0; r < pool.rows && line + r * pool.apart < pool.height; ++r) {
      const int64_t start = sample + int64_t(line + r * pool.apart) * pool.width + column;
      for (int s = s0; s < pool.columns && column + s * pool.across < pool.width; ++s) {
        const Raw<T> raw = load_raw<kWhole>(z + (start + s * pool.across) * channels + place.first, left);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const float y = rounded<T>(clamp_below(affine(to_float(raw.v[i]), factor[i], term[i]), bound));
          if (y > best[i] || y != y) {
            best[i] = y;
            at.v[i] = uint8_t(r * pool.columns + s);
          }
        }
      }
    }
    Raw<T> stored;
#pragma unroll
    for (int i = 0; i < kVector; ++i) stored.v[i] = Stored<T>::from(best[i]);
    store_raw<kWhole>(out + row * channels + place.first, stored, left);
    store_bytes<kWhole>(argmax + row * channels + place.first, at, left);
  }
}

// The first window, along one side, that reaches a pixel, and how many do: those are its neighbours in the output.
DEVICE_FN int first_window(int at, int pad, int reach, int step) {
  const int begin = at + pad - reach;
  return begin <= 0 ? 0 : (begin + step - 1) / step;
}

template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 2)
pool_backward_kernel(const T* __restrict__ dout, const uint8_t* __restrict__ argmax, T* __restrict__ dy, Pool pool,
                     int64_t rows, int64_t each, int channels) {
  const Place place(rows, each);
  const int left = channels - place.first;
  if (left <= 0) return;
  const int pixels = pool.height * pool.width;
  const int reach_down = (pool.rows - 1) * pool.apart, reach_right = (pool.columns - 1) * pool.across;
  for (int64_t row = place.begin + place.down; row < place.end; row += kDown) {
    const int64_t sample = row / pixels * pool.out_height * pool.out_width;
    const int h = int(row % pixels) / pool.width, w = int(row % pixels) % pool.width;
    float total[kVector] = {};
    for (int p = first_window(h, pool.top, reach_down, pool.down); p < pool.out_height; ++p) {
      const int r = h + pool.top - p * pool.down;
      if (r < 0) break;
      if (r % pool.apart != 0) continue;
      for (int q = first_window(w, pool.left, reach_right, pool.right); q < pool.out_width; ++q) {
        const int s = w + pool.left - q * pool.right;
        if (s < 0) break;
        if (s % pool.across != 0) continue;
        const int tap = r / pool.apart * pool.columns + s / pool.across;
        const int64_t at = (sample + int64_t(p) * pool.out_width + q) * channels + place.first;
        const Raw<T> raw = load_raw<kWhole>(dout + at, left);
        const Raw<uint8_t> where = load_bytes<kWhole>(argmax + at, left);
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          if (int(where.v[i]) == tap) total[i] += to_float(raw.v[i]);
      }
    }
    Raw<T> stored;
#pragma unroll
    for (int i = 0; i < kVector; ++i) stored.v[i] = Stored<T>::from(total[i]);
    store_raw<kWhole>(dy + row * channels + place.first, stored, left);
  }
}

}  // namespace

int bn_relu_max_pool(DType dtype, const void* z, const float* scale, const float* shift, bool relu, void* out,
                     uint8_t* argmax, const Pool& pool, int64_t out_rows, int channels, bool even, void* stream) {
  const dim3 grid(unsigned(tiles(channels)), unsigned(shares(out_rows, channels)));
  return with_storage(dtype, [&](auto stored) {
    using T = decltype(stored);
    const auto kernel = even ? pool_kernel<T, true> : pool_kernel<T, false>;
    return launch(kernel, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream), static_cast<const T*>(z), scale,
                  shift, relu, static_cast<T*>(out), argmax, pool, out_rows, rows_each(out_rows, channels), channels);
  });
}

int max_pool_backward(DType dtype, const void* dout, const uint8_t* argmax, void* dy, const Pool& pool, int64_t rows,
                      int channels, bool even, void* stream) {
  const dim3 grid(unsigned(tiles(channels)), unsigned(shares(rows, channels)));
  return with_storage(dtype, [&](auto stored) {
    using T = decltype(stored);
    const auto kernel = even ? pool_backward_kernel<T, true> : pool_backward_kernel<T, false>;
    return launch(kernel, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream), static_cast<const T*>(dout),
                  argmax, static_cast<T*>(dy), pool, rows, rows_each(rows, channels), channels);
  });
}

}  // namespace resfuse::cuda
