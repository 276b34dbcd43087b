// The algebra of the expanding convolution's BatchNorm, on weights and covariances, as operators.
#include "call.h"

namespace resfuse::cuda {
namespace {

void check_matrix(const at::Tensor& t, const char* name, const at::Tensor& like, at::ScalarType dtype, int64_t rows,
                  int64_t columns) {
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " must be ", dtype, ", not ", t.scalar_type());
  TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.is_contiguous() &&
                  t.device() == like.device(),
              name, " must be contiguous of shape [", rows, ", ", columns, "] on ", like.device(), ", not ", t.sizes(),
              " on ", t.device());
}

void check_weight(const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "weight must be a contiguous matrix, not of sizes ",
              weight.sizes(), " and strides ", weight.strides());
}

// Whether eight values of a row are one aligned access.
bool even_rows(const at::Tensor& t) {
  return t.size(1) % 8 == 0 && reinterpret_cast<intptr_t>(t.data_ptr()) % 16 == 0;
}

std::tuple<at::Tensor, at::Tensor> expand_stats_op(
    const at::Tensor& weight, const at::Tensor& mean, const at::Tensor& cov) {
  check_weight(weight);
  const int64_t outer = weight.size(0), inner = weight.size(1);
  check_vector(mean, "mean", weight, inner);
  check_matrix(cov, "cov", weight, at::kFloat, inner, inner);
  const at::Tensor found = empty_vector(weight, outer), var = empty_vector(weight, outer);
  Call call(weight);
  call.done(expand_stats(dtype_of(weight), call.in(weight, "weight"), call.in<float>(mean, "mean"),
                         call.in<float>(cov, "cov"), call.out<float>(found, "found"), call.out<float>(var, "var"),
                         int(outer), int(inner), even_rows(weight) && even_rows(cov), call.stream()));
  return {found, var};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> expand_coefficients_op(
    const at::Tensor& products, const at::Tensor& sum_g, const at::Tensor& weight, const at::Tensor& wg,
    const at::Tensor& mean, const at::Tensor& cov, const at::Tensor& scale, const at::Tensor& invstd, int64_t count) {
  check_weight(weight);
  const int64_t outer = weight.size(0), inner = weight.size(1);
  check_matrix(products, "products", weight, at::kFloat, outer, inner);
  check_matrix(wg, "wg", weight, weight.scalar_type(), outer, inner);
  check_matrix(cov, "cov", weight, at::kFloat, inner, inner);
  check_vector(sum_g, "sum_g", weight, outer);
  check_vector(scale, "scale", weight, outer);
  check_vector(invstd, "invstd", weight, outer);
  check_vector(mean, "mean", weight, inner);
  TORCH_CHECK(count > 0, "count must be positive, not ", count);
  const auto wide = weight.options().dtype(at::kFloat);
  const at::Tensor dgamma = empty_vector(weight, outer), dweight = at::empty({outer, inner}, wide);
  const at::Tensor q = at::empty({inner, inner}, weight.options()), q_scale = at::empty({}, wide);
  const at::Tensor c = empty_vector(weight, inner), factor = empty_vector(weight, outer);
  const at::Tensor full = empty_vector(weight, inner * inner);
  const at::Tensor largest = at::empty({coefficient_tiles(int(inner))}, wide.dtype(at::kInt));
  Call call(weight);
  const CoefficientOperands from{call.in<float>(products, "products"), call.in<float>(sum_g, "sum_g"),
                                 call.in(weight, "weight"),            call.in(wg, "wg"),
                                 call.in<float>(mean, "mean"),         call.in<float>(cov, "cov"),
                                 call.in<float>(scale, "scale"),       call.in<float>(invstd, "invstd")};
  const CoefficientResults to{call.out<float>(dgamma, "dgamma"), call.out<float>(dweight, "dweight"),
                              call.out(q, "q"),                  call.out<float>(q_scale, "q_scale"),
                              call.out<float>(c, "c"),           call.out<float>(factor, "factor"),
                              call.out<float>(full, "full"),     call.out<uint32_t>(largest, "largest")};
  const bool even = even_rows(weight) && even_rows(wg) && even_rows(products) && even_rows(cov);
  call.done(expand_coefficients(dtype_of(weight), from, to, count, int(outer), int(inner), even, call.stream()));
  return {dgamma, dweight, q, q_scale, c};
}

}  // namespace

CUDA_OPERATORS(m) {
  m.impl("expand_coefficients", &expand_coefficients_op);
  m.impl("expand_stats", &expand_stats_op);
}

}  // namespace resfuse::cuda
