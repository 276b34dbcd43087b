// A block's last step on eight values of a row (arguments.h, Sum).
#pragma once

#include "rows.h"

namespace resfuse::cuda {

template <class T, bool kWhole>
DEVICE_FN Raw<T> load_residual(const Sum& p, int row, int first) {
  const Rows& r = p.residual;
  const T* const at = row_of<T>(r, row);
  if (r.channels == p.channels) return load_raw<kWhole>(at + first, p.channels - first);
  Raw<T> raw;  // between channels of zeros
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const int own = first + i - p.before;
    raw.v[i] = own >= 0 && own < r.channels ? at[own] : Stored<T>::from(0.0f);
  }
  return raw;
}

// The residual's values: act(residual_scale * x + residual_shift), where it has a scale.
template <class T>
DEVICE_FN void residual_values(
    float (&r)[kVector], const Sum& p, const Raw<T>& raw, const float (&scale)[kVector], const float (&shift)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) r[i] = to_float(raw.v[i]);
  if (p.residual_scale == nullptr) return;
  const float bound = lower_bound(p.residual_relu);
#pragma unroll
  for (int i = 0; i < kVector; ++i) r[i] = at_least(affine(r[i], scale[i], shift[i]), bound);
}

// Writes act(factor * (gate * row_scale[n] * y + (1 - gate) * r)) and its mask; r is read where `added`. kAny: there may
// be a row_scale, a gate or a factor. Returns what was written.
template <class T, bool kAny, bool kWhole>
DEVICE_FN Raw<T> write_sum(
    const Sum& p, int row, int first, float (&y)[kVector], bool added, float (&r)[kVector], float bound) {
  const int left = p.channels - first;
  float open[kVector];
  if (kAny && p.row_scale != nullptr) {
    const float weight = p.row_scale[sample_of(row, p.pixels)];
#pragma unroll
    for (int i = 0; i < kVector; ++i) y[i] = y[i] * weight;
  }
  if (kAny && p.gate != nullptr) {
    const T* const at = static_cast<const T*>(p.gate) + int64_t(row) * p.channels + first;
    const Raw<T> gate = load_raw<kWhole>(at, left);
#pragma unroll
    for (int i = 0; i < kVector; ++i) open[i] = to_float(gate.v[i]), y[i] = y[i] * open[i];
  }
  if (added) {
    if (kAny && p.gate != nullptr) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) r[i] = r[i] * (1.0f - open[i]);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) y[i] = y[i] + r[i];
  }
  if (kAny && p.factor != 1.0f) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) y[i] = y[i] * p.factor;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) y[i] = at_least(y[i], bound);
  const Raw<T> out = to_raw(y, T{});
  store_raw<kWhole>(static_cast<T*>(p.out) + int64_t(row) * p.channels + first, out, left);
  if (p.mask == nullptr) return out;
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    bits |= uint32_t((kWhole || i < left) && passes_gradient(to_float(out.v[i]))) << i;
  p.mask[int64_t(row) * ((p.channels + 7) / 8) + first / 8] = uint8_t(bits);
  return out;
}

}  // namespace resfuse::cuda
