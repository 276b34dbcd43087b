// Activations as matrices [M, C]: where their rows lie, and copies of a few of them as the products read them.
#pragma once

#include <cstdint>

#include "../common/scalar.h"
#include "../common/storage.h"
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

  // Rows first .. end, at most `count` of them, are read soon.
  RESFUSE_HD void fetch(Ahead& ahead, int64_t first, int64_t count, int64_t end) const {
    const int64_t rows = end - first < count ? end - first : count;
    if (dense && data && rows > 0) ahead.add(row(first), rows * channels * static_cast<int64_t>(sizeof(T)));
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

// Rows r and r + 1 of bfloat16 in one word, the form in which rows are the depth of a product; an odd last row meets 0.
RESFUSE_HD void pair_rows(const bfloat16* rows, int64_t count, int64_t columns, int64_t stride, Word* out) {
  for (int64_t r = 0; r < count; r += 2) {
    const bfloat16* __restrict__ even = rows + r * stride;
    const bfloat16* __restrict__ odd = even + stride;
    Word* __restrict__ o = out + r / 2 * stride;
    if (r + 1 < count) {
      for (int64_t c = 0; c < columns; ++c) o[c] = static_cast<Word>(even[c]) | static_cast<Word>(odd[c]) << 16;
    } else {
      for (int64_t c = 0; c < columns; ++c) o[c] = static_cast<Word>(even[c]);
    }
  }
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

// A chunk as an operand whose rows are the depth: itself for floats, its paired rows for bfloat16.
template <class E>
struct ByColumns {
  const void* words;
  int64_t stride;

  RESFUSE_HD Left left(int64_t column = 0) const { return {static_cast<const Word*>(words) + column, 1, stride}; }
  RESFUSE_HD Right right(int64_t column = 0) const {
    return {static_cast<const Word*>(words) + column, panel_columns, stride};
  }
};

// pairs: room for [ceil(count/2), stride] words, not used for floats.
template <class E>
RESFUSE_HD ByColumns<E> by_columns(const E* chunk, int64_t count, int64_t columns, int64_t stride, Word* pairs) {
  if constexpr (word_elements<E> == 1) {
    return {chunk, stride};
  } else {
    pair_rows(chunk, count, columns, stride, pairs);
    return {pairs, stride};
  }
}

// Words that `by_columns` needs for a chunk.
template <class E>
constexpr int64_t pair_words(int64_t count, int64_t stride) {
  return word_elements<E> == 1 ? 0 : (count + 1) / 2 * stride;
}

}  // namespace resfuse
