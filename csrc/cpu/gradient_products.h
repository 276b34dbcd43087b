// Both products of a gradient dz [M, K] with one visit of it: by rows with a weight W [K, C], by columns with the
// activation a [M, C] that the weight met:
//   rows = dz @ W + add [M, C]     outer = dz.T @ (a - mean) [K, C]     total = sum(dz) [K]
//
// dz and a are made from their recipes in cache. 4*M*K*C operations. `conv_backward` and `expand_products` are this.
#pragma once

#include <memory>
#include <tuple>
#include <vector>

#include "gradient.h"
#include "outer_product.h"
#include "panels.h"

namespace resfuse {

// Columns of a chunk's row product that are in cache at a time.
constexpr int64_t product_columns = 512;
static_assert(product_columns <= gradient_columns);

template <class T, class E>
struct GradientProductsKernel {
  Gradient<T> g;
  Activation<T> a;
  const float* mean;  // [C] to be subtracted from floats, or null
  int64_t chunk;      // rows at a time
  // The row products, of all channels; null in a pass of the sums alone, or if they are not wanted.
  const Panels<E>* weight;  // [K, C]
  const Gradient<T>* add;   // [M, C] or null
  T* rows;
  double* total = nullptr;  // of this share, or null
  // The outer products of g's channels begin_channel .. end_channel, or null.
  OuterSum* outer = nullptr;
  int64_t begin_channel = 0;
  int64_t end_channel = g.channels;

  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t inner = a.z.channels, columns = end_channel - begin_channel;
    const int64_t a_stride = chunk_stride(inner), size = chunk_size(end - begin, chunk);
    const int64_t stride = chunk_stride(std::min(product_columns, inner));
    const Buffer<E> g_panels(size * round_up(columns, panel_columns)), a_rows(outer ? size * a_stride : 0);
    const Buffer<Word> g_columns(outer && word_elements<E> == 2 ? column_words<E>(size, columns) : 0);
    const Buffer<Word> a_columns(outer ? column_words<E>(size, inner) : 0);
    const Buffer<float> sum(total ? columns : 0), product(weight ? chunk_rows * stride : 0);
    const PanelTaps<E> taps(columns, size);
    for (int64_t first = begin; first < end; first += size) {
      const int64_t count = std::min(size, end - first);
      for (int64_t c = 0; total && c < columns; ++c) sum[c] = 0.0f;
      fill_gradient_panels<E>(g, first, count, begin_channel, columns, static_cast<E*>(g_panels),
                              total ? static_cast<float*>(sum) : nullptr);
      for (int64_t c = 0; total && c < columns; ++c) total[c] += sum[c];
      Ahead ahead = next(first + size, size, end);
      ahead.spread((weight ? tile_words(count, inner, depth_words<E>(g.channels)) : 0) +
                   (outer ? tile_words(columns, inner, depth_words<E>(count)) : 0));
      if (weight) write_row_products(g_panels, taps, first, count, product, stride, ahead);
      if (outer) {
        fill_rows<E>(a, first, count, static_cast<E*>(a_rows), a_stride);
        if constexpr (word_elements<E> == 1) {
          if (mean) subtract_mean(a_rows, count, a_stride);
        }
        const auto g_part = panels_by_columns<E>(g_panels, count, columns, g_columns);
        const auto a_part = by_columns<E>(a_rows, count, round_up(inner, panel_columns), a_stride, a_columns);
        outer->add<E>(begin_channel, columns, g_part, a_part, first > begin, &ahead);
      }
    }
  }

  // What the chunk from row `first` on needs, at most `count` rows.
  RESFUSE_HD Ahead next(int64_t first, int64_t count, int64_t end) const {
    Ahead ahead;
    if (first >= end) return ahead;
    g.fetch(ahead, first, count, end);
    if (weight && add) add->fetch(ahead, first, count, end);
    if (weight) {
      ahead.add(rows + first * a.z.channels, std::min(count, end - first) * a.z.channels * int64_t{sizeof(T)});
    }
    if (outer) a.z.fetch(ahead, first, count, end);
    return ahead;
  }

  RESFUSE_HD void write_row_products(
      const E* g_panels, const PanelTaps<E>& taps, int64_t first, int64_t count, float* product, int64_t stride,
      Ahead& ahead) const {
    const int64_t inner = a.z.channels;
    const Taps panels = taps.at(count, g.channels);
    T piece[product_columns];
    for (int64_t r = 0; r < count; r += chunk_rows) {
      const int64_t some = std::min(chunk_rows, count - r);
      for (int64_t c = 0; c < inner; c += product_columns) {
        const int64_t columns = std::min(product_columns, inner - c);
        multiply_taps<E>(some, columns, panels, g_panels, 1, taps.rows + r, weight->from(c), product, stride, false,
                         &ahead);
        for (int64_t i = 0; i < some; ++i) {
          const int64_t row = first + r + i;
          const float* __restrict__ from = product + i * stride;
          T* __restrict__ to = rows + row * inner + c;
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

  RESFUSE_HD void subtract_mean(E* chunk_begin, int64_t count, int64_t stride) const {
    for (int64_t r = 0; r < count; ++r) {
      E* __restrict__ row = chunk_begin + r * stride;
      for (int64_t c = 0; c < a.z.channels; ++c) row[c] -= mean[c];
    }
  }
};

// Runs the kernel over a grid: in one pass, or the row products and totals first and the sums second (`OuterGrid`).
// sums: one a share, none if they are not wanted; totals: one for each share of the row pass, or null.
template <class T, class E>
void run_gradient_products(
    const GradientProductsKernel<T, E>& whole, int64_t rows, const OuterGrid& grid, const OuterSums& sums,
    std::vector<std::vector<double>>* totals) {
  const bool once = grid.parts == 1 || sums.empty();
  for_shares(rows, grid.row_pass_shares(sums.empty()), [&](int64_t share, int64_t begin, int64_t end) {
    auto kernel = whole;
    if (totals) kernel.total = (*totals)[share].data();
    if (once && !sums.empty()) kernel.outer = sums[share].get();
    if (kernel.weight || kernel.total || kernel.outer) run_best(kernel, begin, end);
  });
  if (once) return;
  for_grid(rows, grid.shares, grid.parts, [&](int64_t share, int64_t part, int64_t begin, int64_t end) {
    auto kernel = whole;
    kernel.weight = nullptr;
    kernel.outer = sums[share].get();
    std::tie(kernel.begin_channel, kernel.end_channel) = grid.channels(part, whole.g.channels);
    run_best(kernel, begin, end);
  });
}

}  // namespace resfuse
