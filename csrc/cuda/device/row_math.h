// How a step's products of a tile of row_product.h are taken: in 16 bits and tf32 on the matrix units, in float32 by fused
// multiply-adds.
#pragma once

#include <cstdlib>
#include <cstring>

#include "gradient.h"
#include "hopper_ptx.h"
#include "product_math.h"

namespace resfuse::cuda::by_rows {

using outer::lane;
using outer::MatrixSums;
using outer::multiply;

// A row of a tile is 128 bytes, eight words of 16. They are permuted by the row, so that a word of eight rows lies in
// different banks.
constexpr int kRowBytes = 128;
DEVICE_FN int swizzled(int row, int word) { return row * kRowBytes + ((word ^ row) & 7) * 16; }

// Where a word of the right tile lies: 128 bytes of columns after the other, each with a row for each place of kDepth.
template <int kDepth>
DEVICE_FN int right_offset(int row, int word) {
  return word / 8 * (kDepth * kRowBytes) + swizzled(row, word & 7);
}

// Storage, the tile (kRows x kColumns), depth of a step, stages, threads; byOutput: the right tile has a row for each
// column of the result, else for each place of the depth, 128 bytes of columns after the other. kRagged: tensors may be
// read value by value.

template <class T, int kWidth, bool byOutput, int kRing = 3>
struct Short {
  using Storage = T;
  static constexpr int kRows = 128, kColumns = kWidth, kDepth = 64, kStages = kRing;
  static constexpr int kThreads = 256, kBlocks = kWidth == 64 ? 2 : 1;
  static constexpr bool kByOutput = byOutput, kRagged = kWidth == 64, kWarpgroups = false;
  static constexpr int kM = 2, kN = kColumns / 16;
  using Sums = MatrixSums<kM, kN, 4>;

  // Two words on is another bit of an address, 16 rows on a sum.
  static DEVICE_MEMBER void add(Sums& sums, const unsigned char* left, const unsigned char* right) {
    const int column = Sums::warp_column();
    const uint32_t of_left = smem_address(left) + swizzled(Sums::warp_row() + (lane() & 15), lane() >> 4);
    const uint32_t of_right =
        smem_address(right) + (kByOutput ? swizzled(column + (lane() >> 4) * 8 + (lane() & 7), lane() >> 3 & 1)
                                         : right_offset<kDepth>(lane() & 15, column / 8 + (lane() >> 4)));
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t a[kM][4];
#pragma unroll
      for (int i = 0; i < kM; ++i) ldmatrix_x4(a[i], (of_left ^ k * 32) + i * 2048);
#pragma unroll
      for (int j = 0; j < kN; j += 2) {
        uint32_t b[4];
        if constexpr (kByOutput)
          ldmatrix_x4(b, (of_right ^ k * 32) + j * 1024);
        else
          ldmatrix_x4_trans(b, (of_right ^ j * 16) + k * 2048);
#pragma unroll
        for (int i = 0; i < kM; ++i)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t of_column[2] = {b[h * 2], b[h * 2 + 1]};
            multiply(sums.v[i][j + h], a[i], of_column, T{});
          }
      }
    }
  }
};

// A warpgroup's sums of 64 rows.
template <int kColumns>
struct WarpgroupSums {
  static constexpr int kCount = kColumns / 2;
  float v[kCount] = {};

  DEVICE_MEMBER float at(int n) const { return v[n]; }
  DEVICE_MEMBER float& at(int n) { return v[n]; }
  static DEVICE_MEMBER int row(int n) { return int(threadIdx.x) / 32 * 16 + (lane() >> 2) + (n >> 1 & 1) * 8; }
  static DEVICE_MEMBER int column(int n) { return (n >> 2) * 8 + (lane() & 3) * 2 + (n & 1); }
};

// The same tiles in the same places (their permutation is wgmma's of 128 bytes) by wgmma, which reads both in shared memory
// and goes on while its warps prepare the next step. On sm_90a alone.
template <int kWidth, bool byOutput>
struct Warpgroups : Short<__nv_bfloat16, kWidth, byOutput> {
  using Of = Short<__nv_bfloat16, kWidth, byOutput>;
  using Sums = WarpgroupSums<kWidth>;
  static constexpr int kBlocks = 2;
  static constexpr bool kRagged = false, kWarpgroups = true;

  static DEVICE_MEMBER void add(Sums& sums, const unsigned char* left, const unsigned char* right) {
#ifdef HAS_WGMMA
    const uint32_t of_left = smem_address(left) + int(threadIdx.x) / 128 * 64 * kRowBytes;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Of::kDepth / 16; ++k) {
      const uint64_t a = wgmma_descriptor(of_left + k * 32, 8 * kRowBytes);
      const uint64_t b = wgmma_descriptor(smem_address(right) + k * (byOutput ? 32 : 16 * kRowBytes), 8 * kRowBytes,
                                          byOutput ? 0 : Of::kDepth * kRowBytes);
      if constexpr (kWidth == 64)
        wgmma_m64n64k16_ss<!byOutput>(sums.v, a, b, true);
      else
        wgmma_m64n128k16_ss<!byOutput>(sums.v, a, b);
    }
    wgmma_commit();
#else
    __trap();  // by_warpgroups() chose this, and the library was built for sm_90 without the a
#endif
  }

  // The last step has been multiplied, and what this thread wrote is there for the next.
  static DEVICE_MEMBER void settle() {
#ifdef HAS_WGMMA
    wgmma_wait<0>();
    fence_proxy_async();
#endif
  }
};

// Whether bfloat16's are taken so: where they were measured to be the faster, or everywhere by RESFUSE_WGMMA=1, or
// nowhere by 0.
inline bool by_warpgroups(bool faster) {
  const char* const asked = std::getenv("RESFUSE_WGMMA");
  if (asked != nullptr ? std::strcmp(asked, "1") != 0 : !faster) return false;
#ifdef __CUDACC__
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
         minor == 0;
#else
  return true;
#endif
}

template <bool byOutput>
struct Wide {
  using Storage = float;
  static constexpr int kRows = 64, kColumns = 64, kDepth = 32, kStages = 3, kThreads = 128, kBlocks = 2;
  static constexpr bool kByOutput = byOutput, kRagged = true, kWarpgroups = false;
};

template <bool byOutput>
struct Tf32 : Wide<byOutput> {
  using Sums = MatrixSums<2, 4, 2>;
  using Of = Wide<byOutput>;

  static DEVICE_MEMBER uint32_t read(const unsigned char* word, int value) {
    return round_tf32(*reinterpret_cast<const float*>(word + value % 4 * 4));
  }
  static DEVICE_MEMBER uint32_t of_right(const unsigned char* right, int k, int column) {
    return byOutput ? read(right + swizzled(column, k / 4), k)
                    : read(right + right_offset<Of::kDepth>(k, column / 4), column);
  }

  static DEVICE_MEMBER void add(Sums& sums, const unsigned char* left, const unsigned char* right) {
#pragma unroll
    for (int step = 0; step < Of::kDepth / 8; ++step) {
      const int k = step * 8 + (lane() & 3), row = Sums::warp_row() + (lane() >> 2);
      const int column = Sums::warp_column() + (lane() >> 2);
      uint32_t a[2][4], b[4][2];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int at = k + (r >> 1) * 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) a[i][r] = read(left + swizzled(row + i * 16 + (r & 1) * 8, at / 4), at);
#pragma unroll
        for (int h = 0; h < 2; ++h) b[r][h] = of_right(right, k + h * 4, column + r * 8);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_m16n8k8_tf32(sums.v[i][j], a[i], b[j]);
    }
  }
};

// A thread has 8 x 4 values, of rows and columns that lie in different banks for the threads of a warp.
template <bool byOutput>
struct ExactSums {
  static constexpr int kCount = 32;
  float v[8][4] = {};

  DEVICE_MEMBER float at(int n) const { return v[n / 4][n % 4]; }
  DEVICE_MEMBER float& at(int n) { return v[n / 4][n % 4]; }
  static DEVICE_MEMBER int row(int n) { return (int(threadIdx.x) >> 5 & 1) * 32 + n / 4 * 4 + (lane() >> 3); }
  static DEVICE_MEMBER int column(int n) {
    return (int(threadIdx.x) >> 6) * 32 + (byOutput ? n % 4 * 8 + (lane() & 7) : (lane() & 7) * 4 + n % 4);
  }
};

template <bool byOutput>
struct Exact : Wide<byOutput> {
  using Sums = ExactSums<byOutput>;
  using Of = Wide<byOutput>;

  static DEVICE_MEMBER void words(float (&v)[4], const unsigned char* at) {
    const uint4 word = *reinterpret_cast<const uint4*>(at);
    memcpy(v, &word, sizeof(word));
  }

  // A step's products are summed by themselves: a sum of as many rounds less often.
  static DEVICE_MEMBER void add(Sums& sums, const unsigned char* left, const unsigned char* right) {
    float part[8][4] = {};
#pragma unroll 2
    for (int k = 0; k < Of::kDepth; k += 4) {
      float b[4][4];  // byOutput: four of the depth for each column, else four columns for each of the depth
#pragma unroll
      for (int j = 0; j < 4; ++j)
        words(b[j], right + (byOutput ? swizzled(Sums::column(j), k / 4)
                                      : right_offset<Of::kDepth>(k + j, Sums::column(0) / 4)));
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float a[4];
        words(a, left + swizzled(Sums::row(i * 4), k / 4));
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int d = 0; d < 4; ++d) part[i][j] = __fmaf_rn(a[d], byOutput ? b[j][d] : b[d][j], part[i][j]);
      }
    }
#pragma unroll
    for (int n = 0; n < Sums::kCount; ++n) sums.at(n) += part[n / 4][n % 4];
  }
};

// f called with how products of a dtype are taken; even: 128 columns a tile where the result has more than 64. faster:
// columns of the tiles, 64 or 128, that a kernel's warpgroups were measured to be faster with, or 0.
template <bool byOutput, int faster, class F>
int with_math(DType dtype, int columns, bool even, bool tf32, const F& f) {
  const bool narrow = columns <= 64 || !even;
  if (dtype == DType::kFloat) return tf32 ? f(Tf32<byOutput>{}) : f(Exact<byOutput>{});
  if (dtype == DType::kBFloat16 && even && by_warpgroups(faster == (narrow ? 64 : 128)))
    return narrow ? f(Warpgroups<64, byOutput>{}) : f(Warpgroups<128, byOutput>{});
  if (dtype == DType::kBFloat16)
    return narrow ? f(Short<__nv_bfloat16, 64, byOutput>{}) : f(Short<__nv_bfloat16, 128, byOutput>{});
  return narrow ? f(Short<__half, 64, byOutput>{}) : f(Short<__half, 128, byOutput>{});
}

}  // namespace resfuse::cuda::by_rows
