// How a step's products of a tile of outer_product.h are taken: in 16 bits and tf32 on the matrix units, in float32 by
// fused multiply-adds.
#pragma once

#include "rows.h"

namespace resfuse::cuda::outer {

DEVICE_FN int lane() { return int(threadIdx.x) & 31; }

// A warp's sums as mma.sync has them: kM x kN fragments of 16 x 8 a warp, of kWarpsDown warps one below the other. Value
// n of a thread is of row(n) and column(n) of the tile.
template <int kM, int kN, int kWarpsDown>
struct MatrixSums {
  static constexpr int kCount = kM * kN * 4;
  float v[kM][kN][4] = {};

  static DEVICE_MEMBER int warp_row() { return (int(threadIdx.x) >> 5) % kWarpsDown * kM * 16; }
  static DEVICE_MEMBER int warp_column() { return (int(threadIdx.x) >> 5) / kWarpsDown * kN * 8; }
  DEVICE_MEMBER float at(int n) const { return v[n / 4 / kN][n / 4 % kN][n % 4]; }
  DEVICE_MEMBER float& at(int n) { return v[n / 4 / kN][n / 4 % kN][n % 4]; }
  static DEVICE_MEMBER int row(int n) { return warp_row() + n / 4 / kN * 16 + (lane() >> 2) + (n % 4 >> 1) * 8; }
  static DEVICE_MEMBER int column(int n) { return warp_column() + n / 4 % kN * 8 + (lane() & 3) * 2 + (n & 1); }
};

DEVICE_FN void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  mma_m16n8k16_bf16(d, a, b);
}
DEVICE_FN void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  mma_m16n8k16_f16(d, a, b);
}

// How a product is taken: Storage and what of a value it reads, the tile (kLeft x kRight), its threads, rows a step and
// stages, where a tile has 16 bytes of a row, and the sums that a step adds to.

// 16 bits: uncentred, since a centred value would have to be rounded again.
//
// The matrix units cut off what they cannot hold, which in a long sum of values of one sign adds up. kApart: products of
// 32 rows are summed by themselves, and added to the others rounding to nearest.
template <class T, int kOfLeft, int kOfRight, int kDown, int kRowsAStep, int kRing, bool kApart>
struct Short {
  using Storage = T;
  static constexpr int kLeft = kOfLeft, kRight = kOfRight, kStep = kRowsAStep, kStages = kRing;
  static constexpr int kThreads = 256, kBlocks = 2;
  static constexpr int kWarpsDown = kDown, kWarpsAcross = kThreads / 32 / kDown;
  static constexpr int kM = kLeft / kDown / 16, kN = kRight / kWarpsAcross / 8;
  static constexpr bool kCentred = false;

  using Sums = MatrixSums<kM, kN, kDown>;

  // 64 columns after the other. Words of a row are permuted by the row, so that eight rows of one column lie in
  // different banks.
  static DEVICE_MEMBER int offset(int row, int word) {
    return word / 8 * (kStep * 128) + row * 128 + ((word ^ row) & 7) * 16;
  }

  static DEVICE_MEMBER int warp_across() { return (int(threadIdx.x) >> 5) / kDown; }

  // Where a lane's first rows of the fragments lie: two words on is another bit of the address, 16 rows on a sum.
  static DEVICE_MEMBER uint32_t of_left(const unsigned char* tile) {
    return smem_address(tile) + offset((lane() >> 4) * 8 + (lane() & 7), Sums::warp_row() / 8 + (lane() >> 3 & 1));
  }
  static DEVICE_MEMBER uint32_t of_right(const unsigned char* tile) {
    return smem_address(tile) + offset(lane() & 15, Sums::warp_column() / 8 + (lane() >> 4));
  }

  // d += the products of kRows rows.
  template <int kRows>
  static DEVICE_MEMBER void add(float (&d)[kM][kN][4], uint32_t left, uint32_t right) {
#pragma unroll
    for (int k = 0; k < kRows / 16; ++k) {
      uint32_t a[kM][4];
#pragma unroll
      for (int i = 0; i < kM; ++i) ldmatrix_x4_trans(a[i], (left ^ i * 32) + k * 2048);
#pragma unroll
      for (int j = 0; j < kN; j += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, (right ^ j * 16) + k * 2048);
#pragma unroll
        for (int i = 0; i < kM; ++i)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t of_column[2] = {b[h * 2], b[h * 2 + 1]};
            multiply(d[i][j + h], a[i], of_column, T{});
          }
      }
    }
  }

  // A step's sums of the left tile's columns, as products with ones; one thread adds each to total [kLeft].
  static DEVICE_MEMBER void add_columns(float* total, uint32_t left) {
    const uint32_t one = pack(1.0f, 1.0f, T{}), ones[2] = {one, one};
#pragma unroll
    for (int n = 0; n < (kM + kWarpsAcross - 1) / kWarpsAcross; ++n) {
      const int i = n * kWarpsAcross + warp_across();
      if (i >= kM) return;
      float d[4] = {};
#pragma unroll
      for (int k = 0; k < kStep / 16; ++k) {
        uint32_t a[4];
        ldmatrix_x4_trans(a, (left ^ i * 32) + k * 2048);
        multiply(d, a, ones, T{});
      }
      float* const of_fragment = total + Sums::warp_row() + i * 16 + (lane() >> 2);
      if ((lane() & 3) == 0) of_fragment[0] += d[0], of_fragment[8] += d[2];
    }
  }

  // total: what the sums of the left tile's columns are added to, unless null.
  static DEVICE_MEMBER void add(Sums& sums, const unsigned char* left, const unsigned char* right, float* total) {
    const uint32_t l = of_left(left), r = of_right(right);
    if (total != nullptr) add_columns(total, l);
    if constexpr (kApart) {
#pragma unroll
      for (int k = 0; k < kStep / 16; k += 2) {
        float part[kM][kN][4] = {};
        add<32>(part, l + k * 2048, r + k * 2048);
#pragma unroll
        for (int i = 0; i < kM; ++i)
#pragma unroll
          for (int j = 0; j < kN; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums.v[i][j][e] += part[i][j][e];
      }
    } else {
      add<kStep>(sums.v, l, r);
    }
  }

  // f(column, sum, pivot) for each of the left tile's columns, in one thread each.
  template <class Left, class F>
  static DEVICE_MEMBER void each_column(const float* total, const Left&, unsigned char*, const F& f) {
    __syncthreads();
    const int column = int(threadIdx.x);
    if (column < kLeft) f(column, total[column], 0.0f);
  }
};

// float32, about a pivot: it keeps the digits that sums of uncentred products lose.
struct Wide {
  using Storage = float;
  static constexpr int kLeft = 64, kRight = 64, kStep = 16, kStages = 3, kThreads = 128, kBlocks = 3;
  static constexpr bool kCentred = true;

  // Permuted so that eight even words, eight words in line, and four rows of two words lie in different banks.
  static DEVICE_MEMBER int offset(int row, int word) { return row * 256 + (word ^ (word >> 3 & 1) ^ (row & 3) * 2) * 16; }

  // Each thread has the sums of its chunk's columns over its own rows; they are added in thread order, in the stages.
  template <class Left, class F>
  static DEVICE_MEMBER void each_column(const float*, const Left& left, unsigned char* smem, const F& f) {
    float* const total = add_columns(left, reinterpret_cast<float*>(smem));
    if (left.row != 0) return;
#pragma unroll
    for (int j = 0; j < kVector; ++j) f(left.chunk * kVector + j, total[left.chunk * kVector + j], left.pivot[j]);
  }

  // total[kLeft]: the sum of each of the tile's columns over the block's threads, valid for all threads.
  template <class Of>
  static DEVICE_MEMBER float* add_columns(const Of& chunks, float* scratch) {
    float* const total = scratch + Of::kApart * kLeft;
    __syncthreads();  // the stages have been read
#pragma unroll
    for (int j = 0; j < kVector; ++j) scratch[chunks.row * kLeft + chunks.chunk * kVector + j] = chunks.sums[j];
    __syncthreads();
    if (int(threadIdx.x) < kLeft) {
      float sum = 0.0f;
      for (int r = 0; r < Of::kApart; ++r) sum += scratch[r * kLeft + int(threadIdx.x)];
      total[int(threadIdx.x)] = sum;
    }
    __syncthreads();
    return total;
  }
};

struct Tf32 : Wide {
  using Sums = MatrixSums<2, 4, 2>;

  static DEVICE_MEMBER float read(float value, float pivot, bool) { return __uint_as_float(round_tf32(value - pivot)); }

  static DEVICE_MEMBER uint32_t word(const unsigned char* tile, int row, int column) {
    return *reinterpret_cast<const uint32_t*>(tile + offset(row, column / 4) + column % 4 * 4);
  }

  static DEVICE_MEMBER void add(Sums& sums, const unsigned char* left, const unsigned char* right, float*) {
#pragma unroll
    for (int step = 0; step < kStep / 8; ++step) {
      const int k = step * 8 + (lane() & 3), row = Sums::warp_row(), column = Sums::warp_column() + (lane() >> 2);
      uint32_t a[2][4], b[4][2];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) a[i][r] = word(left, k + (r >> 1) * 4, row + i * 16 + (lane() >> 2) + (r & 1) * 8);
#pragma unroll
        for (int h = 0; h < 2; ++h) b[r][h] = word(right, k + h * 4, column + r * 8);
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
  static constexpr int kCount = 32;
  float v[8][4] = {};

  DEVICE_MEMBER float at(int n) const { return v[n / 4][n % 4]; }
  static DEVICE_MEMBER int row(int n) { return (int(threadIdx.x) >> 5 & 1) * 32 + (lane() >> 3) * 8 + n / 4; }
  static DEVICE_MEMBER int column(int n) { return (int(threadIdx.x) >> 6) * 32 + (lane() & 7) * 4 + n % 4; }
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

  // A step's products are summed by themselves: a sum of as many rounds less often.
  static DEVICE_MEMBER void add(Sums& sums, const unsigned char* left, const unsigned char* right, float*) {
    float part[8][4] = {};
#pragma unroll 4
    for (int k = 0; k < kStep; ++k) {
      float a[8], b[4];
      words(a, left, k, Sums::row(0));
      words(a + 4, left, k, Sums::row(0) + 4);
      words(b, right, k, Sums::column(0));
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) part[i][j] = __fmaf_rn(a[i], b[j], part[i][j]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums.v[i][j] += part[i][j];
  }
};

}  // namespace resfuse::cuda::outer
