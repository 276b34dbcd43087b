// A gradient's recipe (arguments.h), its eight values at a row, and a thread's rows one after the other.
#pragma once

#include "shares.h"

namespace resfuse::cuda {

// The vectors of a thread's eight channels, in registers.
struct GradientVectors {
  float scale[kVector], shift[kVector], mean[kVector], mean_dy[kVector], slope[kVector];

  DEVICE_MEMBER GradientVectors(const Gradient& g, int first) {
    load_vector(scale, g.scale, first, g.channels, 1.0f);
    load_vector(shift, g.shift, first, g.channels, 0.0f);
    load_vector(mean, g.mean, first, g.channels, 0.0f);
    load_vector(mean_dy, g.mean_dy, first, g.channels, 0.0f);
    load_vector(slope, g.slope, first, g.channels, 0.0f);
  }
};

template <class T>
struct GradientRaw {
  Raw<T> dout, z;
  uint8_t bits;
  float weight;
};

template <class T, bool kWhole>
DEVICE_FN GradientRaw<T> load_gradient(const Gradient& g, int row, int first) {
  GradientRaw<T> raw;
  const int left = g.channels - first;
  const int64_t at = int64_t(row) * g.channels + first;
  raw.dout = load_raw<kWhole>(static_cast<const T*>(g.dout) + at, left);
  if (g.z != nullptr) raw.z = load_raw<kWhole>(static_cast<const T*>(g.z) + at, left);
  raw.bits = g.mask != nullptr ? g.mask[int64_t(row) * ((g.channels + 7) / 8) + first / 8] : uint8_t(0xff);
  raw.weight = g.row_scale != nullptr ? g.factor * g.row_scale[sample_of(row, g.pixels)] : g.factor;
  return raw;
}

// dy, the gradient below the masks.
template <class T>
DEVICE_FN void masked_values(
    float (&dy)[kVector], const Gradient& g, const GradientRaw<T>& raw, const GradientVectors& vectors) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) dy[i] = raw.bits >> i & 1 ? to_float(raw.dout.v[i]) : 0.0f;
  if (raw.weight != 1.0f) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) dy[i] = dy[i] * raw.weight;
  }
  if (g.shift != nullptr) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float y = affine(to_float(raw.z.v[i]), vectors.scale[i], vectors.shift[i]);
      if (rounded<T>(y) <= 0.0f) dy[i] = 0.0f;
    }
  }
}

// BatchNorm's input gradient, in place of the gradient v of its output.
template <class T>
DEVICE_FN void norm_values(
    float (&v)[kVector], const Gradient& g, const GradientRaw<T>& raw, const GradientVectors& vectors) {
  if (g.slope != nullptr) {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      v[i] = v[i] - vectors.mean_dy[i] - (to_float(raw.z.v[i]) - vectors.mean[i]) * vectors.slope[i];
  }
  if (g.scale != nullptr) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = v[i] * vectors.scale[i];
  }
}

// The recipe's values.
template <class T>
DEVICE_FN void gradient_values(
    float (&v)[kVector], const Gradient& g, const GradientRaw<T>& raw, const GradientVectors& vectors) {
  masked_values(v, g, raw, vectors);
  norm_values(v, g, raw, vectors);
}

// work(row, raw) for each of a thread's rows; some are asked for before the first is worked on.
template <class T, bool kWhole, class Work>
DEVICE_FN void each_row(const Gradient& g, const Place& place, const Work& work) {
  constexpr int kUnroll = kRows<T, kWhole, 2>;
  for (int first = place.begin + place.down; first < place.end; first += kUnroll * kDown) {
    GradientRaw<T> raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (first + u * kDown < place.end) raw[u] = load_gradient<T, kWhole>(g, first + u * kDown, place.first);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int row = first + u * kDown;
      if (row >= place.end) break;
      work(row, raw[u]);
    }
  }
}

// Writes the rows that values(v, raw, vectors) makes, each rounded once.
template <class T, bool kWhole, class Values>
DEVICE_FN void write_rows(const Gradient& g, const Place& place, T* out, const Values& values) {
  const int left = g.channels - place.first;
  if (left <= 0) return;
  const GradientVectors vectors(g, place.first);
  each_row<T, kWhole>(g, place, [&](int row, const GradientRaw<T>& raw) {
    float v[kVector];
    values(v, raw, vectors);
    store_raw<kWhole>(out + int64_t(row) * g.channels + place.first, to_raw(v, T{}), left);
  });
}

// Shares of BatchNorm's sums in backward, sum(d) and sum(d * (z - mean)), of the d that values(d, raw, vectors) makes.
template <class T, bool kWhole, class Values>
DEVICE_FN void store_sums(const Gradient& g, const Place& place, float* partial, const Values& values) {
  SHARED_ARRAY(float, scratch, kDown * kColumns);
  SHARED_ARRAY(float, result, 2 * kColumns);
  const GradientVectors vectors(g, place.first);
  float sums[2][kVector] = {};
  if (place.first < g.channels) {
    each_row<T, kWhole>(g, place, [&](int, const GradientRaw<T>& raw) {
      float d[kVector];
      values(d, raw, vectors);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        sums[0][i] += d[i];
        sums[1][i] += d[i] * (to_float(raw.z.v[i]) - vectors.mean[i]);
      }
    });
  }
  add_threads(result, scratch, sums);
  const int which = int(threadIdx.x) / kColumns, column = int(threadIdx.x) % kColumns;
  const int channel = int(blockIdx.x) * kColumns + column;
  if (which < 2 && channel < g.channels)
    partial[(int64_t(blockIdx.y) * 2 + which) * g.channels + channel] = result[which * kColumns + column];
}

}  // namespace resfuse::cuda
