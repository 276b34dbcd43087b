// conv_window_wgrad: the weight gradient of a convolution with a window,
//   dW[k, :, r, s] = sum over pixels (n, p, q) of dz[n, p, q, k] * a[n, p*sh - ph + r*dh, q*sw - pw + s*dw, :]
//
// a and dz are made from their recipes in cache, block by block (window.h). A line of pixels is a piece of the depth;
// taps read the same lines of a at other places. bfloat16 pairs neighbouring pixels, so that each column of the window
// has a copy of its own. Reads M*C*s and M*K*s, 2*M*K*C*R*S operations. Float32 along a share's pixels, shares in
// order.
#include <torch/library.h>

#include "gradient_tensors.h"
#include "outer_product.h"
#include "window.h"

namespace resfuse {

// Words of depth in a block.
constexpr int64_t wgrad_depth = 264;

template <class T, class E>
struct WindowWgradKernel {
  Blocks blocks;
  Activation<T> a;
  Gradient<T> g;
  int64_t begin_channel;  // of g; a multiple of 64
  int64_t end_channel;
  OuterSum* sums;  // [K * taps, C]

  static constexpr int64_t step = word_elements<E>;

  // Where the words of a are: [panels][copies][source lines][line words][64].
  struct Layout {
    int64_t copies, lines, line_words, depth_stride;
    RESFUSE_HD int64_t panel() const { return copies * lines * line_words * panel_columns; }
  };

  RESFUSE_HD Layout layout() const {
    const ConvWindow& w = blocks.w;
    const int64_t lines = blocks.images * blocks.source_lines;
    if constexpr (step == 1) return {1, lines, w.line_pixels(), w.stride_w * panel_columns};
    return {w.columns, lines, (w.out_width + 1) / 2, panel_columns};
  }

  // Blocks begin .. end.
  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    const ConvWindow& w = blocks.w;
    const int64_t inner = a.z.channels, outer = end_channel - begin_channel, lines = blocks.images * blocks.lines;
    const int64_t a_stride = chunk_stride(inner), g_stride = chunk_stride(outer);
    const int64_t a_panels = round_up(inner, panel_columns) / panel_columns;
    const int64_t g_panels = round_up(outer, panel_columns) / panel_columns;
    const int64_t line_words = (w.out_width + step - 1) / step;
    const Layout right = layout();
    const Buffer<E> a_pixels(blocks.source_pixels() * a_stride), g_line(w.out_width * g_stride);
    const Buffer<Word> a_words(a_panels * right.panel());
    const Buffer<Word> g_words(g_panels * lines * line_words * panel_columns);
    const Buffer<int64_t> rows(panel_columns), g_taps(lines), a_taps(lines);
    for (int64_t i = 0; i < panel_columns; ++i) rows[i] = i;
    for (int64_t i = 0; i < lines; ++i) g_taps[i] = i * line_words * panel_columns;
    for (int64_t index = begin; index < end; ++index) {
      const Block block = blocks.at(index);
      fill_block<E>(blocks, block, static_cast<E*>(a_pixels), a_stride, Filler{&a, a_stride});
      for (int64_t p = 0; p < a_panels; ++p) arrange(a_pixels, a_stride, p, right, a_words + p * right.panel());
      const int64_t used = block.images * block.lines;
      for (int64_t i = 0; i < used; ++i) {
        fill_gradient<E>(g, blocks.first_row(block) + i * w.out_width, w.out_width, begin_channel, outer,
                         static_cast<E*>(g_line), g_stride, nullptr);
        for (int64_t p = 0; p < g_panels; ++p) {
          transpose_chunk(g_line + p * panel_columns, w.out_width, panel_columns, g_stride,
                          g_words + (p * lines + i) * line_words * panel_columns);
        }
      }
      for (int64_t t = 0; t < w.taps(); ++t) {
        const int64_t r = t / w.columns, s = t % w.columns;
        for (int64_t i = 0; i < used; ++i) {
          const int64_t line = i / block.lines * blocks.source_lines + i % block.lines * w.stride_h + r * w.dilation_h;
          a_taps[i] = step == 1 ? (line * right.line_words + s * w.dilation_w) * panel_columns
                                : (s * right.lines + line) * right.line_words * panel_columns;
        }
        add_tap(t, outer, g_words, lines * line_words * panel_columns, rows, a_words, right,
                Taps{used, line_words, g_taps, a_taps}, index > begin);
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

  // 64 channels of the block's pixels as words: of bfloat16, pixels q and q + 1 as the window's column s sees them.
  RESFUSE_HD void arrange(const E* pixels, int64_t stride, int64_t panel, const Layout& to, Word* out) const {
    const ConvWindow& w = blocks.w;
    for (int64_t copy = 0; copy < to.copies; ++copy) {
      for (int64_t line = 0; line < to.lines; ++line) {
        const E* from = pixels + line * w.line_pixels() * stride + panel * panel_columns;
        for (int64_t i = 0; i < to.line_words; ++i, out += panel_columns) {
          const int64_t first = step == 1 ? i : 2 * i * w.stride_w + copy * w.dilation_w;
          const E* __restrict__ even = from + first * stride;
          const E* __restrict__ odd = even + w.stride_w * stride;
          Word* __restrict__ o = out;
          if (step == 2 && 2 * i + 1 < w.out_width) {
            for (int64_t c = 0; c < panel_columns; ++c) o[c] = word_of(even[c], odd[c]);
          } else {
            for (int64_t c = 0; c < panel_columns; ++c) o[c] = word_of(even[c], E{});
          }
        }
      }
    }
  }

  RESFUSE_HD void add_tap(
      int64_t tap, int64_t outer, const Word* g_words, int64_t g_panel, const int64_t* rows, const Word* a_words,
      const Layout& right, const Taps& taps, bool accumulate) const {
    const int64_t inner = a.z.channels, count = blocks.w.taps();
    for (int64_t j = 0; j < inner; j += outer_columns) {
      const Right b{a_words + j / panel_columns * right.panel(), right.panel(), right.depth_stride};
      for (int64_t i = 0; i < outer; i += panel_columns) {
        multiply_taps<E>(std::min(panel_columns, outer - i), std::min(outer_columns, inner - j), taps,
                         g_words + i / panel_columns * g_panel, panel_columns, rows, b,
                         sums->row((begin_channel + i) * count + tap) + j, count * sums->stride(), accumulate);
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
  const ConvWindow window{x.size(0), x.size(2),  x.size(3),  dout.size(2), dout.size(3), size[0],    size[1],
                          stride[0], stride[1], padding[0], padding[1],   dilation[0],  dilation[1]};
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
    OuterSums sums(row_count(dout) > 0 ? shares : 0);
    for (auto& sum : sums) sum = std::make_unique<OuterSum>(outer * window.taps(), inner);
    if (!sums.empty()) {
      at::parallel_for(0, shares * parts, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          const int64_t s = i / parts, part = i % parts;
          run_best(
              WindowWgradKernel<T, E>{blocks, activation_of<T>(x, x_scale, x_shift, x_relu), g.arguments<T>(),
                                      panels * part / parts * panel_columns,
                                      std::min(outer, panels * (part + 1) / parts * panel_columns), sums[s].get()},
              blocks.count() * s / shares, blocks.count() * (s + 1) / shares);
        }
      });
    }
    total = merged(sums, outer * window.taps(), inner);
  });
  return total.view({outer, window.rows, window.columns, inner}).permute({0, 3, 1, 2});
}

TORCH_LIBRARY_IMPL(resfuse, CPU, m) {
  m.impl("conv_window_wgrad", &conv_window_wgrad);
}

}  // namespace resfuse
