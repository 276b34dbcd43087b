// A tile of left.T @ right, summed over a share of the rows: 64 x 64 values a block of four warps, 32 x 32 each, with
// float32 sums: on the matrix units in 16 bits and tf32, by fused multiply-adds in float32.
//
// Rows come in steps of 4 KiB through a ring of three stages: raw values by asynchronous copies, two steps ahead; then
// each thread replaces the chunks that it copied itself by the recipe's values, and all warps read both tiles transposed,
// since the summed dimension is their slow one. A thread adds up its own columns on the way.
#pragma once

#include "gradient.h"
#include "rows.h"

namespace resfuse::cuda::outer {

constexpr int kTile = 64, kStages = 3, kBlock = 128;
constexpr int kChunks = kTile / kVector;         // of eight channels, in a row of a tile
constexpr int kTileBytes = 4096, kStageBytes = 2 * kTileBytes, kSharedBytes = kStages * kStageBytes;

DEVICE_FN int lane() { return int(threadIdx.x) & 31; }
DEVICE_FN int warp_row() { return (int(threadIdx.x) >> 5 & 1) * 32; }
DEVICE_FN int warp_column() { return (int(threadIdx.x) >> 6) * 32; }

// A thread's 32 sums as mma.sync has them: value n is of row(n) and column(n) of the tile.
struct MatrixSums {
  float v[2][4][4] = {};

  DEVICE_MEMBER float at(int n) const { return v[n / 16][n / 4 % 4][n % 4]; }
  static DEVICE_MEMBER int row(int n) { return warp_row() + n / 16 * 16 + (lane() >> 2) + (n % 4 >> 1) * 8; }
  static DEVICE_MEMBER int column(int n) { return warp_column() + n / 4 % 4 * 8 + (lane() & 3) * 2 + (n & 1); }
};

DEVICE_FN void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  mma_m16n8k16_bf16(d, a, b);
}
DEVICE_FN void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  mma_m16n8k16_f16(d, a, b);
}

// How a product is taken: Storage and what of a value it reads, rows a step, where a tile has 16 bytes of a row, and the
// sums that a step adds to.

// 16 bits: uncentred, since a centred value would have to be rounded again.
template <class T>
struct Short {
  using Storage = T;
  using Sums = MatrixSums;
  static constexpr int kStep = 32;
  static constexpr bool kCentred = false;

  static DEVICE_MEMBER float read(float value, float, bool) { return value; }

  // Words of a row are permuted by the row, so that eight rows of one column lie in different banks.
  static DEVICE_MEMBER int offset(int row, int word) { return row * 128 + ((word ^ row) & 7) * 16; }

  static DEVICE_MEMBER void add(Sums& sums, const unsigned char* left, const unsigned char* right) {
    const uint32_t of_left = smem_address(left), of_right = smem_address(right);
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k) {
      uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ldmatrix_x4_trans(a[i], of_left + offset(k * 16 + (lane() >> 4) * 8 + (lane() & 7),
                                                 (warp_row() + i * 16) / 8 + ((lane() >> 3) & 1)));
        ldmatrix_x4_trans(b[i], of_right + offset(k * 16 + (lane() & 15), (warp_column() + i * 16) / 8 + (lane() >> 4)));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t of_column[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          multiply(sums.v[i][j], a[i], of_column, T{});
        }
      }
    }
  }
};

// float32, about a pivot: it keeps the digits that sums of uncentred products lose.
struct Wide {
  using Storage = float;
  static constexpr int kStep = 16;
  static constexpr bool kCentred = true;

  // Permuted so that eight even words, eight words in line, and four rows of two words lie in different banks.
  static DEVICE_MEMBER int offset(int row, int word) { return row * 256 + (word ^ (word >> 3 & 1) ^ (row & 3) * 2) * 16; }
};

struct Tf32 : Wide {
  using Sums = MatrixSums;

  static DEVICE_MEMBER float read(float value, float pivot, bool) { return __uint_as_float(round_tf32(value - pivot)); }

  static DEVICE_MEMBER uint32_t word(const unsigned char* tile, int row, int column) {
    return *reinterpret_cast<const uint32_t*>(tile + offset(row, column / 4) + column % 4 * 4);
  }

  static DEVICE_MEMBER void add(Sums& sums, const unsigned char* left, const unsigned char* right) {
#pragma unroll
    for (int step = 0; step < kStep / 8; ++step) {
      const int k = step * 8 + (lane() & 3);
      uint32_t a[2][4], b[4][2];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) a[i][r] = word(left, k + (r >> 1) * 4, warp_row() + i * 16 + (lane() >> 2) + (r & 1) * 8);
#pragma unroll
        for (int h = 0; h < 2; ++h) b[r][h] = word(right, k + h * 4, warp_column() + r * 8 + (lane() >> 2));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_m16n8k8_tf32(sums.v[i][j], a[i], b[j]);
    }
  }
};

// A thread has 8 x 4 values.
struct ExactSums {
  float v[8][4] = {};

  DEVICE_MEMBER float at(int n) const { return v[n / 4][n % 4]; }
  static DEVICE_MEMBER int row(int n) { return warp_row() + (lane() >> 3) * 8 + n / 4; }
  static DEVICE_MEMBER int column(int n) { return warp_column() + (lane() & 7) * 4 + n % 4; }
};

struct Exact : Wide {
  using Sums = ExactSums;

  // tf32: products elsewhere read the value rounded, and these are of what they read.
  static DEVICE_MEMBER float read(float value, float pivot, bool tf32) {
    return (tf32 ? __uint_as_float(round_tf32(value)) : value) - pivot;
  }

  static DEVICE_MEMBER void words(float* v, const unsigned char* tile, int row, int column) {
    const uint4 word = *reinterpret_cast<const uint4*>(tile + offset(row, column / 4));
    memcpy(v, &word, sizeof(word));
  }

  static DEVICE_MEMBER void add(Sums& sums, const unsigned char* left, const unsigned char* right) {
#pragma unroll 4
    for (int k = 0; k < kStep; ++k) {
      float a[8], b[4];
      words(a, left, k, Sums::row(0));
      words(a + 4, left, k, Sums::row(0) + 4);
      words(b, right, k, Sums::column(0));
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums.v[i][j] = __fmaf_rn(a[i], b[j], sums.v[i][j]);
    }
  }
};

// f called with how products of a type of 16 bits are taken.
template <class F>
int with_short(DType dtype, const F& f) {
  return dtype == DType::kBFloat16 ? f(Short<__nv_bfloat16>{}) : f(Short<__half>{});
}

// An activation's columns: act(scale * x + shift), rounded.
template <class T>
struct ActivationTile {
  Rows x;
  bool recipe;
  float bound, scale[kVector], shift[kVector];

  DEVICE_MEMBER ActivationTile(const Activation& a, int first) : x(a.x), recipe(a.scale != nullptr), bound(lower_bound(a.relu)) {
    load_vector(scale, a.scale, first, a.x.channels, 1.0f);
    load_vector(shift, a.shift, first, a.x.channels, 0.0f);
  }
  DEVICE_MEMBER const T* row(int64_t index) const { return row_of<T>(x, index); }
  DEVICE_MEMBER int channels() const { return x.channels; }
  DEVICE_MEMBER void beside(int64_t, int, uint8_t& bits, float& weight) const { bits = 0xff, weight = 1.0f; }
  DEVICE_MEMBER float value(float v, int i, uint8_t, float) const {
    return recipe ? clamp_below(affine(v, scale[i], shift[i]), bound) : v;
  }
};

// A gradient's columns below its mask.
template <class T>
struct GradientTile {
  const Gradient& g;

  DEVICE_MEMBER GradientTile(const Gradient& given, int) : g(given) {}
  DEVICE_MEMBER const T* row(int64_t index) const { return static_cast<const T*>(g.dout) + index * g.channels; }
  DEVICE_MEMBER int channels() const { return g.channels; }
  DEVICE_MEMBER void beside(int64_t index, int first, uint8_t& bits, float& weight) const {
    bits = g.mask != nullptr ? g.mask[index * ((g.channels + 7) / 8) + first / 8] : uint8_t(0xff);
    weight = g.row_scale != nullptr ? g.factor * g.row_scale[index / g.pixels] : g.factor;
  }
  DEVICE_MEMBER float value(float v, int i, uint8_t bits, float weight) const {
    v = bits >> i & 1 ? v : 0.0f;
    return weight != 1.0f ? v * weight : v;
  }
};

// What of a tile is a thread's, of kThreads: eight columns of every kApart-th row, and what lies beside their values.
template <class Math, class Tile, bool kWhole, int kThreads = kBlock>
struct Chunks {
  using T = typename Math::Storage;
  static constexpr int kApart = kThreads / kChunks, kMine = Math::kStep / kApart, kWords = kVector * sizeof(T) / 16;

  const Tile& tile;
  int first, row, chunk;
  bool tf32 = false;
  uint8_t bits[kMine] = {}, later[kMine] = {};  // of the step that is next, and of the one after it
  float weight[kMine] = {}, later_weight[kMine] = {};
  float pivot[kVector] = {};
  float sums[kVector] = {};  // of values less their pivots

  DEVICE_MEMBER Chunks(const Tile& of, int column)
      : tile(of), row(int(threadIdx.x) / kChunks), chunk(int(threadIdx.x) % kChunks) {
    first = column + chunk * kVector;
  }

  DEVICE_MEMBER unsigned char* place(unsigned char* in, int i, int word) const {
    return in + Math::offset(row + i * kApart, chunk * kWords + word);
  }

  // Asks for the values of a step; every thread commits afterwards.
  DEVICE_MEMBER void load(unsigned char* to, int64_t begin, int64_t end) {
    const int left = tile.channels() - first;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int64_t index = begin + row + i * kApart;
      const bool valid = index < end && left > 0;
      bits[i] = later[i], weight[i] = later_weight[i];
      later[i] = 0, later_weight[i] = 1.0f;
      if (valid) tile.beside(index, first, later[i], later_weight[i]);
      const T* const from = tile.row(valid ? index : 0) + (left > 0 ? first : 0);
      if constexpr (kWhole) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) cp_async_16(smem_address(place(to, i, w)), from + w * (16 / sizeof(T)), valid);
      } else {
        put(to, i, load_raw<false>(from, valid ? left : 0));
      }
    }
  }

  // Replaces what has come by the recipe's values as the product reads them; 0 beyond the last row and column.
  DEVICE_MEMBER void prepare(unsigned char* in, int64_t begin, int64_t end) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      uint4 words[kWords];
#pragma unroll
      for (int w = 0; w < kWords; ++w) words[w] = *reinterpret_cast<const uint4*>(place(in, i, w));
      Raw<T> raw;
      memcpy(&raw, words, sizeof(raw));
      const bool valid = begin + row + i * kApart < end;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const bool inside = valid && first + j < tile.channels();
        const float value = inside ? tile.value(to_float(raw.v[j]), j, bits[i], weight[i]) : 0.0f;
        raw.v[j] = Stored<T>::from(inside ? Math::read(value, pivot[j], tf32) : 0.0f);
        sums[j] += to_float(raw.v[j]);
      }
      put(in, i, raw);
    }
  }

  DEVICE_MEMBER void put(unsigned char* in, int i, const Raw<T>& raw) {
    uint4 words[kWords];
    memcpy(words, &raw, sizeof(raw));
#pragma unroll
    for (int w = 0; w < kWords; ++w) *reinterpret_cast<uint4*>(place(in, i, w)) = words[w];
  }
};

// both: whether the right tile is one of its own, and not the left one again.
template <class Math, class Left, class Right>
DEVICE_FN void add_rows(
    typename Math::Sums& sums, unsigned char* smem, Left& left, Right& right, int64_t begin, int64_t end, bool both) {
  constexpr int kStep = Math::kStep;
  const auto load = [&](int64_t step) {
    const int64_t at = begin + step * kStep;
    unsigned char* const stage = smem + step % kStages * kStageBytes;
    left.load(stage, at, end);
    if (both) right.load(stage + kTileBytes, at, end);
    cp_async_commit();
  };
  const int64_t steps = (end - begin + kStep - 1) / kStep;
  load(0);
  load(1);
  for (int64_t step = 0; step < steps; ++step) {
    cp_async_wait<1>();
    unsigned char* const stage = smem + step % kStages * kStageBytes;
    left.prepare(stage, begin + step * kStep, end);
    if (both) right.prepare(stage + kTileBytes, begin + step * kStep, end);
    __syncthreads();  // the tiles are whole; and everybody has left the stage that is loaded next
    load(step + 2);
    Math::add(sums, stage, both ? stage + kTileBytes : stage);
  }
  cp_async_wait<0>();
}

// The sum of each of the tile's columns over the block's threads, in thread order, in total[kTile]; scratch: the stages.
template <class Of>
DEVICE_FN void add_columns(float* total, float* scratch, const Of& chunks) {
  __syncthreads();  // the stages have been read
#pragma unroll
  for (int j = 0; j < kVector; ++j) scratch[chunks.row * kTile + chunks.chunk * kVector + j] = chunks.sums[j];
  __syncthreads();
  if (int(threadIdx.x) < kTile) {
    float sum = 0.0f;
    for (int r = 0; r < Of::kApart; ++r) sum += scratch[r * kTile + int(threadIdx.x)];
    total[int(threadIdx.x)] = sum;
  }
  __syncthreads();
}

// Values are from here on about the mean of the first step's rows.
template <class Math, class Of>
DEVICE_FN void centre(Of& chunks, float* total, unsigned char* smem, int64_t begin, int64_t end) {
  end = end - begin < Math::kStep ? end : begin + Math::kStep;
  chunks.load(smem, begin, end);
  cp_async_commit();
  cp_async_wait<0>();
  chunks.prepare(smem, begin, end);
  add_columns(total, reinterpret_cast<float*>(smem), chunks);
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    chunks.pivot[j] = total[chunks.chunk * kVector + j] / float(end - begin);
    chunks.sums[j] = 0.0f;
  }
}

}  // namespace resfuse::cuda::outer
