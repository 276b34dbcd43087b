// Depthwise convolutions: each channel has taps of its own, a vector of channels is worked on at a time.
#pragma once

#include <utility>

#include "act.h"
#include "window.h"

namespace resfuse {

constexpr int64_t lanes = 16;  // of the widest vectors: channels are filled up to a multiple of it
constexpr int64_t most_taps = 49;
// A block's source in cache, bytes.
constexpr int64_t depthwise_bytes = 384 << 10;

// Floats between two pixels in cache.
constexpr int64_t depthwise_stride(int64_t channels) {
  return round_up(channels, lanes);
}

// An activation with any function behind its BatchNorm; bound is not used.
template <class T>
struct ActRows {
  Activation<T> a;
  Act act;
  float slope;

  template <Act kind>
  RESFUSE_HD void fill(int64_t row, int64_t count, float* out, int64_t stride) const {
    for (int64_t r = 0; r < count; ++r) {
      fill_pixel<kind>(a.z.row(row + r), a.scale, a.shift, out + r * stride);
      for (int64_t c = a.z.channels; c < stride; ++c) out[r * stride + c] = 0.0f;
    }
  }

  template <Act kind>
  RESFUSE_HD void fill_pixel(
      const T* __restrict__ z, const float* __restrict__ scale, const float* __restrict__ shift,
      float* __restrict__ out) const {
    const int64_t channels = a.z.channels;
    const float bend = slope;
    for (int64_t c = 0; c < channels; ++c) {
      // Rounded to storage, as whoever else reads the activation sees it.
      out[c] = load(store<T>(act_value<kind>(affine(load(z[c]), scale[c], shift[c]), bend)));
    }
  }

  // Pixels row .. + count into out [count, stride], zeros behind the channels.
  RESFUSE_HD void operator()(int64_t row, int64_t count, float* out, int64_t stride) const {
    if (!a.is_norm()) {
      for (int64_t r = 0; r < count; ++r) {
        const T* __restrict__ z = a.z.row(row + r);
        float* __restrict__ o = out + r * stride;
        for (int64_t c = 0; c < a.z.channels; ++c) o[c] = load(z[c]);
        for (int64_t c = a.z.channels; c < stride; ++c) o[c] = 0.0f;
      }
      return;
    }
    switch (act) {
      case Act::none: return fill<Act::none>(row, count, out, stride);
      case Act::relu: return fill<Act::relu>(row, count, out, stride);
      case Act::leaky_relu: return fill<Act::leaky_relu>(row, count, out, stride);
      case Act::relu6: return fill<Act::relu6>(row, count, out, stride);
      case Act::silu: return fill<Act::silu>(row, count, out, stride);
      case Act::hardswish: return fill<Act::hardswish>(row, count, out, stride);
    }
  }
};

// A gradient's pixels likewise.
template <class T>
struct GradientRows {
  Gradient<T> g;

  RESFUSE_HD void operator()(int64_t row, int64_t count, float* out, int64_t stride) const {
    T piece[gradient_columns];
    for (int64_t r = 0; r < count; ++r) {
      float* __restrict__ o = out + r * stride;
      for (int64_t c = 0; c < g.channels; c += gradient_columns) {
        const int64_t n = std::min(gradient_columns, g.channels - c);
        gradient_row(g, row + r, c, n, piece);
        for (int64_t i = 0; i < n; ++i) o[c + i] = load(piece[i]);
      }
      for (int64_t c = g.channels; c < stride; ++c) o[c] = 0.0f;
    }
  }
};

// What `fill_block` calls.
template <class Rows>
struct LaneFiller {
  const Rows* rows;
  int64_t stride;
  RESFUSE_HD void operator()(int64_t row, int64_t count, float* out) const { (*rows)(row, count, out, stride); }
};

// Steps between values of one channel in cache, in floats: to the next row and column of the window, and to the next
// pixel of what is made, or of its gradient.
struct Steps {
  int64_t row, column, pixel, made;

  RESFUSE_HD Steps(const ConvWindow& w, int64_t stride)
      : row(w.dilation_h * w.line_pixels() * stride), column(w.dilation_w * stride), pixel(w.stride_w * stride),
        made(stride) {}

  // Neighbouring pixels read each other's columns.
  RESFUSE_HD bool shared() const { return pixel == column; }
};

// made[i] = (or, with `more`, +=) sum over taps of weight[t] * source for neighbouring pixels that share what they load;
// `taps` of a window `columns` wide. Written out by folds, so that the loop over channels, which compilers vectorise, is
// the innermost one.
template <int columns, bool more, int... taps, int... pixels>
RESFUSE_HD void make_pixels(
    std::integer_sequence<int, taps...>, std::integer_sequence<int, pixels...>, int64_t row, int64_t column,
    int64_t stride, const float* __restrict__ source, const float* __restrict__ weight, float* __restrict__ made) {
#pragma GCC ivdep
  for (int64_t c = 0; c < stride; ++c) {
    float sum[sizeof...(pixels)] = {(more ? made[pixels * stride + c] : 0.0f)...};
    const auto tap = [&](int t) __attribute__((always_inline)) {
      const float w = weight[t * stride + c];
      ((sum[pixels] += w * source[t / columns * row + (t % columns + pixels) * column + c]), ...);
    };
    (tap(taps), ...);
    ((made[pixels * stride + c] = sum[pixels]), ...);
  }
}

// sums[t] += sum over those pixels of g[i] * source.
template <int columns, int... taps, int... pixels>
RESFUSE_HD void add_pixels(
    std::integer_sequence<int, taps...>, std::integer_sequence<int, pixels...>, int64_t row, int64_t column,
    int64_t stride, const float* __restrict__ source, const float* __restrict__ g, float* __restrict__ sums) {
#pragma GCC ivdep
  for (int64_t c = 0; c < stride; ++c) {
    float sum[sizeof...(taps)] = {sums[taps * stride + c]...};
    const auto pixel = [&](int i) __attribute__((always_inline)) {
      const float own = g[i * stride + c];
      ((sum[taps] += own * source[taps / columns * row + (taps % columns + i) * column + c]), ...);
    };
    (pixel(pixels), ...);
    ((sums[taps * stride + c] = sum[taps]), ...);
  }
}

// A line of `count` pixels that share columns, of a window (or a part of one) of rows x columns.
template <int rows, int columns, bool more>
RESFUSE_HD void make_line(const Steps& s, const float* source, const float* weight, int64_t count, float* made) {
  constexpr int together = 4;
  constexpr std::make_integer_sequence<int, rows * columns> taps;
  int64_t q = 0;
  for (; q + together <= count; q += together) {
    make_pixels<columns, more>(taps, std::make_integer_sequence<int, together>{}, s.row, s.column, s.made,
                               source + q * s.pixel, weight, made + q * s.made);
  }
  for (; q < count; ++q) {
    make_pixels<columns, more>(taps, std::integer_sequence<int, 0>{}, s.row, s.column, s.made, source + q * s.pixel,
                               weight, made + q * s.made);
  }
}

template <int rows, int columns>
RESFUSE_HD void add_line(const Steps& s, const float* source, const float* g, int64_t count, float* sums) {
  constexpr int together = 8;
  constexpr std::make_integer_sequence<int, rows * columns> taps;
  int64_t q = 0;
  for (; q + together <= count; q += together) {
    add_pixels<columns>(taps, std::make_integer_sequence<int, together>{}, s.row, s.column, s.made,
                        source + q * s.pixel, g + q * s.made, sums);
  }
  for (; q < count; ++q) {
    add_pixels<columns>(taps, std::integer_sequence<int, 0>{}, s.row, s.column, s.made, source + q * s.pixel,
                        g + q * s.made, sums);
  }
}

// Windows of any other size, tap by tap.
RESFUSE_HD void make_tap(
    const Steps& s, const float* __restrict__ source, const float* __restrict__ weight, int64_t count, bool first,
    float* __restrict__ made) {
  for (int64_t q = 0; q < count; ++q) {
    const float* __restrict__ from = source + q * s.pixel;
    float* __restrict__ to = made + q * s.made;
    const int64_t channels = s.made;
    if (first) {
      for (int64_t c = 0; c < channels; ++c) to[c] = weight[c] * from[c];
    } else {
      for (int64_t c = 0; c < channels; ++c) to[c] += weight[c] * from[c];
    }
  }
}

RESFUSE_HD void add_tap(
    const Steps& s, const float* __restrict__ source, const float* __restrict__ g, int64_t count,
    float* __restrict__ sum) {
  const int64_t channels = s.made;
  for (int64_t q = 0; q < count; ++q) {
    for (int64_t c = 0; c < channels; ++c) sum[c] += g[q * channels + c] * source[q * s.pixel + c];
  }
}

}  // namespace resfuse
