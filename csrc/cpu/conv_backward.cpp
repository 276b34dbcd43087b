// conv_backward: both gradients of a 1x1 convolution z = a @ W.T in one pass over the gradient of z:
//   da = dz @ W + add [M, C]     dW = dz.T @ a [K, C]
//
// dz [M, K] (gradient.h: BatchNorm's backward and ReLU's mask are its prologue), a [M, C] a tensor or recipe, W [K, C],
// add a gradient [M, C] of the same activation (the shortcut's) under its mask. Reads M*K*s (dout and z each) and M*C*s
// (a, add), writes M*C*s (da). 4*M*K*C operations. dW: float32 along a share's rows, shares added in order.
#include <torch/library.h>

#include "gradient_tensors.h"
#include "outer_product.h"
#include "panels.h"

namespace resfuse {

// Columns of a chunk's product that are in cache at a time.
constexpr int64_t backward_columns = 512;
static_assert(backward_columns <= gradient_columns);

template <class T, class E>
struct ConvBackwardKernel {
  Gradient<T> g;
  Activation<T> a;
  int64_t chunk;
  // The row products, of all channels; null in a pass of the sums alone, or if da is not wanted.
  const Panels<E>* weight;  // [K, C]
  const Gradient<T>* add;   // or null
  T* da;
  // The outer products of g's channels begin_channel .. end_channel, or null.
  OuterSum* outer;
  int64_t begin_channel;
  int64_t end_channel;

  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t inner = a.z.channels, columns = end_channel - begin_channel;
    const int64_t a_stride = chunk_stride(inner);
    const int64_t size = chunk_size(end - begin, chunk);
    const int64_t stride = chunk_stride(std::min(backward_columns, inner));
    const Buffer<E> g_panels(size * round_up(columns, panel_columns)), a_rows(outer ? size * a_stride : 0);
    const Buffer<Word> g_columns(outer && word_elements<E> == 2 ? column_words<E>(size, columns) : 0);
    const PanelTaps<E> taps(columns, size);
    const Buffer<Word> a_columns(outer ? column_words<E>(size, inner) : 0);
    const Buffer<float> product(weight ? chunk_rows * stride : 0);
    for (int64_t first = begin; first < end; first += size) {
      const int64_t count = std::min(size, end - first);
      fill_gradient_panels<E>(g, first, count, begin_channel, columns, static_cast<E*>(g_panels), nullptr);
      if (weight) {
        write_row_products(g_panels, taps, first, count, product, stride);
      }
      if (outer) {
        Ahead ahead;
        if (begin_channel == 0 && columns == g.channels) g.fetch(ahead, first + size, size, end);
        fill_rows<E>(a, first, count, static_cast<E*>(a_rows), a_stride);
        const auto g_part = panels_by_columns<E>(g_panels, count, columns, g_columns);
        const auto a_part = by_columns<E>(a_rows, count, round_up(inner, panel_columns), a_stride, a_columns);
        outer->add<E>(begin_channel, columns, g_part, a_part, first > begin, ahead);
      }
    }
  }

  RESFUSE_HD void write_row_products(
      const E* g_panels, const PanelTaps<E>& taps, int64_t first, int64_t count, float* product, int64_t stride) const {
    const int64_t inner = a.z.channels;
    const Taps panels = taps.at(count, g.channels);
    T piece[backward_columns];
    for (int64_t r = 0; r < count; r += chunk_rows) {
      const int64_t rows = std::min(chunk_rows, count - r);
      for (int64_t c = 0; c < inner; c += backward_columns) {
        const int64_t columns = std::min(backward_columns, inner - c);
        multiply_taps<E>(rows, columns, panels, g_panels, 1, taps.rows + r, weight->from(c), product, stride, false);
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t row = first + r + i;
          const float* __restrict__ from = product + i * stride;
          T* __restrict__ to = da + row * inner + c;
          if (add) {
            masked_row(*add, row, c, columns, piece);
            for (int64_t j = 0; j < columns; ++j) to[j] = store<T>(from[j] + load(piece[j]));
          } else {
            for (int64_t j = 0; j < columns; ++j) to[j] = store<T>(from[j]);
          }
        }
      }
    }
  }
};

std::tuple<at::Tensor, at::Tensor> conv_backward(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const OptionalTensor& z, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& mean,
    const OptionalTensor& mean_dy, const OptionalTensor& slope, const at::Tensor& x, const OptionalTensor& x_scale,
    const OptionalTensor& x_shift, bool x_relu, const at::Tensor& weight, const OptionalTensor& add,
    const OptionalTensor& add_mask, const OptionalTensor& add_row_scale, double add_factor, bool want_input,
    bool want_weight) {
  const OptionalTensor none;
  const GradientTensors g{dout, mask, row_scale, factor, z, scale, shift, mean, mean_dy, slope};
  g.check();
  const int64_t outer = dout.size(1), inner = x.dim() == 4 ? x.size(1) : 0, rows = row_count(dout);
  check_view_beside(x, "x", dout, inner);
  check_affine(x_scale, x_shift, "x_scale", "x_shift", inner);
  check_matrix(weight, "weight", dout.scalar_type(), outer, inner);
  const GradientTensors beside{add ? *add : dout, add_mask, add_row_scale, add_factor, none, none, none, none, none,
                               none};
  if (add) {
    check_rows_beside(*add, "add", x, inner);
    beside.check();
  }

  const at::Tensor da = want_input ? empty_rows(x, inner) : at::empty({0}, x.options());
  const OuterGrid grid(rows, outer, inner);
  const OuterSums sums = want_weight ? outer_sums(grid, rows, outer, inner) : OuterSums{};
  const bool once = grid.parts == 1 || !want_weight;
  with_types(dout, [&](auto stored, auto element) {
    using T = decltype(stored);
    using E = decltype(element);
    std::unique_ptr<Panels<E>> panels;
    if (want_input) {
      panels = std::make_unique<Panels<E>>(round_up(outer, panel_columns), inner);
      pack(data_of<T>(weight), *panels, outer);
    }
    const Gradient<T> added = beside.arguments<T>();
    const ConvBackwardKernel<T, E> whole{
        g.arguments<T>(), activation_of<T>(x, x_scale, x_shift, x_relu), grid.chunk, panels.get(),
        add ? &added : nullptr, want_input ? mutable_data_of<T>(da) : nullptr, nullptr, 0, outer};
    if (want_input || once) {
      for_shares(rows, once && want_weight ? grid.shares : grid.row_shares,
                 [&](int64_t share, int64_t begin, int64_t end) {
                   auto kernel = whole;
                   if (once && want_weight && begin < end) kernel.outer = sums[share].get();
                   run_best(kernel, begin, end);
                 });
    }
    if (!once) {
      for_grid(rows, grid.shares, grid.parts, [&](int64_t share, int64_t part, int64_t begin, int64_t end) {
        auto kernel = whole;
        kernel.weight = nullptr;
        kernel.outer = sums[share].get();
        std::tie(kernel.begin_channel, kernel.end_channel) = grid.channels(part, outer);
        run_best(kernel, begin, end);
      });
    }
  });
  return {da, want_weight ? merged(sums, outer, inner) : at::empty({0}, at::kFloat)};
}

TORCH_LIBRARY_IMPL(resfuse, CPU, m) {
  m.impl("conv_backward", &conv_backward);
}

}  // namespace resfuse
