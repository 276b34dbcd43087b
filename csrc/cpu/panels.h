// Weights packed once a call into the panels that products read.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "isa.h"
#include "parallel.h"
#include "rows.h"

namespace resfuse {

// b [taps, depth, columns] as panels of 64 columns: words [columns/64][taps][depth words][64], zeros beyond the edges.
template <class E>
class Panels {
 public:
  Panels(int64_t depth, int64_t columns, int64_t taps = 1)
      : depth_(depth_words<E>(depth)), columns_(columns), taps_(taps),
        words_(taps * depth_ * round_up(columns, panel_columns)) {}

  int64_t depth() const { return depth_; }
  int64_t columns() const { return columns_; }
  Right from(int64_t column) const {
    return {words_ + column * taps_ * depth_, panel_columns * taps_ * depth_, panel_columns};
  }
  Word* panel(int64_t index, int64_t tap) { return words_ + (index * taps_ + tap) * panel_columns * depth_; }

 private:
  int64_t depth_;
  int64_t columns_;
  int64_t taps_;
  Buffer<Word> words_;
};

template <class E, class T>
struct PackKernel {
  const T* w;
  int64_t depth;
  int64_t columns;
  int64_t depth_stride;   // elements between neighbours along the depth
  int64_t column_stride;  // and along the columns
  int64_t tap;
  Panels<E>* panels;

  static constexpr int64_t step = word_elements<E>;

  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t words = depth_words<E>(depth);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * panel_columns, count = std::min(panel_columns, columns - first);
      Word* out = panels->panel(p, tap);
      for (int64_t j = words * panel_columns; j < panels->depth() * panel_columns; ++j) out[j] = 0;
      if (depth_stride == 1) {
        fill_transposed(w + first * column_stride, count, out);
      } else {
        fill(w + first * column_stride, count, out);
      }
      for (int64_t k = 0; k < words && count < panel_columns; ++k) {
        for (int64_t j = count; j < panel_columns; ++j) out[k * panel_columns + j] = 0;
      }
    }
  }

  // Line by line of the panel.
  RESFUSE_HD void fill(const T* from, int64_t count, Word* __restrict__ out) const {
    for (int64_t k = 0; k < depth; k += step, out += panel_columns) {
      const T* __restrict__ even = from + k * depth_stride;
      const T* __restrict__ odd = even + depth_stride;
      const bool whole = step == 2 && k + 1 < depth;
      for (int64_t j = 0; j < count; ++j) {
        const E second = whole ? element<E>(odd[j * column_stride]) : E{};
        out[j] = word_of<E>(element<E>(even[j * column_stride]), second);
      }
    }
  }

  // By blocks of 16 lines and columns, since the panel's columns lie far apart in w.
  RESFUSE_HD void fill_transposed(const T* from, int64_t count, Word* __restrict__ out) const {
    constexpr int64_t size = 16;
    const bool direct = sizeof(T) == sizeof(E) && column_stride % step == 0;
    const int64_t whole = depth / step;
    for (int64_t k = 0; k < whole; k += size) {
      const int64_t lines = std::min(size, whole - k);
      for (int64_t first = 0; first < count; first += size) {
        const T* block = from + first * column_stride + k * step;
        Word* to = out + k * panel_columns + first;
        if (direct && lines == size && count - first >= size) {
          transpose_words(block, column_stride / step, to, panel_columns);
          continue;
        }
        for (int64_t j = 0; j < std::min(size, count - first); ++j) {
          for (int64_t i = 0; i < lines; ++i) {
            const T* pair = block + j * column_stride + i * step;
            const E second = step == 2 ? element<E>(pair[step - 1]) : E{};
            to[i * panel_columns + j] = word_of<E>(element<E>(pair[0]), second);
          }
        }
      }
    }
    for (int64_t j = 0; j < count && whole * step < depth; ++j) {
      out[whole * panel_columns + j] = word_of<E>(element<E>(from[j * column_stride + depth - 1]), E{});
    }
  }
};

// One tap of b from w [depth, columns], zeros up to the panels' own depth. Neighbours in w along the depth and along
// the columns are so many elements apart.
template <class E, class T>
void pack_tap(
    const T* w, Panels<E>& panels, int64_t depth, int64_t depth_stride, int64_t column_stride, int64_t tap = 0) {
  const PackKernel<E, T> kernel{w, depth, panels.columns(), depth_stride, column_stride, tap, &panels};
  const int64_t count = (panels.columns() + panel_columns - 1) / panel_columns;
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { run_best(kernel, begin, end); });
}

// w [depth, columns], row-major.
template <class E, class T>
void pack(const T* w, Panels<E>& panels, int64_t depth) {
  pack_tap(w, panels, depth, panels.columns(), 1);
}

// The transpose of w [columns, depth], row-major.
template <class E, class T>
void pack_transposed(const T* w, Panels<E>& panels, int64_t depth) {
  pack_tap(w, panels, depth, 1, depth);
}

}  // namespace resfuse
