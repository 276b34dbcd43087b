// conv_depthwise: a convolution of each channel by itself, and its statistics; the gradient of its input, which is one
// too, and that of its weight.
//
//   z[n, p, q, c] = sum over taps (r, s) of a[n, p*sh - ph + r*dh, q*sw - pw + s*dw, c] * W[c, r, s]
//   da = the same of dz with W turned round, + add      dW[c, r, s] = sum over pixels of dz * a
//
// a (BatchNorm and activation) and dz (BatchNorm's backward) are made from their recipes in cache, block by block
// (window.h), and read there by all taps. Forward and da read M*C*s and write M*C*s, dW reads 2*M*C*s; 2*M*C*R*S
// operations each. Sums in float32 along a block, blocks and shares in order.
#include "depthwise.h"
#include "gradient_tensors.h"
#include "isa.h"
#include "moments.h"
#include "primitives.h"

namespace resfuse {

namespace {

// Blocks whose source fits in cache.
Blocks depthwise_blocks(const ConvWindow& window, int64_t channels) {
  const int64_t bytes = depthwise_stride(channels) * static_cast<int64_t>(sizeof(float));
  const int64_t pixel = bytes * window.stride_h * window.stride_w;
  return Blocks(window, std::max<int64_t>(1, depthwise_bytes / pixel), std::max<int64_t>(1, at::get_num_threads()));
}

int64_t block_shares(const Blocks& blocks) {
  return std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), blocks.count()));
}

}  // namespace

template <class T, class Source>
struct DepthwiseKernel {
  Blocks blocks;
  Source source;
  int64_t channels;
  const float* weight;     // [taps, channels up to lanes]
  const Gradient<T>* add;  // or null
  Place place;
  T* out;
  Moments* moments;  // of this share, or null

  // Blocks begin .. end.
  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    const ConvWindow& w = blocks.w;
    const int64_t stride = depthwise_stride(channels), line = w.line_pixels() * stride;
    const Steps steps(w, stride);
    const Buffer<float> pixels(blocks.source_pixels() * stride), made(w.out_width * stride);
    for (int64_t index = begin; index < end; ++index) {
      const Block block = blocks.at(index);
      fill_block<float>(blocks, block, static_cast<float*>(pixels), stride, LaneFiller<Source>{&source, stride});
      for (int64_t n = 0; n < block.images; ++n) {
        for (int64_t p = 0; p < block.lines; ++p) {
          const float* from = pixels + (n * blocks.source_lines + p * w.stride_h) * line;
          line_of(steps, from, made);
          write(block.image + n, block.line + p, stride, made);
        }
      }
      if (moments) moments->add(out + blocks.first_row(block) * channels, blocks.row_count(block), channels);
    }
  }

  RESFUSE_HD void line_of(const Steps& steps, const float* from, float* made) const {
    const ConvWindow& w = blocks.w;
    if (w.rows == 3 && w.columns == 3 && steps.shared()) {
      make_line<3, 3, false>(steps, from, weight, w.out_width, made);
    } else if (w.columns == 5 && steps.shared()) {
      make_line<1, 5, false>(steps, from, weight, w.out_width, made);
      for (int64_t r = 1; r < w.rows; ++r) {
        make_line<1, 5, true>(steps, from + r * steps.row, weight + 5 * r * steps.made, w.out_width, made);
      }
    } else {
      for (int64_t t = 0; t < w.taps(); ++t) {
        make_tap(steps, from + t / w.columns * steps.row + t % w.columns * steps.column, weight + t * steps.made,
                 w.out_width, t == 0, made);
      }
    }
  }

  RESFUSE_HD void write(int64_t image, int64_t p, int64_t stride, const float* made) const {
    T piece[gradient_columns];
    const int64_t first = (image * place.height + place.first_h + p * place.step_h) * place.width + place.first_w;
    for (int64_t q = 0; q < blocks.w.out_width; ++q) {
      const int64_t row = first + q * place.step_w;
      const float* __restrict__ from = made + q * stride;
      T* __restrict__ to = out + row * channels;
      for (int64_t c = 0; c < channels; c += gradient_columns) {
        const int64_t n = std::min(gradient_columns, channels - c);
        if (add) {
          masked_row(*add, row, c, n, piece);
          for (int64_t i = 0; i < n; ++i) to[c + i] = store<T>(from[c + i] + load(piece[i]));
        } else {
          for (int64_t i = 0; i < n; ++i) to[c + i] = store<T>(from[c + i]);
        }
      }
    }
  }
};

template <class T>
struct DepthwiseWeightKernel {
  Blocks blocks;
  ActRows<T> a;
  GradientRows<T> g;
  int64_t channels;
  float* sums;  // [taps, channels up to lanes] of this share

  // Blocks begin .. end.
  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    const ConvWindow& w = blocks.w;
    const int64_t stride = depthwise_stride(channels), line = w.line_pixels() * stride, count = w.taps();
    const Steps steps(w, stride);
    const Buffer<float> pixels(blocks.source_pixels() * stride), gradients(blocks.pixels() * stride);
    const Buffer<float> own(count * stride);
    for (int64_t index = begin; index < end; ++index) {
      const Block block = blocks.at(index);
      fill_block<float>(blocks, block, static_cast<float*>(pixels), stride, LaneFiller<ActRows<T>>{&a, stride});
      g(blocks.first_row(block), blocks.row_count(block), gradients, stride);
      for (int64_t i = 0; i < count * stride; ++i) own[i] = 0.0f;
      for (int64_t n = 0; n < block.images; ++n) {
        for (int64_t p = 0; p < block.lines; ++p) {
          const float* from = pixels + (n * blocks.source_lines + p * w.stride_h) * line;
          const float* dz = gradients + (n * block.lines + p) * w.out_width * stride;
          line_of(steps, from, dz, own);
        }
      }
      for (int64_t i = 0; i < count * stride; ++i) sums[i] += own[i];
    }
  }

  RESFUSE_HD void line_of(const Steps& steps, const float* from, const float* dz, float* own) const {
    const ConvWindow& w = blocks.w;
    if (w.rows == 3 && w.columns == 3 && steps.shared()) {
      add_line<3, 3>(steps, from, dz, w.out_width, own);
    } else if (w.columns == 5 && steps.shared()) {
      for (int64_t r = 0; r < w.rows; ++r) {
        add_line<1, 5>(steps, from + r * steps.row, dz, w.out_width, own + 5 * r * steps.made);
      }
    } else {
      for (int64_t t = 0; t < w.taps(); ++t) {
        add_tap(steps, from + t / w.columns * steps.row + t % w.columns * steps.column, dz, w.out_width,
                own + t * steps.made);
      }
    }
  }
};

namespace {

void check_depthwise(const at::Tensor& weight, const at::Tensor& x) {
  check_same_dtype(weight, "weight", x);
  TORCH_CHECK(weight.dim() == 4 && weight.size(0) == x.size(1) && weight.size(1) == 1 &&
                  weight.size(2) * weight.size(3) <= most_taps,
              "weight must have shape [", x.size(1), ", 1, R, S] of at most ", most_taps, " taps, not ", weight.sizes());
}

// A tap of every channel, which begins at `offset`, as floats, zeros behind the last.
template <class T>
void pack_channels(const at::Tensor& weight, int64_t offset, float* out) {
  const T* from = data_of<T>(weight) + offset;
  for (int64_t c = 0; c < weight.size(0); ++c) out[c] = load(from[c * weight.stride(0)]);
  for (int64_t c = weight.size(0); c < depthwise_stride(weight.size(0)); ++c) out[c] = 0.0f;
}

template <class T>
ActRows<T> act_rows_of(
    const at::Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift, int64_t act, double slope) {
  return {activation_of<T>(x, scale, shift, false), static_cast<Act>(act), static_cast<float>(slope)};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> conv_depthwise(
    const at::Tensor& x, const OptionalTensor& x_scale, const OptionalTensor& x_shift, int64_t act, double slope,
    const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    int64_t out_height, int64_t out_width, bool want_stats) {
  check_view(x, "x");
  check_affine(x_scale, x_shift, "x_scale", "x_shift", x.size(1));
  check_act(act);
  check_depthwise(weight, x);
  const int64_t channels = x.size(1), row = depthwise_stride(channels);
  const ConvWindow window =
      window_over(x, out_height, out_width, weight.sizes().slice(2), stride, padding, dilation);
  const at::Tensor z =
      uninitialized({x.size(0), channels, out_height, out_width}, x.options(), at::MemoryFormat::ChannelsLast);
  const Blocks blocks = depthwise_blocks(window, channels);
  const int64_t shares = block_shares(blocks);
  std::vector<Moments> moments(want_stats ? shares : 0, Moments(channels));
  with_type(x, [&](auto stored) {
    using T = decltype(stored);
    const Buffer<float> taps(window.taps() * row);
    for (int64_t t = 0; t < window.taps(); ++t) {
      const int64_t offset = t / window.columns * weight.stride(2) + t % window.columns * weight.stride(3);
      pack_channels<T>(weight, offset, taps + t * row);
    }
    const ActRows<T> source = act_rows_of<T>(x, x_scale, x_shift, act, slope);
    const Place dense{out_height, out_width, 0, 0, 1, 1};
    run_blocks(blocks, shares, [&](int64_t s) {
      return DepthwiseKernel<T, ActRows<T>>{blocks, source, channels, taps, nullptr, dense, mutable_data_of<T>(z),
                                            want_stats ? &moments[s] : nullptr};
    });
  });
  if (!want_stats) return {z, uninitialized({0}, at::kFloat), uninitialized({0}, at::kFloat)};
  auto [mean, var] = merged(moments);
  return {z, mean, var};
}

at::Tensor conv_depthwise_dgrad(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const OptionalTensor& z, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& mean,
    const OptionalTensor& mean_dy, const OptionalTensor& slope, const at::Tensor& weight, int64_t height,
    int64_t width, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, const OptionalTensor& add,
    const OptionalTensor& add_mask, const OptionalTensor& add_row_scale, double add_factor) {
  const OptionalTensor none;
  const GradientTensors g{dout, mask, row_scale, factor, z, scale, shift, mean, mean_dy, slope};
  g.check();
  check_depthwise(weight, dout);
  const int64_t channels = dout.size(1), row = depthwise_stride(channels);
  const InputGradient gradient(weight, height, width, stride, padding, dilation);
  const at::Tensor da =
      uninitialized({dout.size(0), channels, height, width}, dout.options(), at::MemoryFormat::ChannelsLast);
  const GradientTensors beside{add ? *add : dout, add_mask, add_row_scale, add_factor, none, none, none, none, none,
                               none};
  if (add) {
    check_rows_beside(*add, "add", da, channels);
    beside.check();
  }
  with_type(dout, [&](auto stored) {
    using T = decltype(stored);
    const Gradient<T> added = beside.arguments<T>();
    const GradientRows<T> source{g.arguments<T>()};
    gradient.each(dout, weight, [&](const ConvWindow& window, const Place& place, const auto& taps) {
      const Buffer<float> packed(window.taps() * row);
      for (int64_t t = 0; t < window.taps(); ++t) pack_channels<T>(weight, taps(t), packed + t * row);
      const Blocks blocks = depthwise_blocks(window, channels);
      run_blocks(blocks, block_shares(blocks), [&](int64_t) {
        return DepthwiseKernel<T, GradientRows<T>>{blocks, source, channels, packed, add ? &added : nullptr, place,
                                                   mutable_data_of<T>(da), nullptr};
      });
    });
  });
  return da;
}

at::Tensor conv_depthwise_wgrad(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const OptionalTensor& z, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& mean,
    const OptionalTensor& mean_dy, const OptionalTensor& slope, const at::Tensor& x, const OptionalTensor& x_scale,
    const OptionalTensor& x_shift, int64_t act, double act_slope, at::IntArrayRef size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation) {
  const GradientTensors g{dout, mask, row_scale, factor, z, scale, shift, mean, mean_dy, slope};
  g.check();
  check_view(x, "x");
  check_same_dtype(x, "x", dout);
  TORCH_CHECK(x.size(0) == dout.size(0) && x.size(1) == dout.size(1), "x must hold ", dout.size(0), " images of ",
              dout.size(1), " channels, not ", x.sizes());
  check_affine(x_scale, x_shift, "x_scale", "x_shift", x.size(1));
  check_act(act);
  TORCH_CHECK(size[0] * size[1] <= most_taps, "size must be of at most ", most_taps, " taps, not ", size);
  const int64_t channels = x.size(1), row = depthwise_stride(channels);
  const ConvWindow window = window_over(x, dout.size(2), dout.size(3), size, stride, padding, dilation);
  const Blocks blocks = depthwise_blocks(window, channels);
  const int64_t shares = row_count(dout) > 0 ? block_shares(blocks) : 0, taps = window.taps();
  std::vector<std::vector<float>> sums(shares, std::vector<float>(taps * row, 0.0f));
  with_type(dout, [&](auto stored) {
    using T = decltype(stored);
    const ActRows<T> source = act_rows_of<T>(x, x_scale, x_shift, act, act_slope);
    run_blocks(blocks, shares, [&](int64_t s) {
      return DepthwiseWeightKernel<T>{blocks, source, {g.arguments<T>()}, channels, sums[s].data()};
    });
  });
  const at::Tensor dweight = uninitialized({channels, 1, size[0], size[1]}, at::kFloat);
  float* to = mutable_data_of<float>(dweight);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t t = 0; t < taps; ++t) {
      float total = 0.0f;
      for (const auto& share : sums) total += share[t * row + c];
      to[c * taps + t] = total;
    }
  }
  return dweight;
}

}  // namespace resfuse
