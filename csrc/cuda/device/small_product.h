// A tile of the product of two small matrices, weights and covariances, by fused multiply-adds in float32: exact,
// whatever torch's switches say.
//
// Slices of kDepth of the summed dimension come through shared memory, converted to float32, each asked for while the
// one before it is multiplied. A thread has 4 x 4 of the tile's sums, over its group's share of each slice; the groups'
// sums are added in order.
#pragma once

#include "rows.h"

namespace resfuse::cuda::small {

constexpr int kDepth = 64, kSide = 4;

// Row by row in memory.
template <class T>
struct Matrix {
  const T* data;
  int rows, columns;
};

// Eight values of a row; 0 outside of the matrix.
template <bool kWhole, class T>
DEVICE_FN Raw<T> load_chunk(const Matrix<T>& m, int row, int column) {
  if (row < m.rows && column < m.columns)
    return load_raw<kWhole>(m.data + int64_t(row) * m.columns + column, m.columns - column);
  Raw<T> none;
#pragma unroll
  for (int i = 0; i < kVector; ++i) none.v[i] = Stored<T>::from(0.0f);
  return none;
}

struct One {
  DEVICE_MEMBER float operator()(int) const { return 1.0f; }
};

// What a thread brings of an operand's slices, kWidth wide from `first` on. kDown: the summed dimension is the matrix's
// rows; otherwise its columns, and the slice is turned on its way. factor(depth) multiplies what it is called for.
template <class T, bool kWhole, int kWidth, bool kDown, class Factor = One>
struct Slice {
  static constexpr int kChunks = kDepth * kWidth / kVector, kMine = (kChunks + kThreads - 1) / kThreads;
  static constexpr int kChunksOfRow = kDown ? kWidth / kVector : kDepth / kVector;

  Matrix<T> of;
  int first;
  Factor factor = {};
  Raw<T> raw[kMine];
  float times[kMine];

  DEVICE_MEMBER Slice(const Matrix<T>& matrix, int at, Factor by = {}) : of(matrix), first(at), factor(by) {}

  // Of the i-th chunk: its depth in the slice, and its place across.
  static DEVICE_MEMBER int index(int i) { return int(threadIdx.x) + i * kThreads; }
  static DEVICE_MEMBER bool mine(int i) { return kChunks % kThreads == 0 || index(i) < kChunks; }
  static DEVICE_MEMBER int depth(int i) { return kDown ? index(i) / kChunksOfRow : index(i) / kWidth * kVector; }
  static DEVICE_MEMBER int across(int i) { return kDown ? index(i) % kChunksOfRow * kVector : index(i) % kWidth; }

  // Asks for the slice from `begin` on.
  DEVICE_MEMBER void load(int begin) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      if (!mine(i)) break;
      const int deep = begin + depth(i), wide = first + across(i);
      raw[i] = load_chunk<kWhole>(of, kDown ? deep : wide, kDown ? wide : deep);
      times[i] = factor(deep);
    }
  }

  // to [kDepth, kWidth].
  DEVICE_MEMBER void store(float* to) const {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      if (!mine(i)) break;
      Raw<float> found;
#pragma unroll
      for (int j = 0; j < kVector; ++j) found.v[j] = to_float(raw[i].v[j]) * times[i];
      float* const at = to + depth(i) * kWidth + across(i);
      if constexpr (kDown) {
        store_raw<true>(at, found, kVector);
      } else {
#pragma unroll
        for (int j = 0; j < kVector; ++j) at[j * kWidth] = found.v[j];
      }
    }
  }
};

// kRows x kColumns sums of a block of kThreads, in shared memory of kFloats.
template <int kRows, int kColumns>
struct Tile {
  static constexpr int kSums = kRows * kColumns, kOfGroup = kSums / (kSide * kSide), kGroups = kThreads / kOfGroup;
  static constexpr int kFloats = kDepth * (kRows + kColumns), kOfRow = kColumns / kVector;
  static_assert(kGroups * kSums <= kFloats, "the groups' sums lie where the slices were");

  float v[kSide][kSide] = {};

  // The sums that a thread has in the end: eight of a row, where has().
  static DEVICE_MEMBER int row() { return int(threadIdx.x) / kOfRow; }
  static DEVICE_MEMBER int column() { return int(threadIdx.x) % kOfRow * kVector; }
  static DEVICE_MEMBER bool has() { return int(threadIdx.x) < kSums / kVector; }

  static DEVICE_MEMBER int group() { return int(threadIdx.x) / kOfGroup; }
  static DEVICE_MEMBER int down() { return int(threadIdx.x) % kOfGroup % (kRows / kSide) * kSide; }
  static DEVICE_MEMBER int across() { return int(threadIdx.x) % kOfGroup / (kRows / kSide) * kSide; }

  // Adds the product over a depth up to `end`; left and right hold its first slice.
  template <class Left, class Right>
  DEVICE_MEMBER void add(float* smem, Left& left, Right& right, int end) {
    float* const beside = smem + kDepth * kRows;
    for (int begin = 0; begin < end; begin += kDepth) {
      __syncthreads();  // what was there has been read
      left.store(smem);
      right.store(beside);
      __syncthreads();  // the slices are whole
      if (begin + kDepth < end) {
        left.load(begin + kDepth);
        right.load(begin + kDepth);
      }
      multiply(smem + down(), beside + across());
    }
  }

  // The sums over the groups, for the threads that have some.
  DEVICE_MEMBER void total(float (&sums)[kVector], float* smem) const {
    __syncthreads();  // the slices have been read
    float* const to = smem + group() * kSums + down() * kColumns + across();
#pragma unroll
    for (int r = 0; r < kSide; ++r)
      *reinterpret_cast<float4*>(to + r * kColumns) = make_float4(v[r][0], v[r][1], v[r][2], v[r][3]);
    __syncthreads();  // the groups' sums are whole
    if (!has()) return;
#pragma unroll
    for (int i = 0; i < kVector; ++i) sums[i] = 0.0f;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const Raw<float> of_group = load_raw<true>(smem + g * kSums + row() * kColumns + column(), kVector);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums[i] += of_group.v[i];
    }
  }

 private:
  DEVICE_MEMBER void multiply(const float* left, const float* right) {
#pragma unroll 4
    for (int d = group(); d < kDepth; d += kGroups) {
      const float4 x = *reinterpret_cast<const float4*>(left + d * kRows);
      const float4 y = *reinterpret_cast<const float4*>(right + d * kColumns);
      const float a[kSide] = {x.x, x.y, x.z, x.w}, b[kSide] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int r = 0; r < kSide; ++r)
#pragma unroll
        for (int c = 0; c < kSide; ++c) v[r][c] = __fmaf_rn(a[r], b[c], v[r][c]);
    }
  }
};

// The sum over kLanes threads side by side, the same for all of them.
template <int kLanes>
DEVICE_FN float sum_of_lanes(float v) {
#pragma unroll
  for (int half = kLanes / 2; half > 0; half /= 2) v += __shfl_xor_sync(0xffffffffu, v, half);
  return v;
}

}  // namespace resfuse::cuda::small
