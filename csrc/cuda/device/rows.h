// Activations as a matrix: M = N*H*W rows of C channels, and how a thread reads and writes eight channels of a row.
//
// kWhole: C is a multiple of 8 and every row begins at a multiple of 16 bytes, so that eight channels are one access of
// 16 bytes (two in float32). Otherwise each channel is read by itself, those beyond the last as 0.
#pragma once

#include "arguments.h"
#include "common/scalar.h"
#include "ptx.h"

#ifdef __CUDACC__
#define DEVICE_MEMBER __device__ __forceinline__
#else
#define DEVICE_MEMBER inline
#endif

namespace resfuse::cuda {

constexpr int kVector = 8;                       // channels of a thread
constexpr int kAcross = 8;                       // threads side by side: 128 bytes of a row in 16 bits
constexpr int kThreads = 256, kDown = kThreads / kAcross;
constexpr int kColumns = kVector * kAcross;      // channels of a block: launchers.h's kTileChannels

// Where a row begins. Row numbers are ints (call.h checks it): 64 bits and their division cost registers.
template <class T>
DEVICE_FN const T* row_of(const Rows& rows, int index) {
  const T* const data = static_cast<const T*>(rows.data);
  if (rows.view.pixels == 0) return data + int64_t(index) * rows.channels;
  const unsigned sample = unsigned(index) / unsigned(rows.view.pixels);
  const unsigned in_sample = unsigned(index) % unsigned(rows.view.pixels);
  const unsigned line = in_sample / unsigned(rows.view.width), pixel = in_sample % unsigned(rows.view.width);
  return data + sample * rows.view.sample + line * rows.view.line + pixel * rows.view.pixel;
}

// The sample that a row belongs to.
DEVICE_FN unsigned sample_of(int index, int64_t pixels) { return unsigned(index) / unsigned(pixels); }

DEVICE_FN float to_float(float v) { return v; }
DEVICE_FN float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
DEVICE_FN float to_float(__half v) { return __half2float(v); }

template <class T> struct Stored;
template <> struct Stored<float> {
  static DEVICE_MEMBER float from(float v) { return v; }
};
template <> struct Stored<__nv_bfloat16> {
  static DEVICE_MEMBER __nv_bfloat16 from(float v) { return __float2bfloat16_rn(v); }
};
template <> struct Stored<__half> {
  static DEVICE_MEMBER __half from(float v) { return __float2half_rn(v); }
};

// v rounded as it would be stored.
template <class T>
DEVICE_FN float rounded(float v) {
  return to_float(Stored<T>::from(v));
}

// Two values of 16 bits in a word.
DEVICE_FN float2 unpack(uint32_t v, __nv_bfloat16) { return unpack_bf16x2(v); }
DEVICE_FN float2 unpack(uint32_t v, __half) { return unpack_f16x2(v); }
DEVICE_FN uint32_t pack(float low, float high, __nv_bfloat16) { return pack_bf16x2(low, high); }
DEVICE_FN uint32_t pack(float low, float high, __half) { return pack_f16x2(low, high); }

// Eight channels as they are stored: asked for early, converted when they are used.
template <class T>
struct alignas(sizeof(T) < 2 ? 8 : 16) Raw {
  T v[kVector];
};

template <bool kWhole, class T>
DEVICE_FN Raw<T> load_raw(const T* at, int left) {
  Raw<T> raw;
  if constexpr (kWhole) {
    constexpr int parts = sizeof(raw) / 16;
    uint4 words[parts];
#pragma unroll
    for (int i = 0; i < parts; ++i) words[i] = reinterpret_cast<const uint4*>(at)[i];
    memcpy(&raw, words, sizeof(raw));
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) raw.v[i] = i < left ? at[i] : Stored<T>::from(0.0f);
  }
  return raw;
}

template <bool kWhole, class T>
DEVICE_FN void store_raw(T* at, const Raw<T>& raw, int left) {
  if constexpr (kWhole) {
    constexpr int parts = sizeof(raw) / 16;
    uint4 words[parts];
    memcpy(words, &raw, sizeof(raw));
#pragma unroll
    for (int i = 0; i < parts; ++i) reinterpret_cast<uint4*>(at)[i] = words[i];
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < left) at[i] = raw.v[i];
  }
}

// The same of a byte a channel: one access of 8 bytes.
template <bool kWhole>
DEVICE_FN Raw<uint8_t> load_bytes(const uint8_t* at, int left) {
  Raw<uint8_t> raw;
  if constexpr (kWhole) {
    const uint2 word = *reinterpret_cast<const uint2*>(at);
    memcpy(&raw, &word, sizeof(raw));
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) raw.v[i] = i < left ? at[i] : uint8_t(0);
  }
  return raw;
}

template <bool kWhole>
DEVICE_FN void store_bytes(uint8_t* at, const Raw<uint8_t>& raw, int left) {
  if constexpr (kWhole) {
    uint2 word;
    memcpy(&word, &raw, sizeof(raw));
    *reinterpret_cast<uint2*>(at) = word;
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < left) at[i] = raw.v[i];
  }
}

// Two values side by side, in one access.
template <class T>
DEVICE_FN void store_pair(T* at, float low, float high) {
  const T pair[2] = {Stored<T>::from(low), Stored<T>::from(high)};
  uint32_t word;
  memcpy(&word, pair, sizeof(word));
  *reinterpret_cast<uint32_t*>(at) = word;
}

// Rows that a thread asks for at once, of kTensors: one where each channel is a load of its own.
template <class T, bool kWhole, int kTensors = 1>
constexpr int kRows = !kWhole ? 1 : sizeof(T) == 4 || kTensors > 2 ? 2 : kTensors == 1 ? 4 : 3;

// Eight values rounded as they are stored.
DEVICE_FN Raw<float> to_raw(const float (&v)[kVector], float) {
  Raw<float> raw;
  memcpy(&raw, v, sizeof(raw));
  return raw;
}
template <class T>
DEVICE_FN Raw<T> to_raw(const float (&v)[kVector], T) {
  uint32_t words[kVector / 2];
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) words[i] = pack(v[i * 2], v[i * 2 + 1], T{});
  Raw<T> raw;
  memcpy(&raw, words, sizeof(raw));
  return raw;
}

// Eight values of a vector; absent ones and those beyond the last channel are `otherwise`.
DEVICE_FN void load_vector(float (&v)[kVector], const float* at, int first, int channels, float otherwise) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) v[i] = at != nullptr && first + i < channels ? at[first + i] : otherwise;
}

// Where a thread of the grid (tiles of channels, shares of the rows) works.
struct Place {
  int first;         // channel
  int across, down;  // thread in the block's grid
  int begin, end;

  DEVICE_MEMBER Place(int64_t rows, int64_t rows_each)
      : first((int(blockIdx.x) * kAcross + int(threadIdx.x) % kAcross) * kVector),
        across(int(threadIdx.x) % kAcross),
        down(int(threadIdx.x) / kAcross),
        begin(int(blockIdx.y * rows_each)),
        end(int(begin + rows_each < rows ? begin + rows_each : rows)) {}
};

inline int tiles(int channels) {
  return (channels + kColumns - 1) / kColumns;
}

// f called with a value of a storage type.
template <class F>
int with_storage(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat: return f(float{});
    case DType::kBFloat16: return f(__nv_bfloat16{});
    default: return f(__half{});
  }
}

}  // namespace resfuse::cuda
