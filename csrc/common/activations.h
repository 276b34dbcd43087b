// Activations and their derivatives, host and device: what may follow a BatchNorm.
//
//   none v    relu max(v, 0)    leaky_relu v > 0 ? v : slope * v    relu6 min(max(v, 0), 6)
//   silu v * s(v), s(v) = 1 / (1 + exp(-v))    hardswish v * min(max(v + 3, 0), 6) / 6
//
// Kernels are templates of the activation, so that their loops have no branches. NaN stays, as in torch.
#pragma once

#include "storage.h"

namespace resfuse {

// In the order of interface.ACTIVATIONS behind the first two.
enum class Act { none, relu, leaky_relu, relu6, silu, hardswish };
constexpr int activations = 6;

// exp(x) within 2 units in the last place: 2^n * exp(r), n the integer next to x / ln 2, |r| <= ln 2 / 2. Written out
// because compilers vectorise no call of the library's. Below -87 it is exp(-87), which is 0 beside 1; above 89, inf.
RESFUSE_HD float exp_of(float x) {
  x = x > 89.0f ? 89.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // n in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * bits_float((float_bits(shifted) << 23) + 0x3f800000u);
}

RESFUSE_HD float sigmoid(float v) {
#if defined(__CUDA_ARCH__)
  // A third of the instructions. The divisor is at most 2: beyond 2^126, as 1 + exp(88) is, __fdividef would give 0.
  const float e = expf(-fabsf(v));
  return __fdividef(v < 0.0f ? e : 1.0f, 1.0f + e);
#else
  return 1.0f / (1.0f + exp_of(-v));
#endif
}

template <Act act>
RESFUSE_HD float act_value(float v, float slope) {
  if constexpr (act == Act::relu) return clamp_below(v, 0.0f);
  if constexpr (act == Act::leaky_relu) return v > 0.0f ? v : v * slope;
  if constexpr (act == Act::relu6) {
    const float low = v < 0.0f ? 0.0f : v;
    return low > 6.0f ? 6.0f : low;
  }
  if constexpr (act == Act::silu) return v * sigmoid(v);
  // In this order a large v does not overflow.
  if constexpr (act == Act::hardswish) return v * (1.0f / 6.0f) * act_value<Act::relu6>(v + 3.0f, 0.0f);
  return v;
}

// The derivative, at bends as torch has it.
template <Act act>
RESFUSE_HD float act_slope(float v, float slope) {
  if constexpr (act == Act::relu) return v <= 0.0f ? 0.0f : 1.0f;
  if constexpr (act == Act::leaky_relu) return v > 0.0f ? 1.0f : slope;
  if constexpr (act == Act::relu6) return v > 0.0f && v < 6.0f ? 1.0f : 0.0f;
  if constexpr (act == Act::silu) {
    const float s = sigmoid(v);
    return s * (1.0f + v * (1.0f - s));
  }
  if constexpr (act == Act::hardswish) {
    const float inside = v * (1.0f / 3.0f) + 0.5f;
    return v <= -3.0f ? 0.0f : v < 3.0f ? inside : v >= 3.0f ? 1.0f : v;
  }
  return 1.0f;
}

}  // namespace resfuse
