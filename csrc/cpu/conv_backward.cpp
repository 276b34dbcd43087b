// conv_backward: both gradients of a 1x1 convolution z = a @ W.T in one pass over the gradient of z:
//   da = dz @ W + add [M, C]     dW = dz.T @ a [K, C]
//
// dz [M, K] (gradient.h: BatchNorm's backward and ReLU's mask are its prologue), a [M, C] a tensor or recipe, W [K, C],
// add a gradient [M, C] of the same activation (the shortcut's) under its mask. Reads M*K*s (dout and z each) and M*C*s
// (a, add), writes M*C*s (da). 4*M*K*C operations. dW: float32 along a share's rows, shares added in order.
#include <memory>

#include "gradient_products.h"
#include "gradient_tensors.h"
#include "primitives.h"

namespace resfuse {

std::tuple<at::Tensor, at::Tensor> conv_backward(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const OptionalTensor& z, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& mean,
    const OptionalTensor& mean_dy, const OptionalTensor& slope, const at::Tensor& x, const OptionalTensor& x_scale,
    const OptionalTensor& x_shift, bool x_relu, const at::Tensor& weight, const OptionalTensor& add,
    const OptionalTensor& add_mask, const OptionalTensor& add_row_scale, double add_factor, bool want_input,
    bool want_weight, bool /*tf32*/) {
  const OptionalTensor none;
  const GradientTensors g{dout, mask, row_scale, factor, z, scale, shift, mean, mean_dy, slope};
  g.check();
  const int64_t outer = dout.size(1), inner = x.dim() == 4 ? x.size(1) : 0, rows = row_count(dout);
  check_view_beside(x, "x", dout, inner);
  check_affine(x_scale, x_shift, "x_scale", "x_shift", inner);
  check_matrix(weight, "weight", dout.scalar_type(), outer, inner);
  const GradientTensors beside{add ? *add : dout, add_mask, add_row_scale, add_factor, none, none, none, none, none,
                               none};
  if (add) {
    check_rows_beside(*add, "add", x, inner);
    beside.check();
  }

  const at::Tensor da = want_input ? empty_rows(x, inner) : uninitialized({0}, x.options());
  const OuterGrid grid(rows, outer, inner);
  OuterSums sums = want_weight ? OuterSums(rows > 0 ? grid.shares : 0, outer, inner) : OuterSums();
  with_types(dout, [&](auto stored, auto element) {
    using T = decltype(stored);
    using E = decltype(element);
    std::unique_ptr<Panels<E>> panels;
    if (want_input) {
      panels = std::make_unique<Panels<E>>(round_up(outer, panel_columns), inner);
      pack(data_of<T>(weight), *panels, outer);
    }
    const Gradient<T> added = beside.arguments<T>();
    const GradientProducts<T, E> whole{
        g.arguments<T>(), activation_of<T>(x, x_scale, x_shift, x_relu), nullptr, grid.chunk, panels.get(),
        add ? &added : nullptr, want_input ? mutable_data_of<T>(da) : nullptr};
    run_gradient_products(whole, rows, grid, sums, nullptr);
  });
  return {da, want_weight ? sums.merged() : uninitialized({0}, at::kFloat)};
}

}  // namespace resfuse
