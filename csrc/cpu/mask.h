// The 1-bit mask: uint8 [M, ceil(C/8)], channel 8i+j is bit j of byte i, padding bits 0.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/scalar.h"

namespace resfuse {

constexpr int64_t mask_row_bytes(int64_t channels) {
  return (channels + 7) / 8;
}

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a word's lowest byte must be the first channel");

// bits: `count` bytes of 0 or 1, with room for a multiple of 8 -> ceil(count/8) bytes.
RESFUSE_HD void pack_bits(uint8_t* bits, int64_t count, uint8_t* __restrict__ packed) {
  const int64_t bytes = mask_row_bytes(count);
  std::memset(bits + count, 0, 8 * bytes - count);
  for (int64_t i = 0; i < bytes; ++i) {
    uint64_t word;
    std::memcpy(&word, bits + 8 * i, sizeof(word));
    // The product brings bit 0 of byte j to bit 56 + j, and nothing else to the top byte.
    packed[i] = static_cast<uint8_t>(word * 0x0102040810204080u >> 56);
  }
}

}  // namespace resfuse
