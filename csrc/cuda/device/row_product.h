// A tile of left @ right with float32 sums: rows of activations or gradients by a weight.
//
// The summed dimension (the depth) comes in steps of 128 bytes of a row through a ring of stages: raw values by
// asynchronous copies, some steps ahead; then each thread replaces the eight values of a row that it copied itself by the
// recipe's. What is done with a row's sums is the kernel's: it finds them in shared memory, where the stages were.
#pragma once

#include "row_math.h"
#include "rows.h"

namespace resfuse::cuda::by_rows {

// Where a block's tile lies: tiles side by side come one after the other, so that they find their rows in the L2 cache.
template <class Math>
struct Tile {
  int first;   // column
  int begin;   // row
  int inside;  // rows
  int index;   // of the tiles one below the other

  DEVICE_MEMBER Tile(int rows, int columns) {
    const int across = (columns + Math::kColumns - 1) / Math::kColumns;
    index = int(blockIdx.x) / across;
    first = int(blockIdx.x) % across * Math::kColumns;
    begin = index * Math::kRows;
    inside = rows - begin < Math::kRows ? rows - begin : Math::kRows;
  }
};

template <class Math>
dim3 tiles(int64_t rows, int columns) {
  const int64_t down = (rows + Math::kRows - 1) / Math::kRows;
  return dim3(unsigned(down * ((columns + Math::kColumns - 1) / Math::kColumns)));
}

// What of a step's left tile is a thread's: eight values in each of kCount rows.
template <class Math>
struct Mine {
  using T = typename Math::Storage;
  static constexpr int kChunks = Math::kDepth / kVector, kApart = Math::kThreads / kChunks;
  static constexpr int kCount = Math::kRows / kApart, kWords = kVector * int(sizeof(T)) / 16;

  int row = int(threadIdx.x) / kChunks, first = int(threadIdx.x) % kChunks * kVector;  // row, and depth in the step

  DEVICE_MEMBER unsigned char* place(unsigned char* tile, int i, int word) const {
    return tile + swizzled(row + i * kApart, first * int(sizeof(T)) / 16 + word);
  }
  template <bool kWhole>
  DEVICE_MEMBER void copy(unsigned char* tile, int i, const T* from, bool valid, int left) const {
    if constexpr (kWhole) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) cp_async_16(smem_address(place(tile, i, w)), from + w * (16 / sizeof(T)), valid);
    } else {
      put(tile, i, load_raw<false>(from, valid ? left : 0));
    }
  }
  DEVICE_MEMBER Raw<T> get(unsigned char* tile, int i) const {
    uint4 words[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = *reinterpret_cast<const uint4*>(place(tile, i, w));
    Raw<T> raw;
    memcpy(&raw, words, sizeof(raw));
    return raw;
  }
  DEVICE_MEMBER void put(unsigned char* tile, int i, const Raw<T>& raw) const {
    uint4 words[kWords];
    memcpy(words, &raw, sizeof(raw));
#pragma unroll
    for (int w = 0; w < kWords; ++w) *reinterpret_cast<uint4*>(place(tile, i, w)) = words[w];
  }
};

template <class Math>
constexpr int kLeftBytes = Math::kRows * kRowBytes;
template <class Math>
constexpr int kRightBytes = Math::kColumns * Math::kDepth * int(sizeof(typename Math::Storage));

// Rows of an activation: act(scale * x + shift), rounded.
template <class Math, bool kWhole>
struct ActivationRows {
  using T = typename Math::Storage;
  static constexpr int kBytes = kLeftBytes<Math>;

  const Activation& a;
  const Mine<Math> mine;
  const T* at[Mine<Math>::kCount];  // null beyond the last row

  DEVICE_MEMBER ActivationRows(const Activation& given, int begin, int inside) : a(given) {
#pragma unroll
    for (int i = 0; i < mine.kCount; ++i) {
      const int row = mine.row + i * mine.kApart;
      at[i] = row < inside ? row_of<T>(a.x, begin + row) + mine.first : nullptr;
    }
  }
  DEVICE_MEMBER int depth() const { return a.x.channels; }
  DEVICE_MEMBER void load_bits(int) {}

  DEVICE_MEMBER void load(unsigned char* stage, int k) const {
    const int left = depth() - k - mine.first;
#pragma unroll
    for (int i = 0; i < mine.kCount; ++i) {
      const bool valid = at[i] != nullptr && left > 0;
      mine.template copy<kWhole>(stage, i, valid ? at[i] + k : static_cast<const T*>(a.x.data), valid, left);
    }
  }

  DEVICE_MEMBER void prepare(unsigned char* stage, int k) const {
    if (a.scale == nullptr) return;
    float scale[kVector], shift[kVector];
    load_vector(scale, a.scale, k + mine.first, depth(), 1.0f);
    load_vector(shift, a.shift, k + mine.first, depth(), 0.0f);
    const float bound = lower_bound(a.relu);
#pragma unroll 1  // the sums hold most registers
    for (int i = 0; i < mine.kCount; ++i) {
      const Raw<T> raw = mine.get(stage, i);
      float v[kVector];
#pragma unroll
      for (int c = 0; c < kVector; ++c) v[c] = at_least(affine(to_float(raw.v[c]), scale[c], shift[c]), bound);
      mine.put(stage, i, to_raw(v, T{}));
    }
  }
};

// Rows of a gradient below its mask and, with kBatchNorm, through BatchNorm, rounded; `written`: where they are kept as
// well, unless null.
template <class Math, bool kWhole, bool kBatchNorm>
struct GradientRows {
  using T = typename Math::Storage;
  static constexpr int kBytes = kLeftBytes<Math> * (kBatchNorm ? 2 : 1);  // dout's tile, and z's

  const Gradient& g;
  T* const written;
  const Mine<Math> mine;
  int begin, inside;
  int64_t start;      // of the thread's first row
  uint32_t bits = 0;  // of the step that is next, a byte for each row: on their way

  DEVICE_MEMBER GradientRows(const Gradient& given, int first_row, int rows, T* kept = nullptr)
      : g(given), written(kept), begin(first_row), inside(rows),
        start(int64_t(first_row + mine.row) * given.channels + mine.first) {}
  DEVICE_MEMBER int depth() const { return g.channels; }
  DEVICE_MEMBER int row(int i) const { return begin + mine.row + i * mine.kApart; }
  DEVICE_MEMBER bool valid(int i) const { return mine.row + i * mine.kApart < inside; }
  DEVICE_MEMBER float weight(int i) const {
    return g.row_scale != nullptr && valid(i) ? g.factor * g.row_scale[sample_of(row(i), g.pixels)] : g.factor;
  }
  DEVICE_MEMBER uint8_t bits_of(int i) const { return uint8_t(bits >> i * 8); }
  DEVICE_MEMBER int64_t offset(int i, int k) const { return start + (i * mine.kApart * g.channels + k); }

  DEVICE_MEMBER void load_bits(int k) {
    bits = 0xffffffffu;
    if (g.mask == nullptr || k + mine.first >= g.channels) return;
    const int of_row = (g.channels + 7) / 8;
    bits = 0;
#pragma unroll
    for (int i = 0; i < mine.kCount; ++i)
      if (valid(i)) bits |= uint32_t(g.mask[int64_t(row(i)) * of_row + (k + mine.first) / 8]) << i * 8;
  }

  DEVICE_MEMBER void load(unsigned char* stage, int k) const {
    const int left = g.channels - k - mine.first;
#pragma unroll
    for (int i = 0; i < mine.kCount; ++i) {
      const bool there = valid(i) && left > 0;
      const int64_t at = there ? offset(i, k) : 0;
      mine.template copy<kWhole>(stage, i, static_cast<const T*>(g.dout) + at, there, left);
      if constexpr (kBatchNorm)
        mine.template copy<kWhole>(stage + kLeftBytes<Math>, i, static_cast<const T*>(g.z) + at, there, left);
    }
  }

  DEVICE_MEMBER void prepare(unsigned char* stage, int k) const {
    if constexpr (kBatchNorm) {
      const GradientVectors vectors(g, k + mine.first);
      const int left = g.channels - k - mine.first;
#pragma unroll 1
      for (int i = 0; i < mine.kCount; ++i) {
        const GradientRaw<T> raw = {mine.get(stage, i), mine.get(stage + kLeftBytes<Math>, i), bits_of(i), weight(i)};
        float v[kVector];
        gradient_values(v, g, raw, vectors);
        const Raw<T> made = to_raw(v, T{});
        mine.put(stage, i, made);
        if (written != nullptr && valid(i) && left > 0) store_raw<kWhole>(written + offset(i, k), made, left);
      }
    } else {
      if (g.mask == nullptr && g.row_scale == nullptr && g.factor == 1.0f) return;
#pragma unroll 1
      for (int i = 0; i < mine.kCount; ++i) {
        const Raw<T> raw = mine.get(stage, i);
        const uint32_t open = bits_of(i);
        const float times = weight(i);
        float v[kVector];
#pragma unroll
        for (int c = 0; c < kVector; ++c) {
          v[c] = open >> c & 1 ? to_float(raw.v[c]) : 0.0f;
          if (times != 1.0f) v[c] = v[c] * times;
        }
        mine.put(stage, i, to_raw(v, T{}));
      }
    }
  }
};

// The weight that a product reads, of less than 2^31 values: [columns, depth] where Math has it by output, else [depth,
// columns].
template <class Math, bool kWhole>
struct Weight {
  using T = typename Math::Storage;
  static constexpr int kRows = Math::kByOutput ? Math::kColumns : Math::kDepth;
  static constexpr int kValues = 16 / int(sizeof(T));
  static constexpr int kAcross = (Math::kByOutput ? Math::kDepth : Math::kColumns) / kValues;

  const T* data;
  int depth, columns, first;

  DEVICE_MEMBER void load(unsigned char* tile, int k) const {
    const int row0 = Math::kByOutput ? first : k, column0 = Math::kByOutput ? k : first;
    const int rows = Math::kByOutput ? columns : depth, width = Math::kByOutput ? depth : columns;
#pragma unroll
    for (int i = 0; i < kRows * kAcross / Math::kThreads; ++i) {
      const int index = int(threadIdx.x) + i * Math::kThreads;
      const int row = index / kAcross, word = index % kAcross;
      const int left = row0 + row < rows ? width - column0 - word * kValues : 0;
      const T* const from = data + (left > 0 ? (row0 + row) * width + column0 + word * kValues : 0);
      unsigned char* const to = tile + right_offset<Math::kDepth>(row, word);
      if constexpr (kWhole) {
        cp_async_16(smem_address(to), from, left > 0);
      } else {
        T values[kValues];
#pragma unroll
        for (int v = 0; v < kValues; ++v) values[v] = v < left ? from[v] : Stored<T>::from(0.0f);
        uint4 packed;
        memcpy(&packed, values, sizeof(packed));
        *reinterpret_cast<uint4*>(to) = packed;
      }
    }
  }
};

template <class Math, class Left>
constexpr int kStageBytes = Left::kBytes + kRightBytes<Math>;

// sums += left @ right. Afterwards everybody has left the stages.
template <class Math, class Left, class Right>
DEVICE_FN void add_product(typename Math::Sums& sums, unsigned char* smem, Left& left, const Right& right) {
  constexpr int kStages = Math::kStages, kBytes = kStageBytes<Math, Left>;
  const int count = (left.depth() + Math::kDepth - 1) / Math::kDepth;
  const auto load = [&](unsigned char* stage, int step) {
    left.load(stage, step * Math::kDepth);
    right.load(stage + Left::kBytes, step * Math::kDepth);
    cp_async_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) load(smem + step * kBytes, step);
  left.load_bits(0);
  int now = 0, next = kStages - 1;
  for (int step = 0; step < count; ++step) {
    cp_async_wait<kStages - 2>();
    unsigned char* const stage = smem + now * kBytes;
    left.prepare(stage, step * Math::kDepth);
    if constexpr (Math::kWarpgroups) Math::settle();
    __syncthreads();  // the tiles are whole; and everybody has left the stage that is loaded next
    load(smem + next * kBytes, step + kStages - 1);
    left.load_bits((step + 1) * Math::kDepth);
    Math::add(sums, stage, stage + Left::kBytes);
    next = now, now = now + 1 == kStages ? 0 : now + 1;
  }
  if constexpr (Math::kWarpgroups) Math::settle();
  cp_async_wait<0>();
  __syncthreads();
}

// Sums as rows of a tile in shared memory, [kRows, kPitch].
template <class Math>
constexpr int kPitch = Math::kColumns + 8;
template <class Math>
constexpr int kSumBytes = Math::kRows * kPitch<Math> * 4;
template <class Math, class Left>
constexpr int kSharedBytes = Math::kStages * kStageBytes<Math, Left>;

template <class Math>
DEVICE_FN void put_sums(float* tile, const typename Math::Sums& sums) {
#pragma unroll
  for (int n = 0; n < Math::Sums::kCount; ++n) tile[sums.row(n) * kPitch<Math> + sums.column(n)] = sums.at(n);
}

// A thread's eight columns, and the rows of the tile that it takes: every kApart-th.
template <class Math>
struct Finish {
  static constexpr int kAcross = Math::kColumns / kVector, kApart = Math::kThreads / kAcross;

  int column = int(threadIdx.x) % kAcross * kVector, row = int(threadIdx.x) / kAcross;

  DEVICE_MEMBER void get(float (&v)[kVector], const float* tile, int at) const {
    const float4* const from = reinterpret_cast<const float4*>(tile + at * kPitch<Math> + column);
    const float4 words[2] = {from[0], from[1]};
    memcpy(v, words, sizeof(v));
  }
  // The values as they were stored, for moments.
  template <class T>
  DEVICE_MEMBER void put(float* tile, int at, const Raw<T>& stored) const {
    float4 words[2];
    float v[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = to_float(stored.v[i]);
    memcpy(words, v, sizeof(v));
    float4* const to = reinterpret_cast<float4*>(tile + at * kPitch<Math> + column);
    to[0] = words[0], to[1] = words[1];
  }
};

// Mean and sum of squares about it of each column of the tile's first `inside` rows, to partial [tiles, 2, columns]. Of a
// column kParts threads each take every kParts-th row; they are added in order. scratch [kThreads].
template <class Math>
DEVICE_FN void store_moments(float* partial, float* scratch, const float* tile, const Tile<Math>& at, int columns) {
  constexpr int kParts = Math::kThreads / Math::kColumns;
  const int column = int(threadIdx.x) % Math::kColumns, part = int(threadIdx.x) / Math::kColumns;
  const auto all = [&](float own) {
    scratch[int(threadIdx.x)] = own;
    __syncthreads();  // the parts are whole
    float sum = 0.0f;
#pragma unroll
    for (int p = 0; p < kParts; ++p) sum += scratch[p * Math::kColumns + column];
    __syncthreads();  // everybody has read them
    return sum;
  };
  __syncthreads();  // the tile's values are those that were stored
  float own = 0.0f;
  for (int row = part; row < at.inside; row += kParts) own += tile[row * kPitch<Math> + column];
  const float mean = all(own) / float(at.inside);
  own = 0.0f;
  for (int row = part; row < at.inside; row += kParts) {
    const float apart = tile[row * kPitch<Math> + column] - mean;
    own += apart * apart;
  }
  const float squares = all(own);
  if (part != 0 || at.first + column >= columns) return;
  float* const to = partial + int64_t(at.index) * 2 * columns + at.first + column;
  to[0] = mean;
  to[columns] = squares;
}

}  // namespace resfuse::cuda::by_rows
