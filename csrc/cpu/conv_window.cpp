// conv_window: convolutions with a window and their statistics, and the gradient of their input, which is one too.
//
//   z[n, p, q] = sum over taps (r, s) of a[n, p*sh - ph + r*dh, q*sw - pw + s*dw] @ W[:, :, r, s].T
//   da = the same of dz with W turned round and transposed, + add
//
// With a stride, every stride-th pixel of da in each direction is a convolution of its own, with every stride-th tap.
// a and dz are made from their recipes in cache, block by block (window.h); nine taps read them there. Reads M*C*s and
// the lines that neighbouring blocks share, writes M*K*s. 2*M*K*C*R*S operations.
#include "gradient_tensors.h"
#include "isa.h"
#include "moments.h"
#include "panels.h"
#include "primitives.h"
#include "window.h"

namespace resfuse {

// Pixels of a block, and columns of its product in cache at a time.
constexpr int64_t window_pixels = 512;
constexpr int64_t window_columns = 256;

// What a convolution reads: an activation, or a gradient.
template <class T>
struct Source {
  Activation<T> a;
  Gradient<T> g;  // if dout is there, instead of a

  RESFUSE_HD int64_t channels() const { return g.dout ? g.channels : a.z.channels; }

  template <class E>
  RESFUSE_HD void fill(int64_t row, int64_t count, E* out, int64_t stride) const {
    if (g.dout) {
      fill_gradient<E>(g, row, count, 0, g.channels, out, stride, nullptr);
    } else {
      fill_rows<E>(a, row, count, out, stride);
    }
  }
};

template <class T, class E>
struct WindowKernel {
  Blocks blocks;
  Source<T> source;
  const Panels<E>* weight;  // [taps, C, K]
  const Gradient<T>* add;   // or null
  Place place;
  T* out;
  Moments* moments;  // of this share, or null

  // Blocks begin .. end.
  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t outer = weight->columns(), stride = chunk_stride(source.channels());
    const int64_t product_stride = chunk_stride(std::min(window_columns, outer));
    const Buffer<E> pixels(blocks.source_pixels() * stride);
    const Buffer<float> product(blocks.pixels() * product_stride);
    const Buffer<int64_t> corners(blocks.pixels()), a_taps(blocks.w.taps()), b_taps(blocks.w.taps());
    const int64_t words = stride / word_elements<E>;
    for (int64_t i = 0; i < blocks.pixels(); ++i) corners[i] = blocks.corner(i) * words;
    for (int64_t t = 0; t < blocks.w.taps(); ++t) {
      const int64_t r = t / blocks.w.columns, s = t % blocks.w.columns;
      a_taps[t] = (r * blocks.w.dilation_h * blocks.w.line_pixels() + s * blocks.w.dilation_w) * words;
      b_taps[t] = t * weight->depth() * panel_columns;
    }
    const Taps taps{blocks.w.taps(), weight->depth(), a_taps, b_taps};
    for (int64_t index = begin; index < end; ++index) {
      const Block block = blocks.at(index);
      const int64_t first = blocks.first_row(block), count = blocks.row_count(block);
      fill_block<E>(blocks, block, static_cast<E*>(pixels), stride, Filler{&source, stride});
      for (int64_t c = 0; c < outer; c += window_columns) {
        const int64_t columns = std::min(window_columns, outer - c);
        multiply_taps<E>(count, columns, taps, pixels, 1, corners, weight->from(c), product, product_stride, false);
        write(first, count, c, columns, product, product_stride);
      }
      if (moments) moments->add(out + first * outer, count, outer);
    }
  }

  struct Filler {
    const Source<T>* source;
    int64_t stride;
    RESFUSE_HD void operator()(int64_t row, int64_t count, E* out) const { source->fill(row, count, out, stride); }
  };

  RESFUSE_HD void write(
      int64_t first, int64_t count, int64_t column, int64_t columns, const float* product, int64_t stride) const {
    T piece[window_columns];
    const int64_t width = blocks.w.out_width;
    int64_t line = first / width, q = first % width;
    for (int64_t r = 0; r < count; ++r) {
      const float* __restrict__ from = product + r * stride;
      const int64_t image = line / blocks.w.out_height, p = line % blocks.w.out_height;
      const int64_t row = (image * place.height + place.first_h + p * place.step_h) * place.width + place.first_w +
                          q * place.step_w;
      if (++q == width) q = 0, ++line;
      T* __restrict__ to = out + row * weight->columns() + column;
      if (add) {
        masked_row(*add, row, column, columns, piece);
        for (int64_t j = 0; j < columns; ++j) to[j] = store<T>(from[j] + load(piece[j]));
      } else {
        for (int64_t j = 0; j < columns; ++j) to[j] = store<T>(from[j]);
      }
    }
  }
};

template <class T, class E>
void run_window(
    const ConvWindow& window, const Source<T>& source, const Panels<E>& weight, const Gradient<T>* add,
    const Place& place, T* out, std::vector<Moments>* moments) {
  const int64_t threads = std::max<int64_t>(1, at::get_num_threads());
  const Blocks blocks(window, window_pixels, threads);
  const int64_t shares = std::max<int64_t>(1, std::min(threads, blocks.count()));
  if (moments) moments->assign(shares, Moments(weight.columns()));
  run_blocks(blocks, shares, [&](int64_t s) {
    return WindowKernel<T, E>{blocks, source, &weight, add, place, out, moments ? &(*moments)[s] : nullptr};
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> conv_window(
    const at::Tensor& x, const OptionalTensor& x_scale, const OptionalTensor& x_shift, bool x_relu,
    const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    int64_t out_height, int64_t out_width, bool want_stats) {
  check_view(x, "x");
  check_affine(x_scale, x_shift, "x_scale", "x_shift", x.size(1));
  check_same_dtype(weight, "weight", x);
  TORCH_CHECK(weight.dim() == 4 && weight.size(1) == x.size(1), "weight must have shape [K, ", x.size(1),
              ", R, S], not ", weight.sizes());
  const int64_t inner = x.size(1), outer = weight.size(0);
  const ConvWindow window =
      window_over(x, out_height, out_width, weight.sizes().slice(2), stride, padding, dilation);
  const at::Tensor z =
      uninitialized({x.size(0), outer, out_height, out_width}, x.options(), at::MemoryFormat::ChannelsLast);
  std::vector<Moments> moments;
  with_types(x, [&](auto stored, auto element) {
    using T = decltype(stored);
    using E = decltype(element);
    Panels<E> panels(inner, outer, window.taps());
    for (int64_t t = 0; t < window.taps(); ++t) {
      const T* tap = data_of<T>(weight) + t / window.columns * weight.stride(2) + t % window.columns * weight.stride(3);
      pack_tap(tap, panels, inner, weight.stride(1), weight.stride(0), t);
    }
    const Source<T> source{activation_of<T>(x, x_scale, x_shift, x_relu), Gradient<T>{}};
    const Place dense{out_height, out_width, 0, 0, 1, 1};
    run_window<T, E>(window, source, panels, nullptr, dense, mutable_data_of<T>(z), want_stats ? &moments : nullptr);
  });
  if (!want_stats) return {z, uninitialized({0}, at::kFloat), uninitialized({0}, at::kFloat)};
  auto [mean, var] = merged(moments);
  return {z, mean, var};
}

at::Tensor conv_window_dgrad(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const OptionalTensor& z, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& mean,
    const OptionalTensor& mean_dy, const OptionalTensor& slope, const at::Tensor& weight, int64_t height,
    int64_t width, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, const OptionalTensor& add,
    const OptionalTensor& add_mask, const OptionalTensor& add_row_scale, double add_factor) {
  const OptionalTensor none;
  const GradientTensors g{dout, mask, row_scale, factor, z, scale, shift, mean, mean_dy, slope};
  g.check();
  check_same_dtype(weight, "weight", dout);
  TORCH_CHECK(weight.dim() == 4 && weight.size(0) == dout.size(1), "weight must have shape [", dout.size(1),
              ", C, R, S], not ", weight.sizes());
  const int64_t outer = dout.size(1), inner = weight.size(1);
  const InputGradient gradient(weight, height, width, stride, padding, dilation);
  const at::Tensor da =
      uninitialized({dout.size(0), inner, height, width}, dout.options(), at::MemoryFormat::ChannelsLast);
  const GradientTensors beside{add ? *add : dout, add_mask, add_row_scale, add_factor, none, none, none, none, none,
                               none};
  if (add) {
    check_rows_beside(*add, "add", da, inner);
    beside.check();
  }
  with_types(dout, [&](auto stored, auto element) {
    using T = decltype(stored);
    using E = decltype(element);
    const Gradient<T> added = beside.arguments<T>();
    const Source<T> source{Activation<T>{}, g.arguments<T>()};
    gradient.each(dout, weight, [&](const ConvWindow& window, const Place& place, const auto& taps) {
      Panels<E> panels(outer, inner, window.taps());
      for (int64_t t = 0; t < window.taps(); ++t) {
        pack_tap(data_of<T>(weight) + taps(t), panels, outer, weight.stride(0), weight.stride(1), t);
      }
      run_window<T, E>(window, source, panels, add ? &added : nullptr, place, mutable_data_of<T>(da), nullptr);
    });
  });
  return da;
}

}  // namespace resfuse
