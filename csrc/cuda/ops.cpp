// The pointwise kernels and the reductions over rows as operators: checks, allocations, and what a launch needs.
#include <torch/library.h>

#include "call.h"
#include "schemas.h"

namespace resfuse::cuda {
namespace {

struct GradientTensors {
  const at::Tensor& dout;
  const OptionalTensor &mask, &row_scale;
  double factor;
  const OptionalTensor &z, &scale, &shift, &mean, &mean_dy, &slope;

  void check() const {
    const int64_t channels = dout.size(1);
    check_rows(dout, "dout");
    check_mask(mask, dout, channels);
    check_vector(row_scale, "row_scale", dout, dout.size(0));
    if (z) {
      check_rows(*z, "z");
      check_beside(*z, "z", dout, channels);
    }
    TORCH_CHECK(z || !(scale || shift || mean_dy || slope), "a gradient below BatchNorm needs z");
    TORCH_CHECK(!slope || (mean && mean_dy && scale), "slope needs mean, mean_dy and scale");
    for (const auto& [t, name] : {std::pair(&scale, "scale"), {&shift, "shift"}, {&mean, "mean"},
                                  {&mean_dy, "mean_dy"}, {&slope, "slope"}})
      check_vector(*t, name, dout, channels);
  }

  Gradient arguments(Call& call) const {
    Gradient g;
    g.dout = call.in(dout, "dout");
    g.mask = call.in<uint8_t>(mask, "mask");
    g.row_scale = call.in<float>(row_scale, "row_scale");
    g.factor = float(factor);
    g.pixels = dout.size(2) * dout.size(3);
    g.z = call.in(z, "z");
    g.scale = call.in<float>(scale, "scale");
    g.shift = call.in<float>(shift, "shift");
    g.mean = call.in<float>(mean, "mean");
    g.mean_dy = call.in<float>(mean_dy, "mean_dy");
    g.slope = call.in<float>(slope, "slope");
    g.channels = int(dout.size(1));
    return g;
  }

  bool even() const { return cuda::even(dout) && (!z || cuda::even(*z)); }
};

Rows rows_of(Call& call, const OptionalTensor& t, const char* name) {
  Rows rows;
  if (!t) return rows;
  rows.data = call.in(*t, name);
  rows.channels = int(t->size(1));
  if (!is_dense(*t))
    rows.view = {int(t->size(2) * t->size(3)), int(t->size(3)), t->stride(0), t->stride(2), t->stride(3)};
  return rows;
}

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
  const int64_t channels = z.size(1);
  TORCH_CHECK(!want_stats, "statistics of the sum are bn_stats' to take");
  check_vector(scale, "scale", z, channels);
  check_vector(shift, "shift", z, channels);
  check_vector(row_scale, "row_scale", z, z.size(0));
  if (residual) {
    check_beside(*residual, "residual", z, residual->size(1));
    TORCH_CHECK(before >= 0 && before + residual->size(1) <= channels, "residual has too many channels");
    check_vector(residual_scale, "residual_scale", z, residual->size(1));
    check_vector(residual_shift, "residual_shift", z, residual->size(1));
    TORCH_CHECK(!residual_scale || residual->size(1) == channels, "a normalised residual must have all channels");
  }
  if (gate) {
    check_rows(*gate, "gate");
    check_beside(*gate, "gate", z, channels);
  }
  const at::Tensor out = empty_rows(z, channels);
  const auto bytes = z.options().dtype(at::kByte).memory_format(at::MemoryFormat::Contiguous);
  const at::Tensor mask = at::empty({want_mask ? row_count(z) : 0, (channels + 7) / 8}, bytes);
  const bool aligned =
      even(z) && (!residual || residual->size(1) != channels || even(*residual)) && (!gate || even(*gate));
  Call call(z);
  Sum args;
  args.z = rows_of(call, z, "z");
  args.scale = call.in<float>(scale, "scale");
  args.shift = call.in<float>(shift, "shift");
  args.residual = rows_of(call, residual, "residual");
  args.residual_scale = call.in<float>(residual_scale, "residual_scale");
  args.residual_shift = call.in<float>(residual_shift, "residual_shift");
  args.residual_relu = residual_relu;
  args.before = int(before);
  args.row_scale = call.in<float>(row_scale, "row_scale");
  args.pixels = z.size(2) * z.size(3);
  args.gate = call.in(gate, "gate");
  args.factor = float(total_scale);
  args.relu = relu;
  args.out = call.out(out, "out");
  args.mask = want_mask ? call.out<uint8_t>(mask, "mask") : nullptr;
  args.rows = row_count(z);
  args.channels = int(channels);
  call.done(apply(dtype_of(z), args, aligned, call.stream()));
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
  const OptionalTensor given = z, none;
  const GradientTensors g{dout, mask, row_scale, factor, given, scale, shift, none, none, none};
  g.check();
  const int64_t channels = dout.size(1), rows = row_count(dout);
  check_vector(mean, "mean", dout, channels);
  check_vector(invstd, "invstd", dout, channels);
  check_vector(gamma, "gamma", dout, channels);
  const at::Tensor partial = empty_vector(dout, shares(rows, int(channels)) * 2 * channels);
  at::Tensor found[5];
  for (at::Tensor& t : found) t = empty_vector(dout, channels);
  Call call(dout);
  const ReduceResults results{call.out<float>(found[0], "dbeta"), call.out<float>(found[1], "dgamma"),
                              call.out<float>(found[2], "mean_dy"), call.out<float>(found[3], "slope"),
                              call.out<float>(found[4], "bn_scale")};
  call.done(bn_reduce(dtype_of(dout), g.arguments(call), call.in<float>(mean, "mean"), call.in<float>(invstd, "invstd"),
                      call.in<float>(gamma, "gamma"), call.out<float>(partial, "partial"), results, rows, g.even(),
                      call.stream()));
  return {found[0], found[1], found[2], found[3], found[4]};
}

Activation activation(Call& call, const at::Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift, bool relu) {
  return {rows_of(call, x, "x"), call.in<float>(scale, "x_scale"), call.in<float>(shift, "x_shift"), relu};
}

void check_activation(const at::Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift) {
  TORCH_CHECK(x.dim() == 4 && (x.stride(1) == 1 || is_dense(x)), "x must be channels_last or a strided view of it");
  TORCH_CHECK(scale.has_value() == shift.has_value(), "x_scale and x_shift belong together");
  check_vector(scale, "x_scale", x, x.size(1));
  check_vector(shift, "x_shift", x, x.size(1));
}

std::tuple<at::Tensor, at::Tensor> covariance_op(
    const at::Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift, bool relu, bool tf32) {
  check_activation(x, scale, shift);
  const int64_t channels = x.size(1), rows = row_count(x), shares = covariance_shares(dtype_of(x), rows, int(channels));
  const at::Tensor sums = empty_vector(x, (dtype_of(x) == DType::kFloat ? 2 : 1) * shares * channels);
  const at::Tensor squares = empty_vector(x, shares * channels * channels);
  const at::Tensor mean = empty_vector(x, channels), cov = empty_vector(x, channels * channels);
  Call call(x);
  call.done(covariance(dtype_of(x), activation(call, x, scale, shift, relu), tf32, call.out<float>(sums, "sums"),
                       call.part<float>(squares, "squares"), call.out<float>(mean, "mean"), call.out<float>(cov, "cov"),
                       rows, even(x), call.stream()));
  return {mean, cov.view({channels, channels})};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> expand_products_op(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const at::Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift, bool relu, const OptionalTensor& mean,
    const OptionalTensor& wg, bool tf32) {
  const OptionalTensor none;
  const GradientTensors g{dout, mask, row_scale, factor, none, none, none, none, none, none};
  g.check();
  check_activation(x, scale, shift);
  check_beside(x, "x", dout, x.size(1));
  check_vector(mean, "mean", x, x.size(1));
  const int64_t outer = dout.size(1), inner = x.size(1), rows = row_count(x);
  const bool aligned = g.even() && even(x);
  const int64_t shares = expand_shares(dtype_of(x), rows, int(outer), int(inner), aligned, wg.has_value());
  const at::Tensor products = empty_vector(x, shares * outer * inner), sums = empty_vector(x, shares * outer);
  const at::Tensor result = empty_vector(x, outer * inner), total = empty_vector(x, outer);
  if (wg) {
    TORCH_CHECK(wg->scalar_type() == x.scalar_type() && wg->dim() == 2 && wg->size(0) == outer && wg->size(1) == inner &&
                    wg->is_contiguous() && wg->device() == x.device(),
                "wg must be contiguous of shape [", outer, ", ", inner, "] and dtype ", x.scalar_type(), ", not ",
                wg->sizes(), " of ", wg->scalar_type());
    TORCH_CHECK(gives_u(dtype_of(x), int(outer), int(inner), aligned && reinterpret_cast<intptr_t>(wg->data_ptr()) % 16 == 0),
                "u comes in 16 bits, aligned, of at most 256 and 64 channels");
  }
  const at::Tensor u = wg ? empty_rows(x, inner) : at::empty({0}, x.options().memory_format(at::MemoryFormat::Contiguous));
  Call call(x);
  call.done(expand_products(dtype_of(x), g.arguments(call), activation(call, x, scale, shift, relu), tf32,
                            call.in<float>(mean, "mean"), call.in(wg, "wg"), call.out<float>(products, "products"),
                            call.out<float>(sums, "sums"), wg ? call.out(u, "u") : nullptr,
                            call.out<float>(result, "result"), call.out<float>(total, "total"), rows, aligned,
                            call.stream()));
  return {result.view({outer, inner}), total, u};
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
TORCH_LIBRARY_IMPL(resfuse_emulated, CPU, m) {
#else
TORCH_LIBRARY_IMPL(resfuse, CUDA, m) {
#endif
  m.impl("apply", &apply_op);
  m.impl("bn_stats", &bn_stats_op);
  m.impl("bn_dgrad", &bn_dgrad_op);
  m.impl("bn_reduce", &bn_reduce_op);
  m.impl("bn_relu_max_pool", &bn_relu_max_pool_op);
  m.impl("covariance", &covariance_op);
  m.impl("expand_products", &expand_products_op);
  m.impl("finalize", &finalize_op);
  m.impl("max_pool_backward", &max_pool_backward_op);
  m.impl("update_running", &update_running_op);
}

}  // namespace resfuse::cuda
