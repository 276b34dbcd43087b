// bn_relu_max_pool: maxima of relu(scale * x + shift) over windows, and where they are; and the way back.
//
// x [N, H, W, C], out [N, P, Q, C], argmax uint8 [N, P, Q, C], row * columns + column in the window. As in torch the
// first maximum of the rounded values wins, and the last NaN. Forward reads N*H*W*C*s, writes N*P*Q*C*(s + 1); the rows
// of a window are normalised once for a row of out. Backward reads that, writes N*H*W*C*s; sums in float32, in order.

#include "isa.h"
#include "operands.h"
#include "parallel.h"
#include "primitives.h"

namespace resfuse {

struct PoolShape {
  int64_t rows, columns;  // of the window
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t height, width;          // of x
  int64_t out_height, out_width;  // of out
  int64_t channels;

  RESFUSE_HD int64_t row(int64_t p, int64_t i) const { return p * stride_h - padding_h + i * dilation_h; }
  RESFUSE_HD int64_t column(int64_t q, int64_t j) const { return q * stride_w - padding_w + j * dilation_w; }
};

template <class T>
struct PoolKernel {
  PoolShape s;
  Activation<T> a;
  T* out;
  uint8_t* argmax;

  // Rows begin .. end of all N * P rows of out.
  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t line = s.width * s.channels;
    const Buffer<T> lines(s.rows * line);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t n = r / s.out_height, p = r % s.out_height;
      for (int64_t i = 0; i < s.rows; ++i) {
        const int64_t h = s.row(p, i);
        if (h < 0 || h >= s.height) continue;
        fill_line((n * s.height + h) * s.width, lines + i * line);
      }
      for (int64_t q = 0; q < s.out_width; ++q) {
        const int64_t at = (r * s.out_width + q) * s.channels;
        write_maxima(lines, p, q, out + at, argmax + at);
      }
    }
  }

  RESFUSE_HD void fill_line(int64_t first, T* to) const {
    for (int64_t w = 0; w < s.width; ++w) {
      const T* __restrict__ z = a.z.row(first + w);
      T* __restrict__ o = to + w * s.channels;
      for (int64_t c = 0; c < s.channels; ++c) o[c] = normalised(z[c], a.scale[c], a.shift[c], a.bound);
    }
  }

  RESFUSE_HD void write_maxima(
      const T* lines, int64_t p, int64_t q, T* __restrict__ best, uint8_t* __restrict__ place) const {
    bool first = true;
    for (int64_t i = 0; i < s.rows; ++i) {
      const int64_t h = s.row(p, i);
      if (h < 0 || h >= s.height) continue;
      for (int64_t j = 0; j < s.columns; ++j) {
        const int64_t w = s.column(q, j);
        if (w < 0 || w >= s.width) continue;
        const T* __restrict__ y = lines + (i * s.width + w) * s.channels;
        const uint8_t here = static_cast<uint8_t>(i * s.columns + j);
        if (first) {
          for (int64_t c = 0; c < s.channels; ++c) {
            best[c] = y[c];
            place[c] = here;
          }
          first = false;
        } else {
          for (int64_t c = 0; c < s.channels; ++c) {
            const float value = load(y[c]);
            const bool better = value > load(best[c]) || value != value;
            best[c] = better ? y[c] : best[c];
            place[c] = better ? here : place[c];
          }
        }
      }
    }
  }
};

template <class T>
struct PoolBackwardKernel {
  PoolShape s;
  const T* dout;
  const uint8_t* argmax;
  T* dy;

  // Rows begin .. end of all N * H rows of x.
  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t line = s.width * s.channels;
    const Buffer<float> sum(line);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t n = r / s.height, h = r % s.height;
      for (int64_t i = 0; i < line; ++i) sum[i] = 0.0f;
      for (int64_t i = s.rows - 1; i >= 0; --i) {  // rows of out in their order
        const int64_t from = h + s.padding_h - i * s.dilation_h;
        if (from < 0 || from % s.stride_h != 0 || from / s.stride_h >= s.out_height) continue;
        add_row(n * s.out_height + from / s.stride_h, i, sum);
      }
      T* __restrict__ o = dy + r * line;
      const float* __restrict__ total = sum;
      for (int64_t i = 0; i < line; ++i) o[i] = store<T>(total[i]);
    }
  }

  RESFUSE_HD void add_row(int64_t out_row, int64_t i, float* sum) const {
    for (int64_t q = 0; q < s.out_width; ++q) {
      const int64_t at = (out_row * s.out_width + q) * s.channels;
      const T* __restrict__ g = dout + at;
      const uint8_t* __restrict__ place = argmax + at;
      for (int64_t j = 0; j < s.columns; ++j) {
        const int64_t w = s.column(q, j);
        if (w < 0 || w >= s.width) continue;
        float* __restrict__ to = sum + w * s.channels;
        const uint8_t here = static_cast<uint8_t>(i * s.columns + j);
        for (int64_t c = 0; c < s.channels; ++c) to[c] += place[c] == here ? load(g[c]) : 0.0f;
      }
    }
  }
};

namespace {

PoolShape shape_of(
    const at::Tensor& x, int64_t out_height, int64_t out_width, at::IntArrayRef size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation) {
  TORCH_CHECK(size[0] * size[1] <= 255, "size must hold at most 255 values, not ", size);
  return {size[0],    size[1],     stride[0],   stride[1], padding[0], padding[1], dilation[0],
          dilation[1], x.size(2), x.size(3), out_height, out_width,  x.size(1)};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> bn_relu_max_pool(
    const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift, bool relu, int64_t out_height,
    int64_t out_width, at::IntArrayRef size, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation) {
  check_rows(x, "x");
  check_vector(scale, "scale", x.size(1));
  check_vector(shift, "shift", x.size(1));
  const PoolShape shape = shape_of(x, out_height, out_width, size, stride, padding, dilation);
  const auto empty = [&](at::TensorOptions options) {
    return uninitialized({x.size(0), x.size(1), out_height, out_width}, options, at::MemoryFormat::ChannelsLast);
  };
  const at::Tensor out = empty(x.options()), argmax = empty(x.options().dtype(at::kByte));
  const int64_t rows = x.size(0) * out_height;
  with_type(x, [&](auto stored) {
    using T = decltype(stored);
    const PoolKernel<T> kernel{shape, activation_of<T>(x, scale, shift, relu), mutable_data_of<T>(out),
                               argmax.mutable_data_ptr<uint8_t>()};
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) { run_best(kernel, begin, end); });
  });
  return {out, argmax};
}

at::Tensor max_pool_backward(
    const at::Tensor& dout, const at::Tensor& argmax, const at::Tensor& x, at::IntArrayRef size,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  check_rows(dout, "dout");
  check_rows(x, "x");
  check_same_dtype(x, "x", dout);
  TORCH_CHECK(argmax.scalar_type() == at::kByte && is_dense(argmax) && argmax.sizes() == dout.sizes(),
              "argmax must be uint8, channels_last, of the shape ", dout.sizes());
  const PoolShape shape = shape_of(x, dout.size(2), dout.size(3), size, stride, padding, dilation);
  const at::Tensor dy = empty_rows(x, x.size(1));
  with_type(dout, [&](auto stored) {
    using T = decltype(stored);
    const PoolBackwardKernel<T> kernel{shape, data_of<T>(dout), argmax.const_data_ptr<uint8_t>(),
                                       mutable_data_of<T>(dy)};
    at::parallel_for(0, x.size(0) * x.size(2), 1, [&](int64_t begin, int64_t end) { run_best(kernel, begin, end); });
  });
  return dy;
}

}  // namespace resfuse
