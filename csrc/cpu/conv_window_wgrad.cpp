// conv_window_wgrad: the weight gradient of a convolution with a window,
//   dW[k, :, r, s] = sum over pixels (n, p, q) of dz[n, p, q, k] * a[n, p*sh - ph + r*dh, q*sw - pw + s*dw, :]
//
// a and dz are made from their recipes in cache, block by block (window.h). The pixels of an image are a piece of the
// depth. Each column of the window has a copy of a's pixels as it sees them, whose lines serve all its rows. Reads
// M*C*s and M*K*s, 2*M*K*C*R*S operations. Float32 along a share's pixels, shares in order.
#include "gradient_tensors.h"
#include "outer_product.h"
#include "primitives.h"
#include "window.h"

namespace resfuse {

// Words of depth in a block.
constexpr int64_t wgrad_depth = 256;

template <class T, class E>
struct WindowWgradKernel {
  Blocks blocks;
  Activation<T> a;
  Gradient<T> g;
  int64_t begin_channel;  // of g; a multiple of 64
  int64_t end_channel;
  OuterSum* sums;  // [K * taps, C]

  static constexpr int64_t step = word_elements<E>;

  // Where the words of 64 channels of a are: [copies][images][image words][64]. Lines of a copy lie close together, so
  // that the window's row r begins r * dilation lines further on. That fails with a stride between lines, and where the
  // lines' last pixels would pair with those of another line than dz's: then each row has copies of its own.
  struct Copies {
    bool of_rows;
    int64_t lines;        // of an image
    int64_t image_words;  // of an image

    explicit Copies(const Blocks& b)
        : of_rows(b.w.stride_h > 1 || b.w.out_width % step != 0), lines(of_rows ? b.lines : b.source_lines),
          image_words(depth_words<E>(lines * b.w.out_width)) {}

    RESFUSE_HD int64_t count(const ConvWindow& w) const { return w.columns * (of_rows ? w.rows : 1); }
    // The words of row r and column s, for the first image of `images`.
    RESFUSE_HD int64_t words(const ConvWindow& w, int64_t images, int64_t r, int64_t s) const {
      const int64_t copy = of_rows ? r * w.columns + s : s;
      const int64_t pixels = of_rows ? 0 : r * w.dilation_h * w.out_width;
      return (copy * images * image_words + pixels / step) * panel_columns;
    }
  };

  // Blocks begin .. end.
  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    const ConvWindow& w = blocks.w;
    const int64_t inner = a.z.channels, outer = end_channel - begin_channel;
    const int64_t a_stride = chunk_stride(inner), g_stride = chunk_stride(outer);
    const Copies copies(blocks);
    const int64_t most_words = depth_words<E>(blocks.lines * w.out_width);  // of dz, of an image
    const Buffer<E> a_pixels(blocks.source_pixels() * a_stride), g_pixels(blocks.lines * w.out_width * g_stride);
    const Buffer<Word> a_words(copies.count(w) * blocks.images * copies.image_words * panel_columns);
    const Buffer<Word> g_words(blocks.images * most_words * round_up(outer, panel_columns));
    const Buffer<int64_t> channels(panel_columns), g_taps(blocks.images), a_taps(blocks.images);
    for (int64_t i = 0; i < panel_columns; ++i) channels[i] = i;
    for (int64_t index = begin; index < end; ++index) {
      const Block block = blocks.at(index);
      const int64_t pixels = block.lines * w.out_width, words = depth_words<E>(pixels);
      const int64_t image = words * round_up(outer, panel_columns);
      for (int64_t i = 0; i < block.images; ++i) {
        g_taps[i] = i * image;
        fill_gradient<E>(g, blocks.first_row(block) + i * pixels, pixels, begin_channel, outer,
                         static_cast<E*>(g_pixels), g_stride, nullptr);
        transpose_chunk<E>(g_pixels, pixels, round_up(outer, panel_columns), g_stride, g_words + i * image);
      }
      fill_block<E>(blocks, block, static_cast<E*>(a_pixels), a_stride, Filler{&a, a_stride});
      for (int64_t column = 0; column < inner; column += panel_columns) {
        arrange(block, copies, a_pixels + column, a_stride, a_words);
        for (int64_t t = 0; t < w.taps(); ++t) {
          const int64_t from = copies.words(w, block.images, t / w.columns, t % w.columns);
          for (int64_t i = 0; i < block.images; ++i) a_taps[i] = from + i * copies.image_words * panel_columns;
          for (int64_t i = 0; i < outer; i += panel_columns) {
            multiply_taps<E>(std::min(panel_columns, outer - i), std::min(panel_columns, inner - column),
                             Taps{block.images, words, g_taps, a_taps}, g_words + i * words, panel_columns, channels,
                             Right{a_words, 0, panel_columns}, sums->row((begin_channel + i) * w.taps() + t) + column,
                             w.taps() * sums->stride(), index > begin);
          }
        }
      }
    }
  }

  struct Filler {
    const Activation<T>* a;
    int64_t stride;
    RESFUSE_HD void operator()(int64_t row, int64_t count, E* out) const {
      fill_rows<E>(*a, row, count, out, stride);
    }
  };

  // The copies of 64 channels of a block's pixels: of bfloat16, words of two neighbours, an odd last one with 0.
  RESFUSE_HD void arrange(
      const Block& block, const Copies& copies, const E* pixels, int64_t stride, Word* out) const {
    const ConvWindow& w = blocks.w;
    const int64_t line = w.stride_h * w.line_pixels() * stride, pixel = w.stride_w * stride;
    for (int64_t copy = 0; copy < copies.count(w); ++copy) {
      const int64_t first = copy / w.columns * w.dilation_h * w.line_pixels() + copy % w.columns * w.dilation_w;
      for (int64_t n = 0; n < block.images; ++n) {
        const E* from = pixels + (n * blocks.source_lines * w.line_pixels() + first) * stride;
        int64_t p = 0, q = 0;
        for (int64_t i = 0; i < copies.image_words; ++i, out += panel_columns) {
          const E* __restrict__ even = from + p * line + q * pixel;
          if (++q == w.out_width) ++p, q = 0;
          Word* __restrict__ o = out;
          if (step == 2 && p < copies.lines) {
            const E* __restrict__ odd = from + p * line + q * pixel;
            if (++q == w.out_width) ++p, q = 0;
            for (int64_t c = 0; c < panel_columns; ++c) o[c] = word_of(even[c], odd[c]);
          } else {
            for (int64_t c = 0; c < panel_columns; ++c) o[c] = word_of(even[c], E{});
          }
        }
      }
    }
  }
};

at::Tensor conv_window_wgrad(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const OptionalTensor& z, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& mean,
    const OptionalTensor& mean_dy, const OptionalTensor& slope, const at::Tensor& x, const OptionalTensor& x_scale,
    const OptionalTensor& x_shift, bool x_relu, at::IntArrayRef size, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation) {
  const GradientTensors g{dout, mask, row_scale, factor, z, scale, shift, mean, mean_dy, slope};
  g.check();
  check_view(x, "x");
  check_same_dtype(x, "x", dout);
  TORCH_CHECK(x.size(0) == dout.size(0), "x must hold ", dout.size(0), " images, not ", x.size(0));
  check_affine(x_scale, x_shift, "x_scale", "x_shift", x.size(1));
  const int64_t outer = dout.size(1), inner = x.size(1);
  const ConvWindow window = window_over(x, dout.size(2), dout.size(3), size, stride, padding, dilation);
  const int64_t panels = (outer + panel_columns - 1) / panel_columns;
  at::Tensor total;
  with_types(dout, [&](auto stored, auto element) {
    using T = decltype(stored);
    using E = decltype(element);
    // Threads divide g's channels first: their sums are then disjoint.
    const int64_t threads = std::max<int64_t>(1, at::get_num_threads());
    const int64_t parts = std::min(panels, threads);
    const Blocks blocks(window, wgrad_depth * word_elements<E>, std::max<int64_t>(1, threads / parts));
    const int64_t bytes = outer * window.taps() * chunk_stride(inner) * static_cast<int64_t>(sizeof(float));
    const int64_t most = std::max<int64_t>(1, outer_bytes / std::max<int64_t>(1, bytes));
    const int64_t shares = std::max<int64_t>(1, std::min({threads / parts, most, blocks.count()}));
    OuterSums sums(row_count(dout) > 0 ? shares : 0, outer * window.taps(), inner);
    if (!sums.empty()) {
      at::parallel_for(0, shares * parts, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          const int64_t s = i / parts, part = i % parts;
          run_best(
              WindowWgradKernel<T, E>{blocks, activation_of<T>(x, x_scale, x_shift, x_relu), g.arguments<T>(),
                                      panels * part / parts * panel_columns,
                                      std::min(outer, panels * (part + 1) / parts * panel_columns), sums[s]},
              blocks.count() * s / shares, blocks.count() * (s + 1) / shares);
        }
      });
    }
    total = sums.merged();
  });
  return total.view({outer, window.rows, window.columns, inner}).permute({0, 3, 1, 2});
}

}  // namespace resfuse
