// The products of product.h on a matrix unit that multiplies tiles of 16 rows and 16 words: AMX, or a model of it.
//
// Two tiles of the left operand times two of the right one at a time: four tiles of sums, of eight that there are. A
// tile is read where it lies if its rows are evenly apart and its words side by side; else it is packed first, zeros
// beyond the edges. The right operand's last words are copied too, because what lies behind them may be anything.
#pragma once

#include <algorithm>

#include "product.h"

namespace resfuse {

constexpr int64_t amx_size = 16;        // rows of a tile, words of its rows
constexpr int64_t amx_most_steps = 32;  // tiles along the depth between two visits of c

// Unit: zero<tile>(), load<tile>(from, stride), store<tile>(to, stride), multiply<sum, left, right>() on numbered tiles
// (strides in bytes), and transpose(from, stride, to) of 16 x 16 words.
template <class Unit>
class AmxProduct {
 public:
  // Row i of the left operand begins at row_of(i).
  template <class RowOf>
  static void run(
      Unit& unit, int64_t rows, int64_t columns, const Taps& taps, const RowOf& row_of, int64_t a_depth, Right b,
      float* c, int64_t stride, bool accumulate, Ahead* ahead) {
    const Steps steps{taps, (taps.depth + amx_size - 1) / amx_size, b.depth, a_depth};
    alignas(64) Word packed[2][amx_most_steps][amx_size * amx_size];
    for (int64_t begin = 0; begin < taps.count * steps.of_tap; begin += amx_most_steps) {
      const int64_t end = std::min(taps.count * steps.of_tap, begin + amx_most_steps);
      for (int64_t row = 0; row < rows; row += 2 * amx_size) {
        const LeftTile upper = left_tile(unit, steps, begin, end, row_of, row, rows, packed[0]);
        const bool two = row + amx_size < rows;
        LeftTile lower = upper;
        if (two) lower = left_tile(unit, steps, begin, end, row_of, row + amx_size, rows, packed[1]);
        for (int64_t column = 0; column < columns; column += 2 * amx_size) {
          const Word* right = static_cast<const Word*>(b.words) + column / panel_columns * b.panel +
                              column % panel_columns;
          float* sums = c + row * stride + column;
          if (two) {
            multiply<true>(unit, steps, begin, end, upper, lower, right, sums, stride, rows - row,
                           accumulate || begin > 0);
          } else {
            multiply<false>(unit, steps, begin, end, upper, lower, right, sums, stride, rows - row,
                            accumulate || begin > 0);
          }
          if (ahead) ahead->fetch(tile_words(2 * amx_size, 2 * amx_size, (end - begin) * amx_size) / 2);
        }
      }
    }
  }

 private:
  // The depth, in tiles: those of the first tap, then those of the next.
  struct Steps {
    const Taps& taps;
    int64_t of_tap;
    int64_t b_depth;
    int64_t a_depth;

    int64_t a(int64_t step) const { return taps.a[step / of_tap] + step % of_tap * amx_size * a_depth; }
    int64_t b(int64_t step) const { return taps.b[step / of_tap] + step % of_tap * amx_size * b_depth; }
    int64_t words(int64_t step) const { return std::min(amx_size, taps.depth - step % of_tap * amx_size); }
  };

  struct LeftTile {
    const Word* row;    // where they lie, or null
    const Word (*packed)[amx_size * amx_size];
    int64_t stride;  // bytes
  };

  template <class RowOf>
  static LeftTile left_tile(
      Unit& unit, const Steps& steps, int64_t begin, int64_t end, const RowOf& row_of, int64_t first, int64_t rows,
      Word (*packed)[amx_size * amx_size]) {
    const int64_t count = std::min(amx_size, rows - first);
    const Word* row[amx_size];
    for (int64_t i = 0; i < count; ++i) row[i] = row_of(first + i);
    const int64_t apart = count > 1 ? row[1] - row[0] : 0;
    bool even = count == amx_size;
    for (int64_t i = 1; i < count; ++i) even = even && row[i] - row[i - 1] == apart;
    const bool whole = steps.taps.depth % amx_size == 0;
    if (even && whole && steps.a_depth == 1) return {row[0], nullptr, apart * int64_t{sizeof(Word)}};
    for (int64_t step = begin; step < end; ++step) {
      Word* to = packed[step - begin];
      const int64_t offset = steps.a(step), words = steps.words(step);
      if (even && apart == 1 && words == amx_size) {
        unit.transpose(row[0] + offset, steps.a_depth, to);
        continue;
      }
      std::fill_n(to, amx_size * amx_size, Word{0});
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t w = 0; w < words; ++w) to[i * amx_size + w] = row[i][offset + w * steps.a_depth];
      }
    }
    return {nullptr, packed, amx_size * int64_t{sizeof(Word)}};
  }

  // Sums of 32 columns, and of 32 rows or 16; `rows` of them are there.
  template <bool two>
  static void multiply(
      Unit& unit, const Steps& steps, int64_t begin, int64_t end, const LeftTile& upper, const LeftTile& lower,
      const Word* b, float* c, int64_t stride, int64_t rows, bool accumulate) {
    alignas(64) float scratch[2 * amx_size * 2 * amx_size];
    alignas(64) Word tail[amx_size * 2 * amx_size];
    const bool whole = rows >= (two ? 2 : 1) * amx_size;
    float* sums = whole ? c : scratch;
    const int64_t pitch = whole ? stride : 2 * amx_size, bytes = pitch * int64_t{sizeof(float)};
    if (!accumulate) {
      unit.template zero<0>();
      unit.template zero<1>();
      if (two) unit.template zero<2>(), unit.template zero<3>();
    } else {
      if (!whole) copy_rows(c, stride, scratch, pitch, rows);
      unit.template load<0>(sums, bytes);
      unit.template load<1>(sums + amx_size, bytes);
      if (two) {
        unit.template load<2>(sums + amx_size * pitch, bytes);
        unit.template load<3>(sums + amx_size * pitch + amx_size, bytes);
      }
    }
    for (int64_t step = begin; step < end; ++step) {
      const Word* right = b + steps.b(step);
      int64_t right_bytes = steps.b_depth * int64_t{sizeof(Word)};
      if (steps.words(step) < amx_size) {
        std::fill_n(tail, amx_size * 2 * amx_size, Word{0});
        for (int64_t w = 0; w < steps.words(step); ++w) {
          std::copy_n(right + w * steps.b_depth, 2 * amx_size, tail + w * 2 * amx_size);
        }
        right = tail;
        right_bytes = 2 * amx_size * int64_t{sizeof(Word)};
      }
      unit.template load<6>(right, right_bytes);
      unit.template load<7>(right + amx_size, right_bytes);
      unit.template load<4>(upper.row ? upper.row + steps.a(step) : upper.packed[step - begin], upper.stride);
      unit.template multiply<0, 4, 6>();
      unit.template multiply<1, 4, 7>();
      if (two) {
        unit.template load<5>(lower.row ? lower.row + steps.a(step) : lower.packed[step - begin], lower.stride);
        unit.template multiply<2, 5, 6>();
        unit.template multiply<3, 5, 7>();
      }
    }
    unit.template store<0>(sums, bytes);
    unit.template store<1>(sums + amx_size, bytes);
    if (two) {
      unit.template store<2>(sums + amx_size * pitch, bytes);
      unit.template store<3>(sums + amx_size * pitch + amx_size, bytes);
    }
    if (!whole) copy_rows(scratch, pitch, c, stride, rows);
  }

  static void copy_rows(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows) {
    for (int64_t i = 0; i < std::min(rows, 2 * amx_size); ++i) {
      std::copy_n(from + i * from_stride, 2 * amx_size, to + i * to_stride);
    }
  }
};

}  // namespace resfuse
