// Storage types and their conversion to and from float32, the arithmetic type. Host and device.
#pragma once

#include <cstdint>
#include <cstring>

#include "scalar.h"

namespace resfuse {

// The bits of a bfloat16. An enumeration, because compilers vectorise copies of scalars but not of structures.
enum class bfloat16 : uint16_t {};

RESFUSE_HD uint32_t float_bits(float v) {
  uint32_t u;
  std::memcpy(&u, &v, sizeof(u));
  return u;
}

RESFUSE_HD float bits_float(uint32_t u) {
  float v;
  std::memcpy(&v, &u, sizeof(v));
  return v;
}

RESFUSE_HD float load(float v) {
  return v;
}

RESFUSE_HD float load(bfloat16 v) {
  return bits_float(static_cast<uint32_t>(v) << 16);
}

template <class T>
RESFUSE_HD T store(float v);

template <>
RESFUSE_HD float store<float>(float v) {
  return v;
}

// Round to nearest, ties to even; every NaN becomes the quiet NaN 0x7fc0 (rounding its payload could give inf).
template <>
RESFUSE_HD bfloat16 store<bfloat16>(float v) {
  const uint32_t u = float_bits(v);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<bfloat16>(v != v ? 0x7fc0u : rounded);
}

}  // namespace resfuse
