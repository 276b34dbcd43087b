// BatchNorm under an activation other than ReLU as operators: checks, allocations, and what a launch needs.
#include "call.h"
#include "common/activations.h"

namespace resfuse::cuda {
namespace {

// ReLU has a place in every kernel, so these begin behind it.
void check_act(int64_t act) {
  constexpr auto first = static_cast<int64_t>(Act::leaky_relu);
  TORCH_CHECK(act >= first && act < activations, "act must be the number of an activation, from ", first, " to ",
              activations - 1, ", not ", act);
}

at::Tensor bn_act_op(const at::Tensor& z, const at::Tensor& scale, const at::Tensor& shift, int64_t act, double slope) {
  check_rows(z, "z");
  const int64_t channels = z.size(1);
  check_vector(scale, "scale", z, channels);
  check_vector(shift, "shift", z, channels);
  check_act(act);
  const at::Tensor y = empty_rows(z, channels);
  Call call(z);
  call.done(bn_act(dtype_of(z), call.in(z, "z"), call.in<float>(scale, "scale"), call.in<float>(shift, "shift"),
                   int(act), float(slope), call.out(y, "y"), row_count(z), int(channels), even(z), call.stream()));
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> bn_act_backward_op(
    const at::Tensor& dy, const at::Tensor& z, const at::Tensor& scale, const at::Tensor& shift, int64_t act,
    double slope, const at::Tensor& mean, const at::Tensor& invstd, bool batch) {
  check_rows(z, "z");
  check_rows(dy, "dy");
  const int64_t channels = z.size(1), rows = row_count(z);
  check_beside(dy, "dy", z, channels);
  for (const auto& [t, name] : {std::pair(&scale, "scale"), {&shift, "shift"}, {&mean, "mean"}, {&invstd, "invstd"}})
    check_vector(*t, name, z, channels);
  check_act(act);
  const at::Tensor partial = empty_vector(z, shares(rows, int(channels)) * 2 * channels), dz = empty_rows(z, channels);
  at::Tensor found[4];
  for (at::Tensor& t : found) t = empty_vector(z, channels);
  Call call(z);
  Gradient g;
  g.dout = call.in(dy, "dy");
  g.z = call.in(z, "z");
  g.scale = call.in<float>(scale, "scale");
  g.shift = call.in<float>(shift, "shift");
  g.mean = call.in<float>(mean, "mean");
  g.channels = int(channels);
  const ReduceResults results{call.out<float>(found[0], "dbeta"), call.out<float>(found[1], "dgamma"),
                              call.out<float>(found[2], "mean_dy"), call.out<float>(found[3], "slope"), nullptr};
  call.done(bn_act_backward(dtype_of(z), g, int(act), float(slope), call.in<float>(invstd, "invstd"),
                            call.out<float>(partial, "partial"), results, batch, call.out(dz, "dz"), rows,
                            even(dy) && even(z), call.stream()));
  return {dz, found[1], found[0]};
}

}  // namespace

CUDA_OPERATORS(m) {
  m.impl("bn_act", &bn_act_op);
  m.impl("bn_act_backward", &bn_act_backward_op);
}

}  // namespace resfuse::cuda
