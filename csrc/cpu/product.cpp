// The tiles: a few rows of a times one panel of b, accumulated in registers; one version per instruction set.
#include "product.h"

#include <algorithm>
#include <cstring>

#include "amx.h"
#include "isa.h"

#if RESFUSE_X86
#include <immintrin.h>
#endif

namespace resfuse {

namespace {

// Words of depth between two visits of c: a panel's part (64 KiB) then stays near for all rows.
constexpr int64_t depth_block = 256;

struct Tile {
  const Word* a[tile_rows];  // where each row begins
  int64_t a_depth;
  const Word* b;
  int64_t b_depth;
  // The depth comes in `taps` pieces of `depth` words, one of one at least; piece t begins a_taps[t] behind a's rows
  // and b_taps[t] behind b.
  int64_t taps;
  const int64_t* a_taps;
  const int64_t* b_taps;
  int64_t depth;
  float* c;
  int64_t c_row;
  int64_t columns;  // of the panel, from 1 to 64
  bool accumulate;
};

using TileFunction = void (*)(const Tile&);

RESFUSE_HD float as_float(Word word) {
  return bits_float(word);
}

// Any processor, float words: 16 columns at a time, which the compiler keeps in the registers it has.
template <int rows>
void tile_baseline(const Tile& t) {
  constexpr int width = vector_columns;
  for (int64_t first = 0; first < t.columns; first += width) {
    float sum[rows][width];
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < width; ++j) sum[i][j] = t.accumulate ? t.c[i * t.c_row + first + j] : 0.0f;
    }
    for (int64_t tap = 0; tap < t.taps; ++tap) {
      const Word* b = t.b + t.b_taps[tap] + first;
      for (int64_t k = 0; k < t.depth; ++k) {
        for (int i = 0; i < rows; ++i) {
          const float a = as_float(t.a[i][t.a_taps[tap] + k * t.a_depth]);
          for (int j = 0; j < width; ++j) sum[i][j] += a * as_float(b[k * t.b_depth + j]);
        }
      }
    }
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < width; ++j) t.c[i * t.c_row + first + j] = sum[i][j];
    }
  }
}

#if RESFUSE_X86

// Of the tiles below: sums begin at zero and meet c at the end, and no loop can be empty. Sums that a branch or an
// empty loop could leave as they were are copied through memory, which costs a short product a quarter of its time.

// 6 rows x 16 columns: 12 accumulators of the 16 registers.
template <int rows>
RESFUSE_AVX2 void tile_avx2(const Tile& t) {
  for (int64_t first = 0; first < t.columns; first += vector_columns) {
    __m256 sum[rows][2];
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < 2; ++j) sum[i][j] = _mm256_setzero_ps();
    }
    int64_t tap = 0;
    do {
      const Word* a[rows];
      for (int i = 0; i < rows; ++i) a[i] = t.a[i] + t.a_taps[tap];
      const float* b = reinterpret_cast<const float*>(t.b + t.b_taps[tap] + first);
      int64_t k = 0;
      do {
        const __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);
        for (int i = 0; i < rows; ++i) {
          const __m256 x = _mm256_set1_ps(as_float(a[i][k * t.a_depth]));
          sum[i][0] = _mm256_fmadd_ps(x, b0, sum[i][0]);
          sum[i][1] = _mm256_fmadd_ps(x, b1, sum[i][1]);
        }
        b += t.b_depth;
      } while (++k < t.depth);
    } while (++tap < t.taps);
    for (int i = 0; i < rows; ++i) {
      float* c = t.c + i * t.c_row + first;
      for (int j = 0; j < 2; ++j) {
        const __m256 before = t.accumulate ? _mm256_loadu_ps(c + 8 * j) : _mm256_setzero_ps();
        _mm256_storeu_ps(c + 8 * j, _mm256_add_ps(before, sum[i][j]));
      }
    }
  }
}

// Sums of earlier products may have left the cache: they are fetched during this one.
template <int rows, int vectors>
RESFUSE_HD void fetch_sums(const Tile& t) {
  for (int i = 0; t.accumulate && i < rows; ++i) {
    for (int j = 0; j < vectors; ++j) __builtin_prefetch(t.c + i * t.c_row + 16 * j, 1);
  }
}

template <int rows, int vectors>
RESFUSE_HD RESFUSE_AVX512 void clear(__m512 (&sum)[rows][vectors]) {
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < vectors; ++j) sum[i][j] = _mm512_setzero_ps();
  }
}

template <int rows, int vectors>
RESFUSE_HD RESFUSE_AVX512 void write(const __m512 (&sum)[rows][vectors], const Tile& t) {
  float* c = t.c;
  if (!t.accumulate) {
    for (int i = 0; i < rows; ++i, c += t.c_row) {
      for (int j = 0; j < vectors; ++j) _mm512_storeu_ps(c + 16 * j, sum[i][j]);
    }
    return;
  }
  for (int i = 0; i < rows; ++i, c += t.c_row) {
    for (int j = 0; j < vectors; ++j) {
      _mm512_storeu_ps(c + 16 * j, _mm512_add_ps(_mm512_loadu_ps(c + 16 * j), sum[i][j]));
    }
  }
}

// Arithmetic on 16 words.
struct Floats {
  using Vector = __m512;
  RESFUSE_HD RESFUSE_AVX512_BF16 static Vector load(const Word* from) { return _mm512_loadu_ps(from); }
  RESFUSE_HD RESFUSE_AVX512_BF16 static Vector all(Word word) { return _mm512_set1_ps(as_float(word)); }
  RESFUSE_HD RESFUSE_AVX512_BF16 static __m512 add(__m512 sum, Vector x, Vector y) {
    return _mm512_fmadd_ps(x, y, sum);
  }
};

struct Pairs {
  using Vector = __m512bh;
  RESFUSE_HD RESFUSE_AVX512_BF16 static Vector load(const Word* from) { return (Vector)_mm512_loadu_si512(from); }
  RESFUSE_HD RESFUSE_AVX512_BF16 static Vector all(Word word) {
    return (Vector)_mm512_set1_epi32(static_cast<int>(word));
  }
  RESFUSE_HD RESFUSE_AVX512_BF16 static __m512 add(__m512 sum, Vector x, Vector y) {
    return _mm512_dpbf16_ps(sum, x, y);
  }
};

// 6 rows x 64 columns: 24 accumulators of the 32 registers; fewer columns where a panel has no more. That of floats runs
// without AVX-512-bf16 too, of which it has no instruction.
template <class Arithmetic, int rows, int vectors>
RESFUSE_AVX512_BF16 void tile_avx512(const Tile& t) {
  __m512 sum[rows][vectors];
  fetch_sums<rows, vectors>(t);
  clear(sum);
  int64_t tap = 0;
  do {
    const Word* a[rows];
    for (int i = 0; i < rows; ++i) a[i] = t.a[i] + t.a_taps[tap];
    const Word* b = t.b + t.b_taps[tap];
    int64_t k = 0;
    do {
      typename Arithmetic::Vector v[vectors];
      for (int j = 0; j < vectors; ++j) v[j] = Arithmetic::load(b + 16 * j);
      for (int i = 0; i < rows; ++i) {
        const auto x = Arithmetic::all(a[i][k * t.a_depth]);
        for (int j = 0; j < vectors; ++j) sum[i][j] = Arithmetic::add(sum[i][j], x, v[j]);
      }
      b += t.b_depth;
    } while (++k < t.depth);
  } while (++tap < t.taps);
  write(sum, t);
}

template <class Arithmetic, int rows>
void tile_of_width(const Tile& t) {
  if (t.columns > 3 * vector_columns) return tile_avx512<Arithmetic, rows, 4>(t);
  if (t.columns > 2 * vector_columns) return tile_avx512<Arithmetic, rows, 3>(t);
  if (t.columns > vector_columns) return tile_avx512<Arithmetic, rows, 2>(t);
  return tile_avx512<Arithmetic, rows, 1>(t);
}

template <int rows>
constexpr TileFunction tile_avx512_float = tile_of_width<Floats, rows>;
template <int rows>
constexpr TileFunction tile_avx512_bf16 = tile_of_width<Pairs, rows>;

// Pairs, fours, and 128-bit lanes change places.
RESFUSE_AVX512 void transpose_avx512(const Word* from, int64_t from_stride, Word* to, int64_t to_stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(to + i * to_stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_si512(to + (i + 8) * to_stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
    _mm512_storeu_si512(to + (i + 4) * to_stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
    _mm512_storeu_si512(to + (i + 12) * to_stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
  }
}

#endif

// The tile for each count of rows up to 6 (index 0 is not used).
#define RESFUSE_TILES(tile) {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>}

const TileFunction* float_tiles() {
  static constexpr TileFunction baseline[] = RESFUSE_TILES(tile_baseline);
#if RESFUSE_X86
  static constexpr TileFunction avx2[] = RESFUSE_TILES(tile_avx2);
  static constexpr TileFunction avx512[] = RESFUSE_TILES(tile_avx512_float);
  if (isa() >= Isa::avx512) return avx512;
  if (isa() >= Isa::avx2) return avx2;
#endif
  return baseline;
}

const TileFunction* bfloat16_tiles() {
#if RESFUSE_X86
  static constexpr TileFunction avx512_bf16[] = RESFUSE_TILES(tile_avx512_bf16);
  return avx512_bf16;
#else
  return nullptr;  // `multiplies_bfloat16` is false
#endif
}

}  // namespace

void transpose_words(const void* from, int64_t from_stride, Word* to, int64_t to_stride) {
  const Word* words = static_cast<const Word*>(from);
#if RESFUSE_X86
  if (vector_isa() >= Isa::avx512) return transpose_avx512(words, from_stride, to, to_stride);
#endif
  for (int64_t i = 0; i < 16; ++i) {
    for (int64_t j = 0; j < 16; ++j) {
      std::memcpy(to + j * to_stride + i, words + i * from_stride + j, sizeof(Word));  // weights may be aligned by two
    }
  }
}

bool multiplies_bfloat16() {
  return isa() >= Isa::avx512_bf16;
}

template <class E>
void multiply(
    int64_t rows, int64_t columns, int64_t depth, Left a, Right b, float* c, int64_t stride, bool accumulate,
    Ahead* ahead) {
  if (depth == 0) {
    for (int64_t row = 0; row < rows && !accumulate; ++row) {
      std::fill_n(c + row * stride, round_up(columns, vector_columns), 0.0f);
    }
    return;
  }
  if (word_elements<E> == 2 && isa() == Isa::amx) {
    return multiply_amx(rows, columns, depth, a, b, c, stride, accumulate, ahead);
  }
  const TileFunction* tiles = sizeof(E) == sizeof(Word) ? float_tiles() : bfloat16_tiles();
  const Word* a_words = static_cast<const Word*>(a.words);
  const Word* b_words = static_cast<const Word*>(b.words);
  const int64_t here = 0;
  for (int64_t column = 0; column < columns; column += panel_columns) {
    const Word* panel = b_words + column / panel_columns * b.panel;
    const int64_t width = std::min(panel_columns, columns - column);
    for (int64_t k = 0; k < depth; k += depth_block) {
      const int64_t block = depth - k < depth_block ? depth - k : depth_block;
      for (int64_t row = 0; row < rows; row += tile_rows) {
        const int64_t count = rows - row < tile_rows ? rows - row : tile_rows;
        Tile tile{{}, a.depth, panel + k * b.depth, b.depth, 1, &here, &here, block, c + row * stride + column, stride,
                  width, accumulate || k > 0};
        for (int64_t i = 0; i < count; ++i) tile.a[i] = a_words + (row + i) * a.row + k * a.depth;
        tiles[count](tile);
        if (ahead) ahead->fetch(block);
      }
    }
  }
}

template <class E>
void multiply_taps(
    int64_t rows, int64_t columns, const Taps& taps, const void* a, int64_t a_depth, const int64_t* a_rows, Right b,
    float* c, int64_t stride, bool accumulate, Ahead* ahead) {
  if (word_elements<E> == 2 && isa() == Isa::amx) {
    return multiply_taps_amx(rows, columns, taps, a, a_depth, a_rows, b, c, stride, accumulate, ahead);
  }
  const TileFunction* tiles = sizeof(E) == sizeof(Word) ? float_tiles() : bfloat16_tiles();
  const Word* a_words = static_cast<const Word*>(a);
  const Word* b_words = static_cast<const Word*>(b.words);
  const int64_t most = taps.depth > 0 && 2 * depth_block / taps.depth > 0 ? 2 * depth_block / taps.depth : 1;
  for (int64_t column = 0; column < columns; column += panel_columns) {
    const Word* panel = b_words + column / panel_columns * b.panel;
    const int64_t width = std::min(panel_columns, columns - column);
    for (int64_t tap = 0; tap < taps.count; tap += most) {
      const int64_t block = taps.count - tap < most ? taps.count - tap : most;
      for (int64_t row = 0; row < rows; row += tile_rows) {
        const int64_t count = rows - row < tile_rows ? rows - row : tile_rows;
        Tile tile{{}, a_depth, panel, b.depth, block, taps.a + tap, taps.b + tap, taps.depth,
                  c + row * stride + column, stride, width, accumulate || tap > 0};
        for (int64_t i = 0; i < count; ++i) tile.a[i] = a_words + a_rows[row + i];
        tiles[count](tile);
        if (ahead) ahead->fetch(block * taps.depth);
      }
    }
  }
}

template void multiply<float>(int64_t, int64_t, int64_t, Left, Right, float*, int64_t, bool, Ahead*);
template void multiply<bfloat16>(int64_t, int64_t, int64_t, Left, Right, float*, int64_t, bool, Ahead*);
template void multiply_taps<float>(
    int64_t, int64_t, const Taps&, const void*, int64_t, const int64_t*, Right, float*, int64_t, bool, Ahead*);
template void multiply_taps<bfloat16>(
    int64_t, int64_t, const Taps&, const void*, int64_t, const int64_t*, Right, float*, int64_t, bool, Ahead*);

}  // namespace resfuse
