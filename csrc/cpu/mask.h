// The 1-bit mask: uint8 [M, ceil(C/8)], channel 8i+j is bit j of byte i, padding bits 0.
#pragma once

#include <cstdint>

#include "../common/scalar.h"

namespace resfuse {

inline int64_t mask_row_bytes(int64_t channels) {
  return (channels + 7) / 8;
}

// bits: `count` bytes of 0 or 1 -> ceil(count/8) bytes.
RESFUSE_HD void pack_bits(const uint8_t* bits, int64_t count, uint8_t* __restrict__ packed) {
  const int64_t whole = count / 8;
  for (int64_t i = 0; i < whole; ++i) {
    uint64_t byte = 0;
    for (int j = 0; j < 8; ++j) byte |= static_cast<uint64_t>(bits[8 * i + j]) << j;
    packed[i] = static_cast<uint8_t>(byte);
  }
  if (count % 8 != 0) {
    uint8_t byte = 0;
    for (int64_t j = 0; j < count % 8; ++j) byte |= static_cast<uint8_t>(bits[8 * whole + j] << j);
    packed[whole] = byte;
  }
}

}  // namespace resfuse
