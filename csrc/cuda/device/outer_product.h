// A tile of left.T @ right, summed over a share of the rows: 64 x 64 values a block of four warps, 32 x 32 each, on the
// matrix units in 16 bits with float32 sums.
//
// Rows come in steps of 32 through a ring of three stages: raw values by asynchronous copies, two steps ahead; then each
// thread replaces the chunks that it copied itself by the recipe's values, and all warps read both tiles transposed, since
// the summed dimension is their slow one. A thread adds up its own columns on the way.
#pragma once

#include "gradient.h"
#include "rows.h"

namespace resfuse::cuda::outer {

constexpr int kTile = 64, kStep = 32, kStages = 3, kBlock = 128;
constexpr int kChunks = kTile / kVector;                     // of 16 bytes, in a row of a tile
constexpr int kMine = kStep * kChunks / kBlock;              // chunks of a thread in a tile
constexpr int kRowsApart = kStep / kMine;                    // between them
constexpr int kRowBytes = kTile * 2, kTileBytes = kStep * kRowBytes, kStageBytes = 2 * kTileBytes;
constexpr int kSharedBytes = kStages * kStageBytes;

// Chunks of a row are permuted by the row, so that eight rows of one column lie in different banks.
DEVICE_FN uint32_t offset_of(int row, int chunk) {
  return uint32_t(row * kRowBytes + ((chunk ^ row) & (kChunks - 1)) * 16);
}

DEVICE_FN void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  mma_m16n8k16_bf16(d, a, b);
}
DEVICE_FN void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  mma_m16n8k16_f16(d, a, b);
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

// What of a tile is a thread's: eight columns of every kRowsApart-th row, and what lies beside their values.
template <class T, class Tile, bool kWhole>
struct Chunks {
  const Tile& tile;
  int first, row, chunk;
  uint8_t bits[kMine] = {}, later[kMine] = {};  // of the step that is next, and of the one after it
  float weight[kMine] = {}, later_weight[kMine] = {};
  float sums[kVector] = {};

  DEVICE_MEMBER Chunks(const Tile& of, int column)
      : tile(of), row(int(threadIdx.x) / kChunks), chunk(int(threadIdx.x) % kChunks) {
    first = column + chunk * kVector;
  }

  // Asks for the values of a step; every thread commits afterwards.
  DEVICE_MEMBER void load(unsigned char* to, int64_t begin, int64_t end) {
    const int left = tile.channels() - first;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int in_tile = row + i * kRowsApart;
      const int64_t index = begin + in_tile;
      const bool valid = index < end && left > 0;
      bits[i] = later[i], weight[i] = later_weight[i];
      later[i] = 0, later_weight[i] = 1.0f;
      if (valid) tile.beside(index, first, later[i], later_weight[i]);
      unsigned char* const place = to + offset_of(in_tile, chunk);
      const T* const from = tile.row(valid ? index : 0) + (left > 0 ? first : 0);
      if constexpr (kWhole) {
        cp_async_16(smem_address(place), from, valid);
      } else {
        const Raw<T> raw = load_raw<false>(from, valid ? left : 0);
        *reinterpret_cast<uint4*>(place) = word_of(raw);
      }
    }
  }

  // Replaces what has come by the recipe's values, rounded; 0 beyond the last row and column.
  DEVICE_MEMBER void prepare(unsigned char* in, int64_t begin, int64_t end) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      uint4* const place = reinterpret_cast<uint4*>(in + offset_of(row + i * kRowsApart, chunk));
      const uint4 word = *place;
      Raw<T> raw;
      memcpy(&raw, &word, sizeof(raw));
      const bool valid = begin + row + i * kRowsApart < end;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const bool inside = valid && first + j < tile.channels();
        raw.v[j] = Stored<T>::from(inside ? tile.value(to_float(raw.v[j]), j, bits[i], weight[i]) : 0.0f);
        sums[j] += to_float(raw.v[j]);
      }
      *place = word_of(raw);
    }
  }

  static DEVICE_MEMBER uint4 word_of(const Raw<T>& raw) {
    uint4 word;
    memcpy(&word, &raw, sizeof(word));
    return word;
  }
};

// The block's sums: acc[i][j][e] is the value at row_of_sum(i, e), column_of_sum(j, e) of the tile.
DEVICE_FN int row_of_sum(int i, int e) {
  const int lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) >> 5;
  return (warp & 1) * 32 + i * 16 + (lane >> 2) + (e >> 1) * 8;
}
DEVICE_FN int column_of_sum(int j, int e) {
  const int lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) >> 5;
  return (warp >> 1) * 32 + j * 8 + (lane & 3) * 2 + (e & 1);
}

template <class T, class Left, class Right>
DEVICE_FN void add_rows(float (&acc)[2][4][4], unsigned char* smem, Left& left, Right& right, int64_t begin, int64_t end) {
  const int lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) >> 5;
  const int warp_row = (warp & 1) * 32, warp_column = (warp >> 1) * 32;
  const auto load = [&](int64_t step) {
    const int64_t at = begin + step * kStep;
    unsigned char* const stage = smem + step % kStages * kStageBytes;
    left.load(stage, at, end);
    right.load(stage + kTileBytes, at, end);
    cp_async_commit();
  };
  const int64_t steps = (end - begin + kStep - 1) / kStep;
  load(0);
  load(1);
  for (int64_t step = 0; step < steps; ++step) {
    cp_async_wait<1>();
    unsigned char* const stage = smem + step % kStages * kStageBytes;
    left.prepare(stage, begin + step * kStep, end);
    right.prepare(stage + kTileBytes, begin + step * kStep, end);
    __syncthreads();  // the tiles are whole; and everybody has left the stage that is loaded next
    load(step + 2);
    const uint32_t of_left = smem_address(stage), of_right = of_left + kTileBytes;
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k) {
      uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ldmatrix_x4_trans(a[i], of_left + offset_of(k * 16 + (lane >> 4) * 8 + (lane & 7),
                                                    (warp_row + i * 16) / 8 + ((lane >> 3) & 1)));
        ldmatrix_x4_trans(b[i], of_right + offset_of(k * 16 + (lane & 15), (warp_column + i * 16) / 8 + (lane >> 4)));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t of_column[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          multiply(acc[i][j], a[i], of_column, T{});
        }
      }
    }
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
    for (int r = 0; r < kRowsApart; ++r) sum += scratch[r * kTile + int(threadIdx.x)];
    total[int(threadIdx.x)] = sum;
  }
  __syncthreads();
}

}  // namespace resfuse::cuda::outer
