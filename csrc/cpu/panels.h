// Weights packed once a call into the panels that products read.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "isa.h"
#include "parallel.h"
#include "rows.h"

namespace resfuse {

// b [depth, columns] as panels of 64 columns: words [columns/64][depth words][64], zeros beyond the edges.
template <class E>
class Panels {
 public:
  Panels(int64_t depth, int64_t columns)
      : depth_(depth_words<E>(depth)), columns_(columns), words_(depth_ * round_up(columns, panel_columns)) {}

  int64_t depth() const { return depth_; }
  int64_t columns() const { return columns_; }
  Right from(int64_t column) const { return {words_ + column * depth_, panel_columns * depth_, panel_columns}; }
  Word* panel(int64_t index) { return words_ + index * panel_columns * depth_; }

 private:
  int64_t depth_;
  int64_t columns_;
  Buffer<Word> words_;
};

template <class E, class T>
struct PackKernel {
  const T* w;
  int64_t depth;
  int64_t columns;
  int64_t depth_stride;   // elements between neighbours along the depth
  int64_t column_stride;  // and along the columns
  Panels<E>* panels;

  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    constexpr int64_t step = word_elements<E>;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * panel_columns;
      const int64_t count = columns - first < panel_columns ? columns - first : panel_columns;
      Word* out = panels->panel(p);
      for (int64_t k = 0; k < depth; k += step, out += panel_columns) {
        const T* even = w + first * column_stride + k * depth_stride;
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

// w [depth, columns], row-major.
template <class E, class T>
void pack(const T* w, Panels<E>& panels, int64_t depth) {
  const PackKernel<E, T> kernel{w, depth, panels.columns(), panels.columns(), 1, &panels};
  const int64_t count = (panels.columns() + panel_columns - 1) / panel_columns;
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { run_best(kernel, begin, end); });
}

// The transpose of w [columns, depth], row-major.
template <class E, class T>
void pack_transposed(const T* w, Panels<E>& panels, int64_t depth) {
  const PackKernel<E, T> kernel{w, depth, panels.columns(), 1, depth, &panels};
  const int64_t count = (panels.columns() + panel_columns - 1) / panel_columns;
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { run_best(kernel, begin, end); });
}

}  // namespace resfuse
