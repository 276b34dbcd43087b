// The kernel of gradient_products.h, compiled once for both of its primitives.
#include "gradient_products.h"

#include <tuple>

#include "isa.h"
#include "parallel.h"

namespace resfuse {

namespace {

// Columns of `add` that are made at a time.
constexpr int64_t add_columns = 512;
static_assert(add_columns <= gradient_columns);
// Values of a chunk's row product that are in cache at a time.
constexpr int64_t product_values = chunk_rows * 512;

template <class T, class E>
struct GradientProductsKernel : GradientProducts<T, E> {
  using GradientProducts<T, E>::g, GradientProducts<T, E>::a, GradientProducts<T, E>::mean;
  using GradientProducts<T, E>::chunk, GradientProducts<T, E>::weight, GradientProducts<T, E>::add;
  using GradientProducts<T, E>::rows, GradientProducts<T, E>::total, GradientProducts<T, E>::outer;
  using GradientProducts<T, E>::begin_channel, GradientProducts<T, E>::end_channel;

  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t inner = a.z.channels, columns = end_channel - begin_channel;
    const int64_t size = chunk_size(end - begin, chunk);
    const int64_t group = std::min(outer_columns, round_up(inner, panel_columns));
    const Buffer<E> g_panels(size * round_up(columns, panel_columns));
    const Buffer<Word> g_columns(outer && word_elements<E> == 2 ? column_words<E>(size, columns) : 0);
    const Buffer<Word> a_columns(outer ? column_words<E>(size, group) : 0);
    const Buffer<float> sum(total ? columns : 0), product(weight ? piece_rows() * chunk_stride(inner) : 0);
    const PanelTaps<E> taps(columns, size);
    for (int64_t first = begin; first < end; first += size) {
      const int64_t count = std::min(size, end - first);
      for (int64_t c = 0; total && c < columns; ++c) sum[c] = 0.0f;
      fill_gradient_panels<E>(g, first, count, begin_channel, columns, static_cast<E*>(g_panels),
                              total ? static_cast<float*>(sum) : nullptr);
      for (int64_t c = 0; total && c < columns; ++c) total[c] += sum[c];
      if (weight) write_row_products(g_panels, taps, first, count, product, first + size, end);
      if (!outer) continue;
      const auto g_part = panels_by_columns<E>(g_panels, count, columns, g_columns);
      for (int64_t j = 0; j < inner; j += group) {
        const int64_t some = std::min(group, inner - j);
        fill_columns<E>(a, first, count, j, round_up(some, panel_columns), mean, a_columns);
        Ahead ahead;
        if (j + group < inner) {
          a.z.fetch(ahead, first, count, end, j + group, std::min(group, inner - j - group));
        } else {
          fetch_chunk(ahead, first + size, end);
        }
        const ByColumns a_part{a_columns, depth_words<E>(count)};
        ahead.spread(tile_words(columns, some, a_part.depth));
        outer->template add<E>(begin_channel, columns, j, some, g_part, a_part, first > begin, &ahead);
      }
    }
  }

  // Rows of a chunk whose products are made at a time.
  RESFUSE_HD int64_t piece_rows() const {
    const int64_t rows = product_values / std::max<int64_t>(1, a.z.channels) / row_unit * row_unit;
    return std::clamp(rows, row_unit, chunk_rows);
  }

  // What the chunk from row `first` on begins with.
  RESFUSE_HD void fetch_chunk(Ahead& ahead, int64_t first, int64_t end) const {
    if (first >= end) return;
    if (end_channel - begin_channel == g.channels) g.fetch(ahead, first, chunk, end);
    if (weight) fetch_rows(ahead, first, piece_rows(), end);
  }

  // What a piece of the row products meets in memory.
  RESFUSE_HD void fetch_rows(Ahead& ahead, int64_t first, int64_t count, int64_t end) const {
    if (add) add->fetch(ahead, first, count, end);
    ahead.add(rows + first * a.z.channels, std::min(count, end - first) * a.z.channels * int64_t{sizeof(T)});
  }

  // next: the chunk behind this one.
  RESFUSE_HD void write_row_products(
      const E* g_panels, const PanelTaps<E>& taps, int64_t first, int64_t count, float* product, int64_t next,
      int64_t end) const {
    const int64_t inner = a.z.channels, stride = chunk_stride(inner), piece = piece_rows();
    const Taps panels = taps.at(count, g.channels);
    for (int64_t r = 0; r < count; r += piece) {
      const int64_t some = std::min(piece, count - r);
      Ahead ahead;
      if (r + piece < count) {
        fetch_rows(ahead, first + r + piece, std::min(piece, count - r - piece), end);
      } else if (outer) {
        a.z.fetch(ahead, first, count, end, 0, std::min(outer_columns, inner));
      } else {
        fetch_chunk(ahead, next, end);
      }
      ahead.spread(tile_words(some, inner, depth_words<E>(g.channels)));
      multiply_taps<E>(some, inner, panels, g_panels, 1, taps.rows + r, weight->from(0), product, stride, false,
                       &ahead);
      for (int64_t i = 0; i < some; ++i) write_row(first + r + i, product + i * stride);
    }
  }

  RESFUSE_HD void write_row(int64_t row, const float* __restrict__ from) const {
    const int64_t inner = a.z.channels;
    T* __restrict__ to = rows + row * inner;
    if (!add) {
      for (int64_t j = 0; j < inner; ++j) to[j] = store<T>(from[j]);
      return;
    }
    T piece[add_columns];
    for (int64_t c = 0; c < inner; c += add_columns) {
      const int64_t columns = std::min(add_columns, inner - c);
      masked_row(*add, row, c, columns, piece);
      for (int64_t j = 0; j < columns; ++j) to[c + j] = store<T>(from[c + j] + load(piece[j]));
    }
  }
};

}  // namespace

template <class T, class E>
void run_gradient_products(
    const GradientProducts<T, E>& whole, int64_t rows, const OuterGrid& grid, OuterSums& sums,
    std::vector<std::vector<double>>* totals) {
  const bool once = grid.parts == 1 || sums.empty();
  for_shares(rows, grid.row_pass_shares(sums.empty()), [&](int64_t share, int64_t begin, int64_t end) {
    GradientProductsKernel<T, E> kernel{whole};
    if (totals) kernel.total = (*totals)[share].data();
    if (once && !sums.empty()) kernel.outer = sums[share];
    if (kernel.weight || kernel.total || kernel.outer) run_best(kernel, begin, end);
  });
  if (once) return;
  for_grid(rows, grid.shares, grid.parts, [&](int64_t share, int64_t part, int64_t begin, int64_t end) {
    GradientProductsKernel<T, E> kernel{whole};
    kernel.weight = nullptr;
    kernel.outer = sums[share];
    std::tie(kernel.begin_channel, kernel.end_channel) = grid.channels(part, whole.g.channels);
    run_best(kernel, begin, end);
  });
}

template void run_gradient_products(
    const GradientProducts<float, float>&, int64_t, const OuterGrid&, OuterSums&, std::vector<std::vector<double>>*);
template void run_gradient_products(
    const GradientProducts<bfloat16, float>&, int64_t, const OuterGrid&, OuterSums&, std::vector<std::vector<double>>*);
template void run_gradient_products(
    const GradientProducts<bfloat16, bfloat16>&, int64_t, const OuterGrid&, OuterSums&,
    std::vector<std::vector<double>>*);

}  // namespace resfuse
