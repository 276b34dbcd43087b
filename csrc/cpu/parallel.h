// Who works on which rows: one contiguous share per thread, walked in chunks that stay in cache.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "product.h"
#include "scratch.h"

namespace resfuse {

// Shares and chunks begin at multiples of this: whole tiles of AMX, and pairs of rows for bfloat16 words. Tiles of 6
// rows end in one of 2 or 4, which takes a third or two thirds of their time.
constexpr int64_t row_unit = 16;
constexpr int64_t chunk_rows = 128;
// Elementwise work below this does not repay a thread's start.
constexpr int64_t least_elements = 32768;

// How many shares `rows` of `elements` each are cut into; 1 at least.
inline int64_t share_count(int64_t rows, int64_t elements) {
  const int64_t worth = std::min(rows / row_unit, rows * elements / least_elements);
  return std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), worth));
}

// work(share, part, begin, end) for each of `shares` shares of the rows and each of `parts` of something else.
template <class Work>
void for_grid(int64_t rows, int64_t shares, int64_t parts, const Work& work) {
  const int64_t units = (rows + row_unit - 1) / row_unit;
  at::parallel_for(0, shares * parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t s = i / parts;
      work(s, i % parts, units * s / shares * row_unit, std::min(rows, units * (s + 1) / shares * row_unit));
    }
  });
}

// work(share, begin, end) for each of `shares` balanced shares of the rows.
template <class Work>
void for_shares(int64_t rows, int64_t shares, const Work& work) {
  for_grid(rows, shares, 1, [&](int64_t share, int64_t, int64_t begin, int64_t end) { work(share, begin, end); });
}

// Rows of each of the equal chunks, at most `most` rows, that a share is cut into.
RESFUSE_HD int64_t chunk_size(int64_t rows, int64_t most) {
  const int64_t chunks = (rows + most - 1) / most;
  return chunks == 0 ? row_unit : round_up((rows + chunks - 1) / chunks, row_unit);
}

}  // namespace resfuse
