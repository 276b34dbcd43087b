// Gradients as kernels read them: dout under its mask and factors, and BatchNorm's backward on top of it.
//
//   g  = factor * row_scale[n] * (dout where mask else 0), rounded to storage          interface.Masked
//   dy = g where relu(scale * z + shift) > 0 else 0                                     if shift is there
//   dz = scale * (dy - mean_dy - (z - mean) * slope)                                    interface.BNGrad
//   or, where the statistics are constants, dz = scale * dy
#pragma once

#include "mask.h"
#include "rows.h"

namespace resfuse {

template <class T>
struct Gradient {
  const T* dout;           // [M, K]
  const uint8_t* mask;     // [M, ceil(K/8)] or null
  const float* row_scale;  // [N] or null
  int64_t pixels;          // H * W, rows of a sample
  float factor;
  const T* z;          // [M, K] or null: no BatchNorm
  const float* scale;  // [K]
  const float* shift;  // [K] or null: no ReLU
  const float* mean;   // [K]
  const float* mean_dy;
  const float* slope;  // null: constant statistics
  int64_t channels;

  // Rows first .. end, at most `count` of them, are read soon.
  RESFUSE_HD void fetch(Ahead& ahead, int64_t first, int64_t count, int64_t end) const {
    const int64_t rows = std::min(count, end - first);
    const int64_t bytes = rows * channels * static_cast<int64_t>(sizeof(T));
    ahead.add(dout + first * channels, bytes);
    if (mask) ahead.add(mask + first * mask_row_bytes(channels), rows * mask_row_bytes(channels));
    if (z) ahead.add(z + first * channels, bytes);
  }

  RESFUSE_HD float row_factor(int64_t row) const { return row_scale ? factor * row_scale[row / pixels] : factor; }
};

// Channels of one 32-bit word of the mask.
constexpr int64_t word_channels = 32;

template <bool masked, bool weighed, class T>
RESFUSE_HD void masked_piece(
    const T* __restrict__ dout, uint32_t word, float factor, int64_t count, T* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) {
    T v = dout[i];
    if constexpr (weighed) v = store<T>(load(v) * factor);
    if constexpr (masked) v = word >> i & 1u ? v : T{};
    out[i] = v;
  }
}

template <bool masked, bool weighed, class T>
RESFUSE_HD void masked_pieces(const T* dout, const uint8_t* mask, float factor, int64_t count, T* out) {
  int64_t c = 0;
  uint32_t word = 0;
  for (; c + word_channels <= count; c += word_channels) {
    if constexpr (masked) std::memcpy(&word, mask + c / 8, sizeof(word));
    masked_piece<masked, weighed>(dout + c, word, factor, word_channels, out + c);
  }
  if constexpr (masked) std::memcpy(&word, mask + c / 8, mask_row_bytes(count - c));
  masked_piece<masked, weighed>(dout + c, word, factor, count - c, out + c);
}

// Channels first .. first + count of one row of g; first is a multiple of 8.
template <class T>
RESFUSE_HD void masked_row(const Gradient<T>& g, int64_t row, int64_t first, int64_t count, T* out) {
  const T* dout = g.dout + row * g.channels + first;
  const uint8_t* mask = g.mask ? g.mask + row * mask_row_bytes(g.channels) + first / 8 : nullptr;
  const float factor = g.row_factor(row);
  if (factor == 1.0f) {
    mask ? masked_pieces<true, false>(dout, mask, factor, count, out)
         : masked_pieces<false, false>(dout, mask, factor, count, out);
  } else {
    mask ? masked_pieces<true, true>(dout, mask, factor, count, out)
         : masked_pieces<false, true>(dout, mask, factor, count, out);
  }
}

// dz of the formula in place of g, for channels first .. first + count of a row.
template <bool relu, bool batch, class T>
RESFUSE_HD void bn_row(const Gradient<T>& g, int64_t row, int64_t first, int64_t count, T* __restrict__ out) {
  const T* __restrict__ z = g.z + row * g.channels + first;
  const float* __restrict__ scale = g.scale + first;
  const float* __restrict__ shift = g.shift + first;
  const float* __restrict__ mean = g.mean + first;
  const float* __restrict__ mean_dy = g.mean_dy + first;
  const float* __restrict__ slope = g.slope + first;
  for (int64_t i = 0; i < count; ++i) {
    float dy = load(out[i]);
    if constexpr (relu) dy = passes_relu(z[i], scale[i], shift[i]) ? dy : 0.0f;
    if constexpr (batch) dy = dy - mean_dy[i] - (load(z[i]) - mean[i]) * slope[i];
    out[i] = store<T>(scale[i] * dy);
  }
}

// Channels first .. first + count of one row of the gradient, whichever it is.
template <class T>
RESFUSE_HD void gradient_row(const Gradient<T>& g, int64_t row, int64_t first, int64_t count, T* out) {
  masked_row(g, row, first, count, out);
  if (g.z == nullptr) return;
  if (g.slope) {
    g.shift ? bn_row<true, true>(g, row, first, count, out) : bn_row<false, true>(g, row, first, count, out);
  } else {
    g.shift ? bn_row<true, false>(g, row, first, count, out) : bn_row<false, false>(g, row, first, count, out);
  }
}

constexpr int64_t gradient_columns = 512;

// Rows first_row .. + count, channels first .. + columns (first a multiple of 8), into out [count, stride], zero up to
// whole panels. sum [columns] or null: what is written is added there, row by row.
template <class E, class T>
RESFUSE_HD void fill_gradient(
    const Gradient<T>& g, int64_t first_row, int64_t count, int64_t first, int64_t columns, E* out, int64_t stride,
    float* sum) {
  T piece[gradient_columns];
  for (int64_t r = 0; r < count; ++r) {
    E* __restrict__ o = out + r * stride;
    for (int64_t c = 0; c < columns; c += gradient_columns) {
      const int64_t n = columns - c < gradient_columns ? columns - c : gradient_columns;
      if constexpr (sizeof(E) == sizeof(T)) {
        gradient_row(g, first_row + r, first + c, n, o + c);
      } else {
        gradient_row(g, first_row + r, first + c, n, piece);
        for (int64_t i = 0; i < n; ++i) o[c + i] = element<E>(piece[i]);
      }
    }
    if (sum) {
      for (int64_t c = 0; c < columns; ++c) sum[c] += load(o[c]);
    }
    for (int64_t c = columns; c < round_up(columns, panel_columns); ++c) o[c] = E{};
  }
}

// The same in panels [columns / 64][count][64], as both products of a chunk read it: by rows, a panel after the other
// (`PanelTaps`), and by columns (`panel_columns_of`).
template <class E, class T>
RESFUSE_HD void fill_gradient_panels(
    const Gradient<T>& g, int64_t first_row, int64_t count, int64_t first, int64_t columns, E* out, float* sum) {
  T piece[panel_columns];
  for (int64_t c = 0; c < columns; c += panel_columns) {
    const int64_t n = columns - c < panel_columns ? columns - c : panel_columns;
    for (int64_t r = 0; r < count; ++r) {
      E* __restrict__ o = out + (c * count + r * panel_columns);
      if constexpr (sizeof(E) == sizeof(T)) {
        gradient_row(g, first_row + r, first + c, n, o);
      } else {
        gradient_row(g, first_row + r, first + c, n, piece);
        for (int64_t i = 0; i < n; ++i) o[i] = element<E>(piece[i]);
      }
      for (int64_t i = n; i < panel_columns; ++i) o[i] = E{};
    }
    if (sum) {
      for (int64_t r = 0; r < count; ++r) {
        const E* __restrict__ o = out + (c * count + r * panel_columns);
        for (int64_t i = 0; i < n; ++i) sum[c + i] += load(o[i]);
      }
    }
  }
}

}  // namespace resfuse
