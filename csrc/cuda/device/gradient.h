// A gradient's recipe (arguments.h) and its eight values at a row.
#pragma once

#include "rows.h"

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

}  // namespace resfuse::cuda
