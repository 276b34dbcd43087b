// bn_dgrad: a gradient (gradient.h) as a tensor: `select`'s g, or BatchNorm's dz. Reads M*C*s (dout), M*C*s (z) and the
// mask, writes M*C*s.
#include "gradient_tensors.h"
#include "isa.h"
#include "parallel.h"
#include "primitives.h"

namespace resfuse {

template <class T>
struct GradientKernel {
  Gradient<T> g;
  T* out;

  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      gradient_row(g, row, 0, g.channels, out + row * g.channels);
    }
  }
};

at::Tensor bn_dgrad(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const OptionalTensor& z, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& mean,
    const OptionalTensor& mean_dy, const OptionalTensor& slope) {
  const GradientTensors g{dout, mask, row_scale, factor, z, scale, shift, mean, mean_dy, slope};
  g.check();
  const at::Tensor out = empty_rows(dout, dout.size(1));
  const int64_t rows = row_count(dout);
  with_type(dout, [&](auto stored) {
    using T = decltype(stored);
    const GradientKernel<T> kernel{g.arguments<T>(), mutable_data_of<T>(out)};
    for_shares(rows, share_count(rows, dout.size(1)),
               [&](int64_t, int64_t begin, int64_t end) { run_best(kernel, begin, end); });
  });
  return out;
}

}  // namespace resfuse
