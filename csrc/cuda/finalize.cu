// finalize: BatchNorm as one affine map. update_running: its buffers. One thread a channel; C values each way.
#include "device/rows.h"
#include "launchers.h"

namespace resfuse::cuda {
namespace {

constexpr int kBlock = 128;

__global__ void finalize_kernel(const float* __restrict__ mean, const float* __restrict__ var,
                                const float* __restrict__ gamma, const float* __restrict__ beta, float eps,
                                float* __restrict__ scale, float* __restrict__ shift, float* __restrict__ invstd,
                                int channels) {
  const int c = int(blockIdx.x) * kBlock + int(threadIdx.x);
  if (c >= channels) return;
  const float inverse = 1.0f / sqrtf(var[c] + eps), factor = gamma != nullptr ? gamma[c] * inverse : inverse;
  invstd[c] = inverse;
  scale[c] = factor;
  shift[c] = (beta != nullptr ? beta[c] : 0.0f) - mean[c] * factor;
}

__global__ void update_kernel(const float* __restrict__ mean, const float* __restrict__ var, float unbias,
                              float* running_mean, float* running_var, int64_t* tracked, float momentum, int channels) {
  const int c = int(threadIdx.x);
  if (tracked != nullptr) {
    const int64_t seen = *tracked + 1;
    if (momentum < 0.0f) momentum = float(1.0 / double(seen));
    __syncthreads();  // everybody has read the counter
    if (c == 0) *tracked = seen;
  }
  if (running_mean == nullptr) return;
  for (int i = c; i < channels; i += int(blockDim.x)) {
    running_mean[i] += momentum * (mean[i] - running_mean[i]);
    running_var[i] += momentum * (var[i] * unbias - running_var[i]);
  }
}

}  // namespace

int finalize(const float* mean, const float* var, const float* gamma, const float* beta, float eps, float* scale,
             float* shift, float* invstd, int channels, void* stream) {
  const dim3 grid(unsigned((channels + kBlock - 1) / kBlock));
  return launch(finalize_kernel, grid, dim3(kBlock), 0, static_cast<cudaStream_t>(stream), mean, var, gamma, beta, eps,
                scale, shift, invstd, channels);
}

int update_running(const float* mean, const float* var, int64_t count, float* running_mean, float* running_var,
                   int64_t* tracked, float momentum, int channels, void* stream) {
  const float unbias = float(double(count) / double(count - 1));
  return launch(update_kernel, dim3(1), dim3(256), 0, static_cast<cudaStream_t>(stream), mean, var, unbias,
                running_mean, running_var, tracked, momentum, channels);
}

}  // namespace resfuse::cuda
