// A gradient's operands as an operator gets them: checks, and what the kernels read.
#pragma once

#include <algorithm>
#include <utility>

#include "gradient.h"
#include "operands.h"

namespace resfuse {

struct GradientTensors {
  const at::Tensor& dout;          // [N, K, H, W]
  const OptionalTensor& mask;      // uint8 [M, ceil(K/8)]
  const OptionalTensor& row_scale; // float32 [N]
  double factor;
  const OptionalTensor& z;  // [N, K, H, W]: BatchNorm's backward is to be applied
  const OptionalTensor& scale;
  const OptionalTensor& shift;
  const OptionalTensor& mean;
  const OptionalTensor& mean_dy;
  const OptionalTensor& slope;

  void check() const {
    check_rows(dout, "dout");
    const int64_t channels = dout.size(1);
    if (mask) check_mask(*mask, "mask", row_count(dout), channels);
    if (row_scale) check_vector(*row_scale, "row_scale", dout.size(0));
    if (!z) return;
    check_rows_beside(*z, "z", dout, channels);
    const std::pair<const OptionalTensor&, const char*> vectors[] = {
        {scale, "scale"}, {mean, "mean"}, {mean_dy, "mean_dy"}, {slope, "slope"}, {shift, "shift"}};
    for (const auto& [vector, name] : vectors) {
      if (vector) check_vector(*vector, name, channels);
    }
    TORCH_CHECK(scale && mean, "scale and mean must be given with z");
    TORCH_CHECK(mean_dy.has_value() == slope.has_value(), "mean_dy and slope must be given together");
  }

  template <class T>
  Gradient<T> arguments() const {
    return {data_of<T>(dout),
            mask_of(mask),
            vector_of(row_scale),
            std::max<int64_t>(1, dout.size(2) * dout.size(3)),
            static_cast<float>(factor),
            z ? data_of<T>(*z) : nullptr,
            vector_of(scale),
            vector_of(shift),
            vector_of(mean),
            vector_of(mean_dy),
            vector_of(slope),
            dout.size(1)};
  }
};

}  // namespace resfuse
