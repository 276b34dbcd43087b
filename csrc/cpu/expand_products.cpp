// expand_products: what the backward pass of a product a @ W.T needs of its gradient g, in one pass over g:
//   P = g.T @ (a - mean) [K, C]     sum(g) [K]     u = g @ Wg [M, C] in storage dtype
//
// g [M, K] (gradient.h) and a [M, C] are made from their recipes in cache, Wg [K, C]. Reads M*K*s (g), its mask and
// M*C*s (a), writes M*C*s (u). 4*M*K*C operations. Floats are centred before the product; bfloat16 would be rounded by
// that, and its product is corrected, P - sum(g) mean.T. P: float32 along a share's rows, shares added in order.
#include <torch/library.h>

#include "gradient_tensors.h"
#include "outer_product.h"
#include "panels.h"

namespace resfuse {

template <class T, class E>
struct ExpandProductsKernel {
  Gradient<T> g;
  Activation<T> a;
  const float* mean;  // [C], to be subtracted from floats, or null
  int64_t chunk;
  // The row products and sum(g), of all channels; null in a pass of the sums alone.
  const Panels<E>* wg;  // [K, C] or null
  T* u;
  double* total;  // [K]
  // The outer products of g's channels begin_channel .. end_channel; null in a pass of the row products alone.
  OuterSum* outer;
  int64_t begin_channel;
  int64_t end_channel;

  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t inner = a.z.channels, columns = end_channel - begin_channel;
    const int64_t a_stride = chunk_stride(inner), size = chunk_size(end - begin, chunk);
    const Buffer<E> g_panels(size * round_up(columns, panel_columns)), a_rows(outer ? size * a_stride : 0);
    const Buffer<Word> g_columns(outer && word_elements<E> == 2 ? column_words<E>(size, columns) : 0);
    const PanelTaps<E> taps(columns, size);
    const Buffer<Word> a_columns(outer ? column_words<E>(size, inner) : 0);
    const Buffer<float> sum(round_up(columns, panel_columns)), product(wg ? chunk_rows * a_stride : 0);
    for (int64_t first = begin; first < end; first += size) {
      const int64_t count = std::min(size, end - first);
      if (total) {
        for (int64_t c = 0; c < columns; ++c) sum[c] = 0.0f;
      }
      fill_gradient_panels<E>(g, first, count, begin_channel, columns, static_cast<E*>(g_panels),
                              total ? static_cast<float*>(sum) : nullptr);
      if (total) {
        for (int64_t c = 0; c < columns; ++c) total[c] += sum[c];
      }
      Ahead ahead;
      if (begin_channel == 0 && columns == g.channels) g.fetch(ahead, first + size, size, end);
      if (outer) a.z.fetch(ahead, first + size, size, end);
      if (wg) write_row_products(g_panels, taps, first, count, product, a_stride);
      if (outer) {
        fill_rows<E>(a, first, count, static_cast<E*>(a_rows), a_stride);
        if constexpr (word_elements<E> == 1) {
          if (mean) subtract_mean(a_rows, count, a_stride);
        }
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
    for (int64_t r = 0; r < count; r += chunk_rows) {
      const int64_t rows = std::min(chunk_rows, count - r);
      multiply_taps<E>(rows, inner, panels, g_panels, 1, taps.rows + r, wg->from(0), product, stride, false);
      for (int64_t i = 0; i < rows; ++i) {
        const float* __restrict__ from = product + i * stride;
        T* __restrict__ to = u + (first + r + i) * inner;
        for (int64_t c = 0; c < inner; ++c) to[c] = store<T>(from[c]);
      }
    }
  }

  RESFUSE_HD void subtract_mean(E* rows, int64_t count, int64_t stride) const {
    for (int64_t r = 0; r < count; ++r) {
      E* __restrict__ row = rows + r * stride;
      for (int64_t c = 0; c < a.z.channels; ++c) row[c] -= mean[c];
    }
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> expand_products(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const at::Tensor& x, const OptionalTensor& x_scale, const OptionalTensor& x_shift, bool x_relu,
    const OptionalTensor& mean, const OptionalTensor& wg) {
  const OptionalTensor none;
  const GradientTensors g{dout, mask, row_scale, factor, none, none, none, none, none, none};
  g.check();
  const int64_t outer = dout.size(1), rows = row_count(dout), inner = x.dim() == 4 ? x.size(1) : 0;
  check_view_beside(x, "x", dout, inner);
  check_affine(x_scale, x_shift, "x_scale", "x_shift", inner);
  if (mean) check_vector(*mean, "mean", inner);
  if (wg) check_matrix(*wg, "wg", dout.scalar_type(), outer, inner);

  const at::Tensor u = wg ? empty_rows(x, inner) : at::empty({0}, x.options());
  const OuterGrid grid(rows, outer, inner);
  const OuterSums sums = outer_sums(grid, rows, outer, inner);
  const int64_t row_shares = grid.parts == 1 ? grid.shares : grid.row_shares;
  std::vector<std::vector<double>> totals(row_shares, std::vector<double>(outer, 0.0));
  const bool centred = with_types(dout, [&](auto stored, auto element) {
    using T = decltype(stored);
    using E = decltype(element);
    std::unique_ptr<Panels<E>> panels;
    if (wg) {
      panels = std::make_unique<Panels<E>>(round_up(outer, panel_columns), inner);
      pack(data_of<T>(*wg), *panels, outer);
    }
    const ExpandProductsKernel<T, E> whole{
        g.arguments<T>(), activation_of<T>(x, x_scale, x_shift, x_relu), vector_of(mean), grid.chunk, panels.get(),
        wg ? mutable_data_of<T>(u) : nullptr, nullptr, nullptr, 0, outer};
    for_shares(rows, row_shares, [&](int64_t share, int64_t begin, int64_t end) {
      auto kernel = whole;
      kernel.total = totals[share].data();
      if (grid.parts == 1 && begin < end) kernel.outer = sums[share].get();
      run_best(kernel, begin, end);
    });
    if (grid.parts > 1) {
      for_grid(rows, grid.shares, grid.parts, [&](int64_t share, int64_t part, int64_t begin, int64_t end) {
        auto kernel = whole;
        kernel.wg = nullptr;
        kernel.outer = sums[share].get();
        std::tie(kernel.begin_channel, kernel.end_channel) = grid.channels(part, outer);
        run_best(kernel, begin, end);
      });
    }
    return word_elements<E> == 1;
  });

  const at::Tensor total = at::empty({outer}, at::kFloat);
  float* t = total.mutable_data_ptr<float>();
  for (int64_t c = 0; c < outer; ++c) {
    double value = 0.0;
    for (const auto& share : totals) value += share[c];
    t[c] = static_cast<float>(value);
  }
  const bool correct = mean && !centred;
  const at::Tensor products =
      merged(sums, outer, inner, correct ? t : nullptr, correct ? vector_of(mean) : nullptr);
  return {products, total, u};
}

TORCH_LIBRARY_IMPL(resfuse, CPU, m) {
  m.impl("expand_products", &expand_products);
}

}  // namespace resfuse
