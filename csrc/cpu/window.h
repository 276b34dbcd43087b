// Convolutions with a window: which pixels are worked on at a time, and their source in cache with its padding.
//
// A block is a few lines of one image, or a few whole images where they are small. Its source is filled into cache as
// lines of `line_pixels` pixels, zeros where the window reaches over the edge; a tap of the window is then one offset
// for all pixels of the block.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <vector>

#include "gradient.h"
#include "isa.h"
#include "parallel.h"
#include "rows.h"

namespace resfuse {

struct ConvWindow {
  int64_t images;
  int64_t height, width;          // of the source
  int64_t out_height, out_width;  // of what is made of it
  int64_t rows, columns;          // of the window
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;

  int64_t taps() const { return rows * columns; }
  // That a line of what is made reads, from its first tap's on.
  RESFUSE_HD int64_t line_pixels() const {
    return out_width > 0 ? (out_width - 1) * stride_w + (columns - 1) * dilation_w + 1 : 0;
  }
};

// Over the pixels of a tensor [N, C, H, W].
inline ConvWindow window_over(
    const at::Tensor& x, int64_t out_height, int64_t out_width, at::IntArrayRef size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation) {
  return {x.size(0), x.size(2), x.size(3),  out_height, out_width,   size[0],     size[1],
          stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
}

struct Block {
  int64_t image, images;  // which, how many
  int64_t line, lines;    // lines of what is made, of each image
};

// All blocks of a convolution, alike but for the last ones.
struct Blocks {
  ConvWindow w;
  int64_t lines;         // of one image in a block
  int64_t images;        // in a block
  int64_t source_lines;  // of one image in cache

  // pixels: wanted in a block; threads: that shall have equally many of them.
  Blocks(const ConvWindow& window, int64_t pixels, int64_t threads) : w(window) {
    const int64_t line = std::max<int64_t>(1, w.out_width);
    pixels = std::min(pixels, std::max<int64_t>(1, w.images * w.out_height * w.out_width / threads));
    lines = std::clamp<int64_t>(pixels / line, 1, std::max<int64_t>(1, w.out_height));
    // Equal blocks of an image.
    const int64_t parts = (w.out_height + lines - 1) / lines;
    lines = (w.out_height + std::max<int64_t>(1, parts) - 1) / std::max<int64_t>(1, parts);
    images = parts > 1 ? 1 : std::clamp<int64_t>(pixels / std::max<int64_t>(1, line * lines), 1, w.images);
    if (images > 1) images = (w.images - 1) / round_up((w.images + images - 1) / images, threads) + 1;
    source_lines = (lines - 1) * w.stride_h + (w.rows - 1) * w.dilation_h + 1;
  }

  RESFUSE_HD int64_t per_image() const { return (w.out_height + lines - 1) / lines; }
  RESFUSE_HD int64_t count() const { return (w.images + images - 1) / images * per_image(); }
  RESFUSE_HD int64_t pixels() const { return images * lines * w.out_width; }
  RESFUSE_HD int64_t source_pixels() const { return images * source_lines * w.line_pixels(); }

  RESFUSE_HD Block at(int64_t index) const {
    const int64_t image = index / per_image() * images, line = index % per_image() * lines;
    return {image, std::min(images, w.images - image), line, std::min(lines, w.out_height - line)};
  }

  // The row of the matrix [M, K] where a block's pixels begin; they lie side by side.
  RESFUSE_HD int64_t first_row(const Block& b) const { return (b.image * w.out_height + b.line) * w.out_width; }
  RESFUSE_HD int64_t row_count(const Block& b) const { return b.images * b.lines * w.out_width; }

  // Source pixel of window position (0, 0) for pixel i of a block; one of whole images has every line.
  int64_t corner(int64_t i) const {
    const int64_t line = i / w.out_width;
    return ((line / lines) * source_lines + line % lines * w.stride_h) * w.line_pixels() + i % w.out_width * w.stride_w;
  }
};

// Where pixel (p, q) of what is made lies in the output, height x width: (first_h + p * step_h, first_w + q * step_w).
struct Place {
  int64_t height, width;
  int64_t first_h, first_w;
  int64_t step_h, step_w;
};

// In one direction, for the pixels of da that are `first` beyond a multiple of the stride: the taps that reach them,
// from the last one back, as a window of its own over dz.
struct Phase {
  int64_t last_tap;
  int64_t step;  // between taps
  int64_t count;
  int64_t dilation;
  int64_t padding;
  int64_t size;  // of what is made

  Phase(int64_t taps, int64_t stride, int64_t padding_, int64_t dilation_, int64_t length, int64_t first)
      : last_tap(-1), step(1), count(0), dilation(1), padding(0), size((length - first + stride - 1) / stride) {
    for (int64_t r = taps - 1; r >= 0; --r) {
      const int64_t at = first + padding_ - r * dilation_;
      if (at % stride != 0) continue;
      if (count == 0) {
        last_tap = r;
        padding = -at / stride;
      } else if (count == 1) {
        step = last_tap - r;
        dilation = step * dilation_ / stride;
      }
      ++count;
    }
  }
};

// The gradient of a convolution's input, height x width, as convolutions of dz: one for each place between strides.
struct InputGradient {
  int64_t height, width;
  std::vector<Phase> rows, columns;

  InputGradient(
      const at::Tensor& weight, int64_t height_, int64_t width_, at::IntArrayRef stride, at::IntArrayRef padding,
      at::IntArrayRef dilation)
      : height(height_), width(width_) {
    for (int64_t i = 0; i < stride[0]; ++i) {
      rows.emplace_back(weight.size(2), stride[0], padding[0], dilation[0], height, i);
    }
    for (int64_t i = 0; i < stride[1]; ++i) {
      columns.emplace_back(weight.size(3), stride[1], padding[1], dilation[1], width, i);
    }
    for (const auto* phases : {&rows, &columns}) {
      for (const Phase& phase : *phases) {
        TORCH_CHECK(phase.count > 0 && phase.padding >= 0, "every pixel must be reached, and none of the padding alone; "
                    "stride is ", stride, ", padding ", padding, ", dilation ", dilation);
      }
    }
  }

  // work(window over dz, place in da, taps): taps(t) is where in the weight's memory tap t begins.
  template <class Work>
  void each(const at::Tensor& dz, const at::Tensor& weight, const Work& work) const {
    for (size_t i = 0; i < rows.size(); ++i) {
      for (size_t j = 0; j < columns.size(); ++j) {
        const Phase &down = rows[i], &across = columns[j];
        if (down.size <= 0 || across.size <= 0) continue;
        const ConvWindow window{dz.size(0), dz.size(2), dz.size(3), down.size, across.size, down.count, across.count,
                                1, 1, down.padding, across.padding, down.dilation, across.dilation};
        const Place place{height, width, static_cast<int64_t>(i), static_cast<int64_t>(j),
                          static_cast<int64_t>(rows.size()), static_cast<int64_t>(columns.size())};
        work(window, place, [&](int64_t t) {
          return (down.last_tap - t / across.count * down.step) * weight.stride(2) +
                 (across.last_tap - t % across.count * across.step) * weight.stride(3);
        });
      }
    }
  }
};

// kernel_of(share) runs its share of the blocks.
template <class KernelOf>
void run_blocks(const Blocks& blocks, int64_t shares, const KernelOf& kernel_of) {
  at::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      run_best(kernel_of(s), blocks.count() * s / shares, blocks.count() * (s + 1) / shares);
    }
  });
}

// fill(row of the source matrix, its pixels, out): `stride` elements a pixel.
template <class E, class Fill>
RESFUSE_HD void fill_block(const Blocks& blocks, const Block& b, E* out, int64_t stride, const Fill& fill) {
  const ConvWindow& w = blocks.w;
  const int64_t line = w.line_pixels() * stride, left = std::min(w.padding_w, w.line_pixels());
  const int64_t inside = std::min(w.width, w.line_pixels() - left);
  for (int64_t n = 0; n < b.images; ++n) {
    for (int64_t i = 0; i < blocks.source_lines; ++i, out += line) {
      const int64_t h = b.line * w.stride_h - w.padding_h + i;
      if (h < 0 || h >= w.height) {
        for (int64_t j = 0; j < line; ++j) out[j] = E{};
        continue;
      }
      for (int64_t j = 0; j < left * stride; ++j) out[j] = E{};
      fill(((b.image + n) * w.height + h) * w.width, inside, out + left * stride);
      for (int64_t j = (left + inside) * stride; j < line; ++j) out[j] = E{};
    }
  }
}

}  // namespace resfuse
