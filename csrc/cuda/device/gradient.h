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
DEVICE_FN GradientRaw<T> load_gradient(const Gradient& g, int64_t row, int first) {
  GradientRaw<T> raw;
  const int left = g.channels - first;
  raw.dout = load_raw<kWhole>(static_cast<const T*>(g.dout) + row * g.channels + first, left);
  if (g.z != nullptr) raw.z = load_raw<kWhole>(static_cast<const T*>(g.z) + row * g.channels + first, left);
  raw.bits = g.mask != nullptr ? g.mask[row * ((g.channels + 7) / 8) + first / 8] : uint8_t(0xff);
  raw.weight = g.row_scale != nullptr ? g.factor * g.row_scale[row / g.pixels] : g.factor;
  return raw;
}

// dy, the gradient below the masks.
template <class T>
DEVICE_FN void masked_values(
    float (&dy)[kVector], const Gradient& g, const GradientRaw<T>& raw, const GradientVectors& vectors) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    float v = raw.bits >> i & 1 ? to_float(raw.dout.v[i]) : 0.0f;
    if (raw.weight != 1.0f) v = v * raw.weight;
    if (g.shift != nullptr) {
      const float y = affine(to_float(raw.z.v[i]), vectors.scale[i], vectors.shift[i]);
      if (rounded<T>(y) <= 0.0f) v = 0.0f;
    }
    dy[i] = v;
  }
}

// The recipe's values.
template <class T>
DEVICE_FN void gradient_values(
    float (&v)[kVector], const Gradient& g, const GradientRaw<T>& raw, const GradientVectors& vectors) {
  masked_values(v, g, raw, vectors);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (g.slope != nullptr)
      v[i] = v[i] - vectors.mean_dy[i] - (to_float(raw.z.v[i]) - vectors.mean[i]) * vectors.slope[i];
    if (g.scale != nullptr) v[i] = v[i] * vectors.scale[i];
  }
}

}  // namespace resfuse::cuda
