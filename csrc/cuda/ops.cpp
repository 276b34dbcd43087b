// The pointwise kernels and the reductions over rows as operators: checks, allocations, and what a launch needs. Products
// are ops_products.cpp's.
#include <torch/library.h>

#include "operands.h"
#include "schemas.h"

namespace resfuse::cuda {
namespace {

std::tuple<at::Tensor, at::Tensor> bn_stats_op(const at::Tensor& z) {
  check_rows(z, "z");
  const int64_t rows = row_count(z), channels = z.size(1);
  const at::Tensor partial = empty_vector(z, shares(rows, int(channels)) * 2 * channels);
  const at::Tensor mean = empty_vector(z, channels), var = empty_vector(z, channels);
  Call call(z);
  call.done(bn_stats(dtype_of(z), call.in(z, "z"), call.out<float>(partial, "partial"), call.out<float>(mean, "mean"),
                     call.out<float>(var, "var"), rows, int(channels), even(z), call.stream()));
  return {mean, var};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> finalize_op(
    const at::Tensor& mean, const at::Tensor& var, const OptionalTensor& gamma, const OptionalTensor& beta, double eps) {
  const int64_t channels = mean.numel();
  for (const auto& [t, name] : {std::pair(OptionalTensor(mean), "mean"), {var, "var"}, {gamma, "gamma"}, {beta, "beta"}})
    check_vector(t, name, mean, channels);
  const at::Tensor scale = at::empty_like(mean), shift = at::empty_like(mean), invstd = at::empty_like(mean);
  Call call(mean);
  call.done(finalize(call.in<float>(mean, "mean"), call.in<float>(var, "var"), call.in<float>(gamma, "gamma"),
                     call.in<float>(beta, "beta"), float(eps), call.out<float>(scale, "scale"),
                     call.out<float>(shift, "shift"), call.out<float>(invstd, "invstd"), int(channels), call.stream()));
  return {scale, shift, invstd};
}

void update_running_op(const at::Tensor& mean, const at::Tensor& var, int64_t count, const OptionalTensor& running_mean,
                       const OptionalTensor& running_var, const OptionalTensor& tracked, std::optional<double> momentum) {
  const int64_t channels = mean.numel();
  for (const auto& [t, name] : {std::pair(OptionalTensor(mean), "mean"), {var, "var"}, {running_mean, "running_mean"},
                                {running_var, "running_var"}})
    check_vector(t, name, mean, channels);
  TORCH_CHECK(running_mean.has_value() == running_var.has_value(), "running_mean and running_var belong together");
  TORCH_CHECK(!tracked || (tracked->scalar_type() == at::kLong && tracked->numel() == 1), "tracked must be one int64");
  TORCH_CHECK(momentum || tracked, "a cumulative average needs the counter");
  Call call(mean);
  call.done(update_running(call.in<float>(mean, "mean"), call.in<float>(var, "var"), count,
                           call.inout<float>(running_mean, "running_mean"),
                           call.inout<float>(running_var, "running_var"), call.inout<int64_t>(tracked, "tracked"),
                           float(momentum.value_or(-1.0)), int(channels), call.stream()));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> apply_op(
    const at::Tensor& z, const at::Tensor& scale, const at::Tensor& shift, const OptionalTensor& residual,
    const OptionalTensor& residual_scale, const OptionalTensor& residual_shift, bool residual_relu, int64_t before,
    const OptionalTensor& row_scale, const OptionalTensor& gate, double total_scale, bool relu, bool want_mask,
    bool want_stats) {
  TORCH_CHECK(!want_stats, "statistics of the sum are bn_stats' to take");
  check_vector(scale, "scale", z, z.size(1));
  check_vector(shift, "shift", z, z.size(1));
  const SumTensors sum{residual, residual_scale, residual_shift, residual_relu, before, row_scale,
                       gate,     total_scale,    relu,           want_mask};
  sum.check(z, z.size(1));
  const at::Tensor out = empty_rows(z, z.size(1)), mask = sum.empty_mask(out);
  Call call(z);
  Sum args = sum.arguments(call, out, mask);
  args.z = rows_of(call, z, "z");
  args.scale = call.in<float>(scale, "scale");
  args.shift = call.in<float>(shift, "shift");
  call.done(apply(dtype_of(z), args, even(z) && sum.even(z.size(1)), call.stream()));
  return {out, mask, empty_vector(z, 0), empty_vector(z, 0)};
}

at::Tensor bn_dgrad_op(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const OptionalTensor& z, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& mean,
    const OptionalTensor& mean_dy, const OptionalTensor& slope) {
  const GradientTensors g{dout, mask, row_scale, factor, z, scale, shift, mean, mean_dy, slope};
  g.check();
  const at::Tensor out = empty_rows(dout, dout.size(1));
  Call call(dout);
  call.done(bn_dgrad(dtype_of(dout), g.arguments(call), call.out(out, "out"), row_count(dout), g.even(), call.stream()));
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> bn_reduce_op(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const at::Tensor& z, const OptionalTensor& scale, const OptionalTensor& shift, const at::Tensor& mean,
    const at::Tensor& invstd, const OptionalTensor& gamma) {
  const OptionalTensor given = z, centre = mean, none;
  const GradientTensors g{dout, mask, row_scale, factor, given, scale, shift, centre, none, none};
  g.check();
  const int64_t channels = dout.size(1), rows = row_count(dout);
  check_vector(invstd, "invstd", dout, channels);
  check_vector(gamma, "gamma", dout, channels);
  const at::Tensor partial = empty_vector(dout, shares(rows, int(channels)) * 2 * channels);
  at::Tensor found[5];
  for (at::Tensor& t : found) t = empty_vector(dout, channels);
  Call call(dout);
  const ReduceResults results{call.out<float>(found[0], "dbeta"), call.out<float>(found[1], "dgamma"),
                              call.out<float>(found[2], "mean_dy"), call.out<float>(found[3], "slope"),
                              call.out<float>(found[4], "bn_scale")};
  call.done(bn_reduce(dtype_of(dout), g.arguments(call), call.in<float>(invstd, "invstd"),
                      call.in<float>(gamma, "gamma"), call.out<float>(partial, "partial"), results, rows, g.even(),
                      call.stream()));
  return {found[0], found[1], found[2], found[3], found[4]};
}

Pool pool_of(const at::Tensor& x, int64_t height, int64_t width, at::IntArrayRef size, at::IntArrayRef stride,
             at::IntArrayRef padding, at::IntArrayRef dilation) {
  for (const at::IntArrayRef pair : {size, stride, padding, dilation})
    TORCH_CHECK(pair.size() == 2, "size, stride, padding and dilation are pairs (height, width)");
  TORCH_CHECK(size[0] * size[1] <= 255 && height > 0 && width > 0, "a window has at most 255 values, and there is one");
  const auto number = [](int64_t v) { return int(v); };
  return {number(x.size(2)),    number(x.size(3)),    number(height),     number(width),
          number(size[0]),      number(size[1]),      number(stride[0]),  number(stride[1]),
          number(padding[0]),   number(padding[1]),   number(dilation[0]), number(dilation[1])};
}

std::tuple<at::Tensor, at::Tensor> bn_relu_max_pool_op(
    const at::Tensor& z, const at::Tensor& scale, const at::Tensor& shift, bool relu, int64_t height, int64_t width,
    at::IntArrayRef size, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  check_rows(z, "z");
  const int64_t channels = z.size(1);
  check_vector(scale, "scale", z, channels);
  check_vector(shift, "shift", z, channels);
  const Pool pool = pool_of(z, height, width, size, stride, padding, dilation);
  const auto options = z.options().memory_format(at::MemoryFormat::ChannelsLast);
  const at::Tensor out = at::empty({z.size(0), channels, height, width}, options);
  const at::Tensor argmax = at::empty({z.size(0), channels, height, width}, options.dtype(at::kByte));
  Call call(z);
  call.done(bn_relu_max_pool(dtype_of(z), call.in(z, "z"), call.in<float>(scale, "scale"), call.in<float>(shift, "shift"),
                             relu, call.out(out, "out"), call.out<uint8_t>(argmax, "argmax"), pool, row_count(out),
                             int(channels), even(z), call.stream()));
  return {out, argmax};
}

at::Tensor max_pool_backward_op(
    const at::Tensor& dout, const at::Tensor& argmax, const at::Tensor& x, at::IntArrayRef size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation) {
  check_rows(dout, "dout");
  check_rows(argmax, "argmax");
  TORCH_CHECK(argmax.scalar_type() == at::kByte && argmax.sizes() == dout.sizes(), "argmax must be bytes of dout's shape");
  TORCH_CHECK(x.dim() == 4 && x.size(0) == dout.size(0) && x.size(1) == dout.size(1), "x must have dout's channels");
  const Pool pool = pool_of(x, dout.size(2), dout.size(3), size, stride, padding, dilation);
  const at::Tensor dy = at::empty(x.sizes(), dout.options().memory_format(at::MemoryFormat::ChannelsLast));
  Call call(dout);
  call.done(max_pool_backward(dtype_of(dout), call.in(dout, "dout"), call.in<uint8_t>(argmax, "argmax"),
                              call.out(dy, "dy"), pool, row_count(dy), int(dy.size(1)),
                              even(dout) && reinterpret_cast<intptr_t>(argmax.data_ptr()) % 8 == 0, call.stream()));
  return dy;
}

}  // namespace

#ifdef RESFUSE_EMULATED
TORCH_LIBRARY(resfuse_emulated, m) {
  define_operators(m);
}
#endif

CUDA_OPERATORS(m) {
  m.impl("apply", &apply_op);
  m.impl("bn_stats", &bn_stats_op);
  m.impl("bn_dgrad", &bn_dgrad_op);
  m.impl("bn_reduce", &bn_reduce_op);
  m.impl("bn_relu_max_pool", &bn_relu_max_pool_op);
  m.impl("finalize", &finalize_op);
  m.impl("max_pool_backward", &max_pool_backward_op);
  m.impl("update_running", &update_running_op);
}

}  // namespace resfuse::cuda
