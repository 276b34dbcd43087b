// The products of rows and of transposed rows as operators: checks, allocations, and what a launch needs.
#include "operands.h"

namespace resfuse::cuda {
namespace {

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

// A weight [outer, inner] of a product of x.
void check_weight(const at::Tensor& t, const char* name, const at::Tensor& x, int64_t outer, int64_t inner) {
  TORCH_CHECK_TYPE(t.scalar_type() == x.scalar_type(), name, " must have the dtype ", x.scalar_type(), ", not ",
                   t.scalar_type());
  TORCH_CHECK(t.dim() == 2 && t.size(0) == outer && t.size(1) == inner && t.is_contiguous() && t.device() == x.device(),
              name, " must be contiguous of shape [", outer, ", ", inner, "] on ", x.device(), ", not ", t.sizes(),
              " on ", t.device());
}

bool even_weight(const at::Tensor& t) {
  return t.size(0) % 8 == 0 && t.size(1) % 8 == 0 && reinterpret_cast<intptr_t>(t.data_ptr()) % 16 == 0;
}

// Where the moments of a product's tiles go, [tiles, 2, channels], and what comes of them; of no elements unless wanted.
struct MomentTensors {
  at::Tensor partial, mean, var;

  MomentTensors(const at::Tensor& like, int64_t channels, bool wanted)
      : partial(empty_vector(like, wanted ? row_tiles(dtype_of(like), row_count(like)) * 2 * channels : 0)),
        mean(empty_vector(like, wanted ? channels : 0)),
        var(empty_vector(like, wanted ? channels : 0)) {}
  float* partial_in(Call& call) const { return partial.numel() ? call.out<float>(partial, "partial") : nullptr; }
  float* mean_in(Call& call) const { return partial.numel() ? call.out<float>(mean, "mean") : nullptr; }
  float* var_in(Call& call) const { return partial.numel() ? call.out<float>(var, "var") : nullptr; }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> conv_stats_op(
    const at::Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift, bool relu, const at::Tensor& weight,
    bool want_stats, bool tf32) {
  check_activation(x, scale, shift);
  const int64_t outputs = weight.size(0);
  check_weight(weight, "weight", x, outputs, x.size(1));
  const at::Tensor z = empty_rows(x, outputs);
  const MomentTensors moments(x, outputs, want_stats);
  Call call(x);
  call.done(conv_stats(dtype_of(x), activation(call, x, scale, shift, relu), call.in(weight, "weight"), tf32,
                       call.out(z, "z"), moments.partial_in(call), moments.mean_in(call), moments.var_in(call),
                       row_count(x), int(outputs), even(x) && even_weight(weight), call.stream()));
  return {z, moments.mean, moments.var};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> expand_op(
    const at::Tensor& x, const OptionalTensor& x_scale, const OptionalTensor& x_shift, bool x_relu,
    const at::Tensor& weight, const at::Tensor& scale, const at::Tensor& shift, const OptionalTensor& second,
    const OptionalTensor& second_scale, const OptionalTensor& second_shift, bool second_relu,
    const OptionalTensor& second_weight, const OptionalTensor& residual, const OptionalTensor& residual_scale,
    const OptionalTensor& residual_shift, bool residual_relu, int64_t before, const OptionalTensor& row_scale,
    const OptionalTensor& gate, double total_scale, bool relu, bool want_mask, bool want_stats, bool tf32) {
  check_activation(x, x_scale, x_shift);
  const int64_t outputs = weight.size(0);
  check_weight(weight, "weight", x, outputs, x.size(1));
  check_vector(scale, "scale", x, outputs);
  check_vector(shift, "shift", x, outputs);
  TORCH_CHECK(second.has_value() == second_weight.has_value(), "second and second_weight belong together");
  TORCH_CHECK(!second || (!residual && residual_scale && residual_shift),
              "a second product is the residual, and has a scale and shift");
  if (second) {
    check_activation(*second, second_scale, second_shift);
    check_beside(*second, "second", x, second->size(1));
    check_weight(*second_weight, "second_weight", x, outputs, second->size(1));
  }
  const SumTensors sum{residual, residual_scale, residual_shift, residual_relu, before, row_scale,
                       gate,     total_scale,    relu,           want_mask};
  sum.check(x, outputs, second.has_value());
  const at::Tensor out = empty_rows(x, outputs), mask = sum.empty_mask(out);
  const MomentTensors moments(x, outputs, want_stats);
  const bool aligned = even(x) && even_weight(weight) && sum.even(outputs) &&
                       (!second || (even(*second) && even_weight(*second_weight)));
  Call call(x);
  Sum args = sum.arguments(call, out, mask);
  args.scale = call.in<float>(scale, "scale");
  args.shift = call.in<float>(shift, "shift");
  const Activation beside =
      second ? activation(call, *second, second_scale, second_shift, second_relu) : Activation{};
  call.done(expand(dtype_of(x), activation(call, x, x_scale, x_shift, x_relu), call.in(weight, "weight"), beside,
                   call.in(second_weight, "second_weight"), tf32, args, moments.partial_in(call), moments.mean_in(call),
                   moments.var_in(call), aligned, call.stream()));
  return {out, mask, moments.mean, moments.var};
}

at::Tensor expand_dgrad_op(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const OptionalTensor& u, const at::Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift, bool x_relu,
    const at::Tensor& wg, const OptionalTensor& q, const OptionalTensor& q_scale, const OptionalTensor& c, bool relu,
    bool tf32) {
  const OptionalTensor none;
  const GradientTensors g{dout, mask, row_scale, factor, none, none, none, none, none, none};
  const int64_t outer = dout.size(1), inner = x.size(1);
  g.check();
  check_activation(x, scale, shift);
  check_beside(x, "x", dout, inner);
  check_weight(wg, "wg", x, outer, inner);
  TORCH_CHECK(q.has_value() == q_scale.has_value() && q.has_value() == c.has_value(), "q, q_scale and c belong together");
  if (q) {
    check_weight(*q, "q", x, inner, inner);
    TORCH_CHECK(q_scale->scalar_type() == at::kFloat && q_scale->numel() == 1, "q_scale must be one float32");
    check_vector(c, "c", x, inner);
  }
  if (u) {
    check_rows(*u, "u");
    TORCH_CHECK(u->sizes() == x.sizes() && (u->scalar_type() == x.scalar_type() || u->scalar_type() == at::kFloat),
                "u must have x's shape ", x.sizes(), " and be in float32 or as x is stored, not ", u->sizes(), " of ",
                u->scalar_type());
  }
  const bool aligned = g.even() && even(x) && even_weight(wg) && (!q || even_weight(*q)) && (!u || even(*u));
  const at::Tensor da = empty_rows(x, inner);
  Call call(x);
  call.done(expand_dgrad(dtype_of(x), g.arguments(call), call.in(u, "u"), u && u->scalar_type() != x.scalar_type(),
                         activation(call, x, scale, shift, x_relu), call.in(wg, "wg"), call.in(q, "q"),
                         call.in<float>(q_scale, "q_scale"), call.in<float>(c, "c"), relu, tf32, call.out(da, "da"),
                         row_count(x), aligned, call.stream()));
  return da;
}

// dweight is expand_products of dz, which BatchNorm's recipe is written as on the way.
std::tuple<at::Tensor, at::Tensor> conv_backward_op(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const OptionalTensor& z, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& mean,
    const OptionalTensor& mean_dy, const OptionalTensor& slope, const at::Tensor& x, const OptionalTensor& x_scale,
    const OptionalTensor& x_shift, bool x_relu, const at::Tensor& weight, const OptionalTensor& add,
    const OptionalTensor& add_mask, const OptionalTensor& add_row_scale, double add_factor, bool want_input,
    bool want_weight, bool tf32) {
  const OptionalTensor none;
  const GradientTensors g{dout, mask, row_scale, factor, z, scale, shift, mean, mean_dy, slope};
  const int64_t outer = dout.size(1), inner = x.size(1);
  g.check();
  check_activation(x, x_scale, x_shift);
  check_beside(x, "x", dout, inner);
  check_weight(weight, "weight", x, outer, inner);
  const auto nothing = x.options().memory_format(at::MemoryFormat::Contiguous);
  at::Tensor da = want_input ? empty_rows(x, inner) : at::empty({0}, nothing), dweight = empty_vector(x, 0), dz;
  const bool through = z.has_value() && want_weight;
  if (want_input) {
    const at::Tensor& beside = add ? *add : dout;
    const GradientTensors other{beside, add_mask, add_row_scale, add_factor, none, none, none, none, none, none};
    if (add) {
      check_beside(*add, "add", x, inner);
      other.check();
    }
    if (through) dz = empty_rows(dout, outer);
    Call call(x);
    call.done(conv_dgrad(dtype_of(x), g.arguments(call), call.in(weight, "weight"),
                         add ? other.arguments(call) : Gradient{}, tf32, through ? call.out(dz, "dz") : nullptr,
                         call.out(da, "da"), row_count(x), int(inner),
                         g.even() && even_weight(weight) && (!add || other.even()), call.stream()));
  } else if (through) {
    dz = empty_rows(dout, outer);
    Call call(dout);
    call.done(bn_dgrad(
        dtype_of(dout), g.arguments(call), call.out(dz, "dz"), row_count(dout), g.even(), call.stream()));
  }
  if (want_weight) {
    const auto products = through ? expand_products_op(dz, none, none, 1.0, x, x_scale, x_shift, x_relu, none, none, tf32)
                                  : expand_products_op(dout, mask, row_scale, factor, x, x_scale, x_shift, x_relu, none,
                                                       none, tf32);
    dweight = std::get<0>(products);
  }
  return {da, dweight};
}

}  // namespace

CUDA_OPERATORS(m) {
  m.impl("conv_backward", &conv_backward_op);
  m.impl("conv_stats", &conv_stats_op);
  m.impl("covariance", &covariance_op);
  m.impl("expand", &expand_op);
  m.impl("expand_dgrad", &expand_dgrad_op);
  m.impl("expand_products", &expand_products_op);
}

}  // namespace resfuse::cuda
