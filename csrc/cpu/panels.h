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

  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    constexpr int64_t step = word_elements<E>;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * panel_columns;
      const int64_t count = columns - first < panel_columns ? columns - first : panel_columns;
      Word* out = panels->panel(p, tap);
      for (int64_t j = depth_words<E>(depth) * panel_columns; j < panels->depth() * panel_columns; ++j) out[j] = 0;
      for (int64_t k = 0; k < depth; k += step, out += panel_columns) {
        const T* even = w + first * column_stride + k * depth_stride;
        // Both elements of a word lie side by side.
        if (step == 2 && sizeof(T) == sizeof(E) && depth_stride == 1 && k + 1 < depth) {
          for (int64_t j = 0; j < count; ++j) std::memcpy(out + j, even + j * column_stride, sizeof(Word));
          for (int64_t j = count; j < panel_columns; ++j) out[j] = 0;
          continue;
        }
        const T* odd = step == 2 && k + 1 < depth ? even + depth_stride : nullptr;
        for (int64_t j = 0; j < count; ++j) {
          const E second = odd ? element<E>(odd[j * column_stride]) : E{};
          out[j] = word_of<E>(element<E>(even[j * column_stride]), second);
        }
        for (int64_t j = count; j < panel_columns; ++j) out[j] = 0;
      }
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
