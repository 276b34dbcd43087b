// c (+)= a @ b for a piece that stays in cache: the arithmetic of every kernel, single-threaded.
//
// Operands are read in words of 32 bits along the depth: one float, or two neighbouring bfloat16 whose products are
// added in pairs. The left operand has any strides, so that it is also read transposed; the right one lies in panels of
// 64 columns. Accumulation is float32.
#pragma once

#include <cstdint>

#include "../common/storage.h"

namespace resfuse {

using Word = uint32_t;
constexpr int64_t panel_columns = 64;
constexpr int64_t vector_columns = 16;
constexpr int64_t tile_rows = 6;

// Elements of a word: 1 float, 2 bfloat16.
template <class E>
constexpr int64_t word_elements = sizeof(Word) / sizeof(E);

// a[i, k] is the word at row * i + depth * k.
struct Left {
  const void* words;
  int64_t row;
  int64_t depth;
};

// b[k, 64 * j + n] is the word at panel * j + depth * k + n. Columns up to a multiple of 64 may be read.
struct Right {
  const void* words;
  int64_t panel;
  int64_t depth;
};

// Words of depth that the tiles of a product walk altogether: the measure of its work.
constexpr int64_t tile_words(int64_t rows, int64_t columns, int64_t depth) {
  return (rows + tile_rows - 1) / tile_rows * ((columns + panel_columns - 1) / panel_columns) * depth;
}

// Memory that is needed after some products, fetched into the cache with their tiles, so that the time for memory and
// the time for arithmetic overlap: add() it in the order of its use, spread() it over the products' work, and hand it
// to them. Output too: a store to memory waits for the line that it changes a part of.
class Ahead {
 public:
  // rows: of so many bytes, `stride` bytes apart.
  void add(const void* begin, int64_t bytes, int64_t rows = 1, int64_t stride = 0) {
    if (bytes > 0 && rows > 0 && count_ < most) {
      ranges_[count_++] = {static_cast<const char*>(begin), bytes, rows, stride};
    }
  }

  // work: tile_words of all products to come.
  void spread(int64_t work) {
    int64_t lines = 0;
    for (int i = 0; i < count_; ++i) lines += ranges_[i].rows * ((ranges_[i].bytes + line_bytes - 1) / line_bytes);
    rate_ = work > 0 ? (lines * one + work - 1) / work : 0;
  }

  void fetch(int64_t words) {
    credit_ += words * rate_;
    int64_t lines = credit_ / one;
    for (credit_ %= one; lines > 0 && current_ < count_;) {
      const Range& range = ranges_[current_];
      const char* next = range.begin + row_ * range.stride + offset_;
      const int64_t left = (range.bytes - offset_ + line_bytes - 1) / line_bytes, some = lines < left ? lines : left;
      for (int64_t i = 0; i < some; ++i) __builtin_prefetch(next + i * line_bytes, 0, 2);
      offset_ += some * line_bytes;
      lines -= some;
      if (some < left) continue;
      offset_ = 0;
      if (++row_ < range.rows) continue;
      row_ = 0;
      ++current_;
    }
  }

 private:
  static constexpr int64_t line_bytes = 64;
  static constexpr int64_t one = 1 << 16;  // a line's worth of credit
  struct Range {
    const char* begin;
    int64_t bytes, rows, stride;
  };
  static constexpr int most = 8;
  Range ranges_[most];
  int count_ = 0;
  int current_ = 0;
  int64_t row_ = 0, offset_ = 0;  // in the current range
  int64_t rate_ = 0;              // per word
  int64_t credit_ = 0;
};

// c[i, n] = (accumulate ? c[i, n] : 0) + sum over k of a[i, k] * b[k, n], rows x columns, rows of c `stride` apart.
// Columns of c up to a multiple of 16 are written, up to one of 64 may be. depth counts words.
template <class E>
void multiply(
    int64_t rows, int64_t columns, int64_t depth, Left a, Right b, float* c, int64_t stride, bool accumulate,
    Ahead* ahead = nullptr);

// A depth in `count` pieces of `depth` words: piece t begins a[t] words behind the left operand's rows and b[t] behind
// the right one's panels. There is one piece of one word at least.
struct Taps {
  int64_t count;
  int64_t depth;
  const int64_t* a;
  const int64_t* b;
};

// As `multiply`, for a convolution: row i of the left operand begins at word a_rows[i], the depth comes in pieces.
template <class E>
void multiply_taps(
    int64_t rows, int64_t columns, const Taps& taps, const void* a, int64_t a_depth, const int64_t* a_rows, Right b,
    float* c, int64_t stride, bool accumulate, Ahead* ahead = nullptr);

// to[j, i] = from[i, j] for 16 x 16 words, whose rows begin `from_stride` and `to_stride` words apart.
void transpose_words(const void* from, int64_t from_stride, Word* to, int64_t to_stride);

// Whether this processor multiplies bfloat16 in words of two; elsewhere kernels widen them to float in cache.
bool multiplies_bfloat16();

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace resfuse
