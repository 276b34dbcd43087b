// What a launch is given: plain structures of device pointers, without a CUDA or torch header. What is null is left out.
#pragma once

#include <cstdint>

namespace resfuse::cuda {

// How activations and their gradients are stored; vectors are float32.
enum class DType { kFloat, kBFloat16, kHalf };

// Every s-th pixel of a larger tensor; pixels 0: rows follow one another.
struct View {
  int pixels = 0, width = 0;
  int64_t sample = 0, line = 0, pixel = 0;
};

// M = N*H*W rows of C channels.
struct Rows {
  const void* data = nullptr;
  int channels = 0;
  View view;
};

// interface.Act: act(scale * x + shift), x itself where scale is null.
struct Activation {
  Rows x;
  const float *scale = nullptr, *shift = nullptr;
  bool relu = false;
};

// interface.Masked and interface.BNGrad:
//   dy = factor * row_scale[n] * (dout where mask else 0),   0 where scale * z + shift <= 0
//   g  = scale * (dy - mean_dy - (z - mean) * slope)
struct Gradient {
  const void* dout = nullptr;        // [M, C]
  const uint8_t* mask = nullptr;     // [M, ceil(C/8)]
  const float* row_scale = nullptr;  // [N]
  float factor = 1.0f;
  int64_t pixels = 1;                // rows of a sample
  const void* z = nullptr;           // [M, C]
  const float *scale = nullptr, *shift = nullptr, *mean = nullptr, *mean_dy = nullptr, *slope = nullptr;
  int channels = 0;
};

// interface.Sum, its main branch scale * z + shift:
//   act(factor * (gate * row_scale[n] * main + (1 - gate) * residual)),   mask = not (out <= 0)
struct Sum {
  Rows z;
  const float *scale = nullptr, *shift = nullptr;
  Rows residual;
  const float *residual_scale = nullptr, *residual_shift = nullptr;
  bool residual_relu = false;
  int before = 0;                    // channels of zeros before the residual's own
  const float* row_scale = nullptr;  // [N]
  int64_t pixels = 1;                // rows of a sample
  const void* gate = nullptr;        // [M, C]
  float factor = 1.0f;
  bool relu = true;
  void* out = nullptr;               // [M, C]
  uint8_t* mask = nullptr;           // [M, ceil(C/8)]
  int64_t rows = 0;
  int channels = 0;
};

// A pool's windows over an input of height x width pixels; each pair (height, width).
struct Pool {
  int height = 0, width = 0, out_height = 0, out_width = 0;
  int rows = 0, columns = 0, down = 0, right = 0, top = 0, left = 0, apart = 0, across = 0;  // size .. dilation
};

// BatchNorm's backward, each [C]: dbeta = sum(dy), dgamma = invstd * sum(dy * (z - mean)), mean_dy = dbeta / M,
// slope = invstd^2 * sum(dy * (z - mean)) / M, bn_scale = gamma * invstd, null where it is not wanted.
struct ReduceResults {
  float *dbeta, *dgamma, *mean_dy, *slope, *bn_scale;
};

}  // namespace resfuse::cuda
