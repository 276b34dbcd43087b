// Activations as matrices [M, C]: where their rows lie, and copies of a few of them as the products read them.
#pragma once

#include <cstdint>

#include "../common/scalar.h"
#include "../common/storage.h"
#include "parallel.h"
#include "product.h"

namespace resfuse {

// The pixels of a tensor [N, C, H, W] whose channels lie side by side: dense channels_last, or every s-th pixel of one.
template <class T>
struct Rows {
  const T* data;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t stride_n;
  int64_t stride_h;
  int64_t stride_w;
  bool dense;

  // Rows first .. end, at most `count` of them, are read soon; of them, `columns` channels from `column` on.
  RESFUSE_HD void fetch(
      Ahead& ahead, int64_t first, int64_t count, int64_t end, int64_t column, int64_t columns) const {
    constexpr int64_t size = sizeof(T);
    if (dense && data && first < end) {
      ahead.add(row(first) + column, columns * size, std::min(count, end - first), channels * size);
    }
  }
  RESFUSE_HD void fetch(Ahead& ahead, int64_t first, int64_t count, int64_t end) const {
    constexpr int64_t size = sizeof(T);
    if (dense && data && first < end) ahead.add(row(first), std::min(count, end - first) * channels * size);
  }

  RESFUSE_HD const T* row(int64_t m) const {
    if (dense) return data + m * channels;
    const int64_t line = m / width;
    return data + line / height * stride_n + line % height * stride_h + m % width * stride_w;
  }
};

// An activation: the rows themselves, or act(scale * z + shift) of them, rounded to storage.
template <class T>
struct Activation {
  Rows<T> z;
  const float* scale;  // [C], null for the rows themselves
  const float* shift;  // [C]
  float bound;

  bool is_norm() const { return scale != nullptr; }
};

template <class T>
RESFUSE_HD T normalised(T z, float scale, float shift, float bound) {
  return store<T>(clamp_below(affine(load(z), scale, shift), bound));
}

// Whether relu(scale * z + shift), as it was stored, lets a gradient pass.
template <class T>
RESFUSE_HD bool passes_relu(T z, float scale, float shift) {
  return passes_gradient(load(store<T>(affine(load(z), scale, shift))));
}

// A stored value as an element of a product.
template <class E, class T>
RESFUSE_HD E element(T stored) {
  if constexpr (sizeof(E) == sizeof(T)) {
    return stored;
  } else {
    return load(stored);
  }
}

template <class E>
RESFUSE_HD Word word_of(E first, E second) {
  if constexpr (word_elements<E> == 1) {
    return float_bits(first);
  } else {
    return static_cast<Word>(first) | static_cast<Word>(second) << 16;
  }
}

// Elements between two rows of a chunk in cache: whole panels, and not a power of two, which would share cache sets.
constexpr int64_t chunk_stride(int64_t channels) {
  return round_up(channels, panel_columns) + 16;
}

// `count` rows from `first` on into out [count, stride], the channels beyond C zero up to whole panels.
template <class E, class T>
RESFUSE_HD void fill_rows(const Activation<T>& a, int64_t first, int64_t count, E* out, int64_t stride) {
  const int64_t channels = a.z.channels, padded = round_up(channels, panel_columns);
  const float* __restrict__ scale = a.scale;
  const float* __restrict__ shift = a.shift;
  for (int64_t r = 0; r < count; ++r) {
    const T* __restrict__ z = a.z.row(first + r);
    E* __restrict__ o = out + r * stride;
    if (scale == nullptr) {
      for (int64_t c = 0; c < channels; ++c) o[c] = element<E>(z[c]);
    } else {
      for (int64_t c = 0; c < channels; ++c) o[c] = element<E>(normalised(z[c], scale[c], shift[c], a.bound));
    }
    for (int64_t c = channels; c < padded; ++c) o[c] = E{};
  }
}

// n <= 64 channels of a row z from `column` on, zero beyond. mean: [C], subtracted from floats, or null.
template <class E, class T>
RESFUSE_HD void fill_piece(
    const Activation<T>& a, const T* __restrict__ z, int64_t column, int64_t n, const float* __restrict__ mean,
    E* __restrict__ out) {
  const T* __restrict__ from = z + column;
  if (a.scale == nullptr) {
    for (int64_t c = 0; c < n; ++c) out[c] = element<E>(from[c]);
  } else {
    const float* __restrict__ scale = a.scale + column;
    const float* __restrict__ shift = a.shift + column;
    for (int64_t c = 0; c < n; ++c) out[c] = element<E>(normalised(from[c], scale[c], shift[c], a.bound));
  }
  if constexpr (word_elements<E> == 1) {
    for (int64_t c = 0; c < n && mean; ++c) out[c] -= mean[column + c];
  }
  for (int64_t c = n; c < panel_columns; ++c) out[c] = E{};
}

// `count` rows from `first` on, `columns` channels from `column` on (whole panels; zero beyond C), as the depth of a
// product: panels [columns / 64][depth][64] of words, rows r and r + 1 of bfloat16 together, an odd last row with 0.
template <class E, class T>
RESFUSE_HD void fill_columns(
    const Activation<T>& a, int64_t first, int64_t count, int64_t column, int64_t columns, const float* mean,
    Word* out) {
  constexpr int64_t step = word_elements<E>;
  const int64_t panel = (count + step - 1) / step * panel_columns;
  E even[panel_columns], odd[panel_columns] = {};
  for (int64_t r = 0; r < count; r += step, out += panel_columns) {
    const bool two = step == 2 && r + 1 < count;
    const T* z = a.z.row(first + r);
    const T* next = two ? a.z.row(first + r + 1) : z;
    for (int64_t c = 0; c < columns; c += panel_columns) {
      const int64_t n = a.z.channels - column - c;
      if (n >= panel_columns) {  // a count that the compiler knows
        fill_piece<E>(a, z, column + c, panel_columns, mean, even);
        if (two) fill_piece<E>(a, next, column + c, panel_columns, mean, odd);
      } else {
        fill_piece<E>(a, z, column + c, n, mean, even);
        if (two) fill_piece<E>(a, next, column + c, n, mean, odd);
      }
      if (step == 2 && !two) {
        for (int64_t i = 0; i < panel_columns; ++i) odd[i] = E{};
      }
      Word* __restrict__ o = out + c / panel_columns * panel;
      for (int64_t i = 0; i < panel_columns; ++i) o[i] = word_of(even[i], odd[i]);
    }
  }
}

// The rows of a chunk as the depth of a product, in panels [columns / 64][depth][64] of words: a float each, or rows r
// and r + 1 of bfloat16, an odd last row with 0. Panels lie close together, where a chunk's columns are pages apart.
template <class E>
RESFUSE_HD void transpose_chunk(const E* rows, int64_t count, int64_t columns, int64_t stride, Word* out) {
  constexpr int64_t step = word_elements<E>;
  const int64_t depth = (count + step - 1) / step;
  for (int64_t first = 0; first < columns; first += panel_columns) {
    Word* __restrict__ o = out + first * depth;
    for (int64_t r = 0; r < count; r += step, o += panel_columns) {
      const E* __restrict__ even = rows + r * stride + first;
      const E* __restrict__ odd = even + stride;
      if (step == 2 && r + 1 < count) {
        for (int64_t c = 0; c < panel_columns; ++c) o[c] = word_of(even[c], odd[c]);
      } else {
        for (int64_t c = 0; c < panel_columns; ++c) o[c] = word_of(even[c], E{});
      }
    }
  }
}

// Whether the rows can be a left operand where they are.
template <class E, class T>
bool readable_in_place(const Activation<T>& a) {
  return sizeof(E) == sizeof(T) && !a.is_norm() && a.z.dense && a.z.channels % word_elements<E> == 0;
}

// Words of depth that `count` elements fill.
template <class E>
RESFUSE_HD int64_t depth_words(int64_t count) {
  return (count + word_elements<E> - 1) / word_elements<E>;
}

// A chunk [count, stride] as the left operand: its channels are the depth.
template <class E>
RESFUSE_HD Left by_rows(const E* chunk, int64_t stride) {
  return {chunk, stride / word_elements<E>, 1};
}

// A chunk as an operand whose rows are the depth.
struct ByColumns {
  const Word* words;
  int64_t depth;

  // 64 columns from `column`, a multiple of 64, on.
  RESFUSE_HD Left left(int64_t column) const { return {words + column * depth, 1, panel_columns}; }
  // All columns from there on.
  RESFUSE_HD Right right(int64_t column = 0) const {
    return {words + column * depth, panel_columns * depth, panel_columns};
  }
};

// A chunk that lies in panels [columns / 64][count][64] already: itself for floats, paired rows for bfloat16.
template <class E>
RESFUSE_HD ByColumns panels_by_columns(const E* panels, int64_t count, int64_t columns, Word* words) {
  if constexpr (word_elements<E> == 1) {
    return {reinterpret_cast<const Word*>(panels), count};
  } else {
    for (int64_t c = 0; c < columns; c += panel_columns) {
      transpose_chunk(panels + c * count, count, panel_columns, panel_columns, words + c * depth_words<E>(count));
    }
    return {words, depth_words<E>(count)};
  }
}

// How rows of such a chunk are read as a left operand: a piece of the depth for each panel.
template <class E>
struct PanelTaps {
  static constexpr int64_t depth = panel_columns / word_elements<E>;
  Buffer<int64_t> a, b, rows;

  // columns: of the chunk; most: rows of it.
  PanelTaps(int64_t columns, int64_t most)
      : a(columns / panel_columns + 1), b(columns / panel_columns + 1), rows(most) {
    for (int64_t i = 0; i < most; ++i) rows[i] = i * depth;
    for (int64_t t = 0; t * panel_columns < columns; ++t) b[t] = t * depth * panel_columns;
  }

  // For a chunk of `count` rows.
  Taps at(int64_t count, int64_t columns) const {
    const int64_t taps = (columns + panel_columns - 1) / panel_columns;
    for (int64_t t = 0; t < taps; ++t) a[t] = t * count * depth;
    return {taps, depth, a, b};
  }
};

// columns: whole panels; words: room for `column_words`.
template <class E>
RESFUSE_HD ByColumns by_columns(const E* chunk, int64_t count, int64_t columns, int64_t stride, Word* words) {
  transpose_chunk(chunk, count, columns, stride, words);
  return {words, depth_words<E>(count)};
}

template <class E>
constexpr int64_t column_words(int64_t count, int64_t columns) {
  return (count + word_elements<E> - 1) / word_elements<E> * round_up(columns, panel_columns);
}

}  // namespace resfuse
