// A tile of left.T @ right, summed over a share of the rows, with float32 sums (product_math.h).
//
// Rows come in steps through a ring of stages: raw values by asynchronous copies, some steps ahead; then each thread
// replaces the chunks that it copied itself by the recipe's values, and all warps read both tiles transposed, since the
// summed dimension is their slow one. The sums of the left tile's columns come on the way.
#pragma once

#include "gradient.h"
#include "product_math.h"
#include "rows.h"

namespace resfuse::cuda::outer {

// An activation's columns: act(scale * x + shift), rounded; 0 beyond the last. Its vectors lie in shared memory, kWidth
// of scale and then of shift, so that they take registers only where they are used.
template <class T, int kWidth>
struct ActivationTile {
  struct Vectors {
    float scale[kVector], shift[kVector];
  };

  Rows x;
  int first;
  bool recipe;
  float bound;
  const float* beside;
  const T* at;

  // vectors [2 * kWidth]: may be read after the block's next barrier.
  DEVICE_MEMBER ActivationTile(const Activation& a, int column, int chunk, float* vectors)
      : x(a.x), first(column + chunk * kVector), recipe(a.scale != nullptr), bound(lower_bound(a.relu)),
        beside(vectors + chunk * kVector) {
    const int c = int(threadIdx.x);
    if (!recipe || c >= kWidth) return;
    vectors[c] = column + c < x.channels ? a.scale[column + c] : 1.0f;
    vectors[kWidth + c] = a.shift != nullptr && column + c < x.channels ? a.shift[column + c] : 0.0f;
  }
  DEVICE_MEMBER int channels() const { return x.channels; }

  // The row that is read next: `index`, which is counted here as well, since most are `rows` below the one before.
  DEVICE_MEMBER void begin(int index) { at = static_cast<const T*>(x.data) + int64_t(index) * x.channels + first; }
  DEVICE_MEMBER void advance(int rows) { at += rows * x.channels; }
  DEVICE_MEMBER const T* row(int index) const {
    return x.view.pixels == 0 ? at : row_of<T>(x, index) + first;
  }
  DEVICE_MEMBER const T* mapped() const { return static_cast<const T*>(x.data); }

  DEVICE_MEMBER void advance_bits(int) {}
  DEVICE_MEMBER uint8_t bits() const { return 0xff; }
  DEVICE_MEMBER float weight(int) const { return 1.0f; }
  DEVICE_MEMBER bool changes() const { return recipe; }
  DEVICE_MEMBER Vectors vectors() const {
    Vectors v = {};
    if (!recipe) return v;
    const uint4* const from = reinterpret_cast<const uint4*>(beside);
    const uint4 words[4] = {from[0], from[1], from[kWidth / 4], from[kWidth / 4 + 1]};
    memcpy(&v, words, sizeof(v));
    return v;
  }
  DEVICE_MEMBER float value(float v, int i, const Vectors& by, uint32_t, float) const {
    return recipe ? at_least(affine(v, by.scale[i], by.shift[i]), bound) : v;
  }
  DEVICE_MEMBER void change(uint32_t (&words)[4], const Vectors& by, uint32_t, float) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack(words[i], T{});
      words[i] = pack(value(x.x, i * 2, by, 0, 0.0f), value(x.y, i * 2 + 1, by, 0, 0.0f), T{});
    }
  }
};

// A gradient's columns below its mask.
template <class T>
struct GradientTile {
  struct Vectors {};

  const Gradient& g;
  int first;
  const T* at;
  const uint8_t* mask;

  DEVICE_MEMBER GradientTile(const Gradient& given, int column, int chunk, float*)
      : g(given), first(column + chunk * kVector) {}
  DEVICE_MEMBER int channels() const { return g.channels; }
  DEVICE_MEMBER void begin(int index) {
    at = static_cast<const T*>(g.dout) + int64_t(index) * g.channels + first;
    mask = g.mask + int64_t(index) * ((g.channels + 7) / 8) + first / 8;
  }
  DEVICE_MEMBER void advance(int rows) { at += rows * g.channels; }
  DEVICE_MEMBER void advance_bits(int rows) { mask += rows * ((g.channels + 7) / 8); }
  DEVICE_MEMBER const T* row(int) const { return at; }
  DEVICE_MEMBER const T* mapped() const { return static_cast<const T*>(g.dout); }

  DEVICE_MEMBER uint8_t bits() const { return g.mask != nullptr ? *mask : uint8_t(0xff); }
  DEVICE_MEMBER float weight(int index) const {
    return g.row_scale != nullptr ? g.factor * g.row_scale[sample_of(index, g.pixels)] : g.factor;
  }
  DEVICE_MEMBER bool changes() const { return g.mask != nullptr || g.row_scale != nullptr || g.factor != 1.0f; }
  DEVICE_MEMBER Vectors vectors() const { return {}; }
  DEVICE_MEMBER float value(float v, int i, const Vectors&, uint32_t bits, float weight) const {
    v = bits >> i & 1 ? v : 0.0f;
    return weight != 1.0f ? v * weight : v;
  }
  // Masked as they are stored: few gradients have a weight.
  DEVICE_MEMBER void change(uint32_t (&words)[4], const Vectors&, uint32_t bits, float weight) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      words[i] &= (bits >> i * 2 & 1 ? 0x0000ffffu : 0u) | (bits >> (i * 2 + 1) & 1 ? 0xffff0000u : 0u);
    if (weight == 1.0f) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack(words[i], T{});
      words[i] = pack(x.x * weight, x.y * weight, T{});
    }
  }
};

// What of a tile of kWidth columns is a thread's: eight columns of every kApart-th row, and their mask.
template <class Math, class Tile, bool kWhole, int kWidth>
struct Chunks {
  using T = typename Math::Storage;
  static constexpr int kChunks = kWidth / kVector, kApart = Math::kThreads / kChunks, kMine = Math::kStep / kApart;
  static constexpr int kWords = kVector * sizeof(T) / 16, kBytes = Math::kStep * kWidth * int(sizeof(T));

  Tile tile;
  int row, chunk;
  bool tf32 = false;
  uint8_t bits[kMine];     // of the step that is next: on their way
  float pivot[kVector] = {};
  float sums[kVector] = {};  // of values less their pivots, in float32

  template <class Of>
  DEVICE_MEMBER Chunks(const Of& of, int column, float* vectors)
      : tile(of, column, int(threadIdx.x) % kChunks, vectors), row(int(threadIdx.x) / kChunks),
        chunk(int(threadIdx.x) % kChunks) {}

  DEVICE_MEMBER unsigned char* place(unsigned char* in, int i, int word) const {
    return in + Math::offset(row + i * kApart, chunk * kWords + word);
  }

  DEVICE_MEMBER void begin(int index) { tile.begin(index + row); }

  // Asks for the mask of the step that is prepared next, `inside` rows.
  DEVICE_MEMBER void load_bits(int inside) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      bits[i] = row + i * kApart < inside && tile.first < tile.channels() ? tile.bits() : uint8_t(0);
      tile.advance_bits(kApart);
    }
  }

  // Asks for the values of the next step, `inside` rows from `index` on; every thread commits afterwards.
  DEVICE_MEMBER void load(unsigned char* to, int index, int inside) {
    const int left = tile.channels() - tile.first;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const bool valid = row + i * kApart < inside && left > 0;
      const T* const from = valid ? tile.row(index + row + i * kApart) : tile.mapped();
      tile.advance(kApart);
      if constexpr (kWhole) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) cp_async_16(smem_address(place(to, i, w)), from + w * (16 / sizeof(T)), valid);
      } else {
        put(to, i, load_raw<false>(from, valid ? left : 0));
      }
    }
  }

  // Replaces what has come by the recipe's values as the product reads them; 0 beyond the last row.
  DEVICE_MEMBER void prepare(unsigned char* in, int index, int inside) {
    if (!Math::kCentred && !tile.changes()) return;
    const auto vectors = tile.vectors();
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const bool valid = row + i * kApart < inside;
      const float weight = valid ? tile.weight(index + row + i * kApart) : 1.0f;
      uint32_t words[kWords][4];
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const uint4 word = *reinterpret_cast<const uint4*>(place(in, i, w));
        memcpy(words[w], &word, sizeof(word));
      }
      if constexpr (Math::kCentred) {
#pragma unroll
        for (int c = 0; c < kVector; ++c) {
          const float value = tile.value(__uint_as_float(words[c / 4][c % 4]), c, vectors, bits[i], weight);
          const float read = valid ? Math::read(value, pivot[c], tf32) : 0.0f;
          words[c / 4][c % 4] = __float_as_uint(read);
          sums[c] += read;
        }
      } else {
        tile.change(words[0], vectors, bits[i], weight);
#pragma unroll
        for (int j = 0; j < 4; ++j) words[0][j] = valid ? words[0][j] : 0u;
      }
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        uint4 word;
        memcpy(&word, words[w], sizeof(word));
        *reinterpret_cast<uint4*>(place(in, i, w)) = word;
      }
    }
  }

  DEVICE_MEMBER void put(unsigned char* in, int i, const Raw<T>& raw) {
    uint4 words[kWords];
    memcpy(words, &raw, sizeof(raw));
#pragma unroll
    for (int w = 0; w < kWords; ++w) *reinterpret_cast<uint4*>(place(in, i, w)) = words[w];
  }
};

template <class Math>
constexpr int kLeftBytes = Math::kStep * Math::kLeft * int(sizeof(typename Math::Storage));
template <class Math>
constexpr int kStageBytes = kLeftBytes<Math> / Math::kLeft * (Math::kLeft + Math::kRight);

// A share of the rows, step by step.
template <class Math>
struct Steps {
  int begin, rows;

  DEVICE_MEMBER Steps(int64_t share, int64_t each, int64_t all)
      : begin(int(share * each)), rows(int(all - begin < each ? all - begin : each)) {}
  DEVICE_MEMBER int count() const { return (rows + Math::kStep - 1) / Math::kStep; }
  DEVICE_MEMBER int at(int step) const { return begin + step * Math::kStep; }
  DEVICE_MEMBER int inside(int step) const {
    const int left = rows - step * Math::kStep;
    return left < Math::kStep ? left : Math::kStep;
  }
};

struct Nothing {
  DEVICE_MEMBER void operator()(const unsigned char*, int) const {}
};

// both: whether the right tile is one of its own, and not the left one again; total: where sums of the left one's columns
// are kept in 16 bits, null where nobody wants them; also(stage, step): what else is done with a step's values.
template <class Math, class Left, class Right, class Also = Nothing>
DEVICE_FN void add_rows(typename Math::Sums& sums, unsigned char* smem, Left& left, Right& right,
                        const Steps<Math>& steps, bool both, float* total, const Also& also = {}) {
  constexpr int kStages = Math::kStages, kRightAt = kLeftBytes<Math>;
  left.begin(steps.begin);
  if (both) right.begin(steps.begin);
  const auto load = [&](unsigned char* stage, int step) {
    left.load(stage, steps.at(step), steps.inside(step));
    if (both) right.load(stage + kRightAt, steps.at(step), steps.inside(step));
    cp_async_commit();
  };
  const int count = steps.count();
  for (int step = 0; step < kStages - 1; ++step) load(smem + step * kStageBytes<Math>, step);
  left.load_bits(steps.inside(0));
  int now = 0, next = kStages - 1;
  for (int step = 0; step < count; ++step) {
    cp_async_wait<kStages - 2>();
    unsigned char* const stage = smem + now * kStageBytes<Math>;
    left.prepare(stage, steps.at(step), steps.inside(step));
    if (both) right.prepare(stage + kRightAt, steps.at(step), steps.inside(step));
    __syncthreads();  // the tiles are whole; and everybody has left the stage that is loaded next
    load(smem + next * kStageBytes<Math>, step + kStages - 1);
    left.load_bits(steps.inside(step + 1));
    Math::add(sums, stage, both ? stage + kRightAt : stage, total);
    also(stage, step);
    next = now, now = now + 1 == kStages ? 0 : now + 1;
  }
  cp_async_wait<0>();
}

// Values are from here on about the mean of the first step's rows.
template <class Math, class Of>
DEVICE_FN void centre(Of& chunks, unsigned char* smem, const Steps<Math>& steps) {
  chunks.begin(steps.begin);
  chunks.load(smem, steps.begin, steps.inside(0));
  cp_async_commit();
  cp_async_wait<0>();
  chunks.prepare(smem, steps.begin, steps.inside(0));
  // In the last stage, which is not loaded before all have passed the first step's barrier.
  unsigned char* const last = smem + (Math::kStages - 1) * kStageBytes<Math>;
  const float* const total = Math::add_columns(chunks, reinterpret_cast<float*>(last)) + chunks.chunk * kVector;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    chunks.pivot[j] = total[j] / float(steps.inside(0));
    chunks.sums[j] = 0.0f;
  }
}

}  // namespace resfuse::cuda::outer
