// The tail that `apply` and `expand` share: a block's last step, in wide arithmetic, rounded once to storage.
//
//   out = act(total_scale * (t * row_scale * (scale * source + shift) + (1 - t) * residual))      t = gate
//   without a gate both weights are 1; residual = nothing | r | act_r(scale_r * r + shift_r), r stored or wide
//   mask bit = not (out <= 0), of the stored value: channel 8i+j is bit j of byte i, padding bits 0
#pragma once

#include <algorithm>

#include "mask.h"
#include "rows.h"

namespace resfuse {

enum class Residual { none, rows, norm };

// What is the same for every row. Pointers that are null stand for what is not there.
template <class T>
struct SumArgs {
  const float* scale;  // [K], of the main branch
  const float* shift;  // [K]
  Rows<T> residual;    // rows of `residual.channels` channels, from channel `before` on
  int64_t before;
  const float* residual_scale;
  const float* residual_shift;
  float residual_bound;
  const T* gate;           // [M, K]
  const float* row_scale;  // [N]
  int64_t pixels;          // H * W, rows of a sample
  float total_scale;
  float bound;
  T* out;         // [M, K]
  uint8_t* mask;  // [M, ceil(K/8)]
  int64_t channels;

  // Rows first .. end, at most `count` of them, are made soon.
  RESFUSE_HD void fetch(Ahead& ahead, int64_t first, int64_t count, int64_t end) const {
    residual.fetch(ahead, first, count, end);
    ahead.add(out + first * channels, std::min(count, end - first) * channels * int64_t{sizeof(T)});
  }
};

template <class T, Residual kind, bool gated, class S, class R>
RESFUSE_HD void sum_piece(
    const SumArgs<T>& a, const S* __restrict__ source, const R* __restrict__ residual, int64_t row, int64_t first,
    int64_t count, const float* __restrict__ residual_scale, const float* __restrict__ residual_shift,
    float residual_bound, uint8_t* __restrict__ bits) {
  const float* __restrict__ scale = a.scale + first;
  const float* __restrict__ shift = a.shift + first;
  const T* __restrict__ gate = gated ? a.gate + row * a.channels + first : nullptr;
  T* __restrict__ out = a.out + row * a.channels + first;
  const float row_scale = a.row_scale ? a.row_scale[row / a.pixels] : 1.0f;
  const float total_scale = a.total_scale, bound = a.bound;
  for (int64_t i = 0; i < count; ++i) {
    float v = affine(load(source[i]), scale[i], shift[i]) * row_scale;
    float r = 0.0f;
    if constexpr (kind == Residual::rows) r = load(residual[i]);
    if constexpr (kind == Residual::norm) {
      r = clamp_below(affine(load(residual[i]), residual_scale[i], residual_shift[i]), residual_bound);
    }
    if constexpr (gated) {
      const float t = load(gate[i]);
      v *= t;
      if constexpr (kind != Residual::none) r *= 1.0f - t;
    }
    if constexpr (kind != Residual::none) v += r;
    const T stored = store<T>(clamp_below(v * total_scale, bound));
    out[i] = stored;
    bits[i] = passes_gradient(load(stored));
  }
}

template <class T, Residual kind, class S, class R>
RESFUSE_HD void sum_piece(
    const SumArgs<T>& a, const S* source, const R* residual, int64_t row, int64_t first, int64_t count,
    const float* residual_scale, const float* residual_shift, float residual_bound, uint8_t* bits) {
  if (count <= 0) return;
  if (a.gate) {
    sum_piece<T, kind, true>(a, source, residual, row, first, count, residual_scale, residual_shift, residual_bound,
                             bits);
  } else {
    sum_piece<T, kind, false>(a, source, residual, row, first, count, residual_scale, residual_shift, residual_bound,
                              bits);
  }
}

// Channels that one call of `sum_row` may write.
constexpr int64_t sum_columns = 1024;

// Channels first .. first + count of one row; first is a multiple of 8. wide_residual: what stands for residual's rows,
// wide values that residual_scale and residual_shift act on, or null.
template <class T, class S>
RESFUSE_HD void sum_row(
    const SumArgs<T>& a, const S* source, const float* wide_residual, int64_t row, int64_t first, int64_t count) {
  uint8_t bits[sum_columns + 8];
  if (wide_residual) {
    sum_piece<T, Residual::norm>(a, source, wide_residual, row, first, count, a.residual_scale + first,
                                 a.residual_shift + first, a.residual_bound, bits);
  } else if (a.residual.data == nullptr) {
    sum_piece<T, Residual::none>(a, source, source, row, first, count, nullptr, nullptr, 0.0f, bits);
  } else {
    // Before, inside and behind the channels that have a residual.
    const int64_t begin = std::clamp(a.before - first, int64_t{0}, count);
    const int64_t end = std::clamp(a.before + a.residual.channels - first, begin, count);
    const int64_t from = first + begin - a.before;  // the residual's own channel
    const T* residual = a.residual.row(row) + from;
    sum_piece<T, Residual::none>(a, source, source, row, first, begin, nullptr, nullptr, 0.0f, bits);
    if (a.residual_scale) {
      sum_piece<T, Residual::norm>(a, source + begin, residual, row, first + begin, end - begin,
                                   a.residual_scale + from, a.residual_shift + from, a.residual_bound, bits + begin);
    } else {
      sum_piece<T, Residual::rows>(a, source + begin, residual, row, first + begin, end - begin, nullptr, nullptr,
                                   0.0f, bits + begin);
    }
    sum_piece<T, Residual::none>(a, source + end, source, row, first + end, count - end, nullptr, nullptr, 0.0f,
                                 bits + end);
  }
  if (a.mask) pack_bits(bits, count, a.mask + row * mask_row_bytes(a.channels) + first / 8);
}

}  // namespace resfuse
