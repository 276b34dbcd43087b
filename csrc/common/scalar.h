// Scalar steps shared by every kernel, host and device: BatchNorm's affine map, ReLU, the mask bit.
//
// Products and sums round separately (no fused multiply-add), so that every instruction set and device gives the
// same bits for the same operands; the host side is compiled with -ffp-contract=off.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define RESFUSE_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define RESFUSE_HD inline __attribute__((always_inline))
#else
#define RESFUSE_HD inline
#endif

namespace resfuse {

// scale * z + shift, rounded after each operation.
RESFUSE_HD float affine(float z, float scale, float shift) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(__fmul_rn(z, scale), shift);
#else
  return z * scale + shift;
#endif
}

// The activation as a lower bound: 0 for ReLU, -inf for none. One loop then serves both.
RESFUSE_HD float lower_bound(bool relu) {
  return relu ? 0.0f : -INFINITY;
}

// max(v, bound) that keeps NaN, as torch's ReLU does.
RESFUSE_HD float clamp_below(float v, float bound) {
  return v <= bound ? bound : v;
}

// The mask bit of a stored value: gradient passes where it is 1. NaN passes, -0 does not.
RESFUSE_HD bool passes_gradient(float stored) {
  return !(stored <= 0.0f);
}

}  // namespace resfuse
