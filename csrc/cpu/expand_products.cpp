// expand_products: what the backward pass of a product a @ W.T needs of its gradient g, in one pass over g:
//   P = g.T @ (a - mean) [K, C]     sum(g) [K]     u = g @ Wg [M, C] in storage dtype
//
// g [M, K] (gradient.h) and a [M, C] are made from their recipes in cache, Wg [K, C]. Reads M*K*s (g), its mask and
// M*C*s (a), writes M*C*s (u). 4*M*K*C operations. Floats are centred before the product; bfloat16 would be rounded by
// that, and its product is corrected, P - sum(g) mean.T. P: float32 along a share's rows, shares added in order.
#include <memory>

#include "gradient_products.h"
#include "gradient_tensors.h"
#include "primitives.h"

namespace resfuse {

std::tuple<at::Tensor, at::Tensor, at::Tensor> expand_products(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const at::Tensor& x, const OptionalTensor& x_scale, const OptionalTensor& x_shift, bool x_relu,
    const OptionalTensor& mean, const OptionalTensor& wg, bool /*tf32*/) {
  const OptionalTensor none;
  const GradientTensors g{dout, mask, row_scale, factor, none, none, none, none, none, none};
  g.check();
  const int64_t outer = dout.size(1), rows = row_count(dout), inner = x.dim() == 4 ? x.size(1) : 0;
  check_view_beside(x, "x", dout, inner);
  check_affine(x_scale, x_shift, "x_scale", "x_shift", inner);
  if (mean) check_vector(*mean, "mean", inner);
  if (wg) check_matrix(*wg, "wg", dout.scalar_type(), outer, inner);

  const at::Tensor u = wg ? empty_rows(x, inner) : uninitialized({0}, x.options());
  const OuterGrid grid(rows, outer, inner);
  OuterSums sums(rows > 0 ? grid.shares : 0, outer, inner);
  std::vector<std::vector<double>> totals(grid.row_pass_shares(sums.empty()), std::vector<double>(outer, 0.0));
  const bool centred = with_types(dout, [&](auto stored, auto element) {
    using T = decltype(stored);
    using E = decltype(element);
    std::unique_ptr<Panels<E>> panels;
    if (wg) {
      panels = std::make_unique<Panels<E>>(round_up(outer, panel_columns), inner);
      pack(data_of<T>(*wg), *panels, outer);
    }
    const GradientProducts<T, E> whole{
        g.arguments<T>(), activation_of<T>(x, x_scale, x_shift, x_relu), vector_of(mean), grid.chunk, panels.get(),
        nullptr, wg ? mutable_data_of<T>(u) : nullptr};
    run_gradient_products(whole, rows, grid, sums, &totals);
    return word_elements<E> == 1;
  });

  const at::Tensor total = uninitialized({outer}, at::kFloat);
  float* t = total.mutable_data_ptr<float>();
  for (int64_t c = 0; c < outer; ++c) {
    double value = 0.0;
    for (const auto& share : totals) value += share[c];
    t[c] = static_cast<float>(value);
  }
  const bool correct = mean && !centred;
  const at::Tensor products =
      sums.merged(correct ? t : nullptr, correct ? vector_of(mean) : nullptr);
  return {products, total, u};
}

}  // namespace resfuse
