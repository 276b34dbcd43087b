// Every operator of the CPU's set, as csrc/schemas.h has it; each is defined in the file of its primitive.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <tuple>

#include "operands.h"

namespace resfuse {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> apply(
    const at::Tensor& z, const at::Tensor& scale, const at::Tensor& shift, const OptionalTensor& residual,
    const OptionalTensor& residual_scale, const OptionalTensor& residual_shift, bool residual_relu, int64_t before,
    const OptionalTensor& row_scale, const OptionalTensor& gate, double total_scale, bool relu, bool want_mask,
    bool want_stats);

at::Tensor bn_act(const at::Tensor& z, const at::Tensor& scale, const at::Tensor& shift, int64_t act, double slope);

std::tuple<at::Tensor, at::Tensor, at::Tensor> bn_act_backward(
    const at::Tensor& dy, const at::Tensor& z, const at::Tensor& scale, const at::Tensor& shift, int64_t act,
    double slope, const at::Tensor& mean, const at::Tensor& invstd, bool batch);

at::Tensor bn_dgrad(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const OptionalTensor& z, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& mean,
    const OptionalTensor& mean_dy, const OptionalTensor& slope);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> bn_reduce(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const at::Tensor& z, const OptionalTensor& scale, const OptionalTensor& shift, const at::Tensor& mean,
    const at::Tensor& invstd, const OptionalTensor& gamma);

std::tuple<at::Tensor, at::Tensor> bn_relu_max_pool(
    const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift, bool relu, int64_t out_height,
    int64_t out_width, at::IntArrayRef size, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation);

at::Tensor max_pool_backward(
    const at::Tensor& dout, const at::Tensor& argmax, const at::Tensor& x, at::IntArrayRef size,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation);

std::tuple<at::Tensor, at::Tensor> bn_stats(const at::Tensor& z);

std::tuple<at::Tensor, at::Tensor> conv_backward(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const OptionalTensor& z, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& mean,
    const OptionalTensor& mean_dy, const OptionalTensor& slope, const at::Tensor& x, const OptionalTensor& x_scale,
    const OptionalTensor& x_shift, bool x_relu, const at::Tensor& weight, const OptionalTensor& add,
    const OptionalTensor& add_mask, const OptionalTensor& add_row_scale, double add_factor, bool want_input,
    bool want_weight, bool /*tf32*/);

std::tuple<at::Tensor, at::Tensor, at::Tensor> conv_depthwise(
    const at::Tensor& x, const OptionalTensor& x_scale, const OptionalTensor& x_shift, int64_t act, double slope,
    const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    int64_t out_height, int64_t out_width, bool want_stats);

at::Tensor conv_depthwise_dgrad(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const OptionalTensor& z, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& mean,
    const OptionalTensor& mean_dy, const OptionalTensor& slope, const at::Tensor& weight, int64_t height,
    int64_t width, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, const OptionalTensor& add,
    const OptionalTensor& add_mask, const OptionalTensor& add_row_scale, double add_factor);

at::Tensor conv_depthwise_wgrad(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const OptionalTensor& z, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& mean,
    const OptionalTensor& mean_dy, const OptionalTensor& slope, const at::Tensor& x, const OptionalTensor& x_scale,
    const OptionalTensor& x_shift, int64_t act, double act_slope, at::IntArrayRef size, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation);

std::tuple<at::Tensor, at::Tensor, at::Tensor> conv_stats(
    const at::Tensor& x, const OptionalTensor& x_scale, const OptionalTensor& x_shift, bool x_relu,
    const at::Tensor& weight, bool want_stats, bool /*tf32*/);

std::tuple<at::Tensor, at::Tensor, at::Tensor> conv_window(
    const at::Tensor& x, const OptionalTensor& x_scale, const OptionalTensor& x_shift, bool x_relu,
    const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    int64_t out_height, int64_t out_width, bool want_stats);

at::Tensor conv_window_dgrad(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const OptionalTensor& z, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& mean,
    const OptionalTensor& mean_dy, const OptionalTensor& slope, const at::Tensor& weight, int64_t height,
    int64_t width, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, const OptionalTensor& add,
    const OptionalTensor& add_mask, const OptionalTensor& add_row_scale, double add_factor);

at::Tensor conv_window_wgrad(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const OptionalTensor& z, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& mean,
    const OptionalTensor& mean_dy, const OptionalTensor& slope, const at::Tensor& x, const OptionalTensor& x_scale,
    const OptionalTensor& x_shift, bool x_relu, at::IntArrayRef size, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation);

std::tuple<at::Tensor, at::Tensor> covariance(
    const at::Tensor& x, const OptionalTensor& x_scale, const OptionalTensor& x_shift, bool x_relu, bool /*tf32*/);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> expand(
    const at::Tensor& x, const OptionalTensor& x_scale, const OptionalTensor& x_shift, bool x_relu,
    const at::Tensor& weight, const at::Tensor& scale, const at::Tensor& shift, const OptionalTensor& second,
    const OptionalTensor& second_scale, const OptionalTensor& second_shift, bool second_relu,
    const OptionalTensor& second_weight, const OptionalTensor& residual, const OptionalTensor& residual_scale,
    const OptionalTensor& residual_shift, bool residual_relu, int64_t before, const OptionalTensor& row_scale,
    const OptionalTensor& gate, double total_scale, bool relu, bool want_mask, bool want_stats,
    bool /*tf32*/);

at::Tensor expand_dgrad(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const OptionalTensor& u, const at::Tensor& x, const OptionalTensor& x_scale, const OptionalTensor& x_shift,
    bool x_relu, const at::Tensor& wg, const OptionalTensor& q, const OptionalTensor& q_scale, const OptionalTensor& c,
    bool relu, bool /*tf32*/);

std::tuple<at::Tensor, at::Tensor, at::Tensor> expand_products(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const at::Tensor& x, const OptionalTensor& x_scale, const OptionalTensor& x_shift, bool x_relu,
    const OptionalTensor& mean, const OptionalTensor& wg, bool /*tf32*/);

std::tuple<at::Tensor, at::Tensor> expand_stats(
    const at::Tensor& weight, const at::Tensor& mean, const at::Tensor& cov);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> expand_coefficients(
    const at::Tensor& products, const at::Tensor& sum_g, const at::Tensor& weight, const at::Tensor& wg,
    const at::Tensor& mean, const at::Tensor& cov, const at::Tensor& scale, const at::Tensor& invstd, int64_t count);

std::tuple<at::Tensor, at::Tensor, at::Tensor> finalize(
    const at::Tensor& mean, const at::Tensor& var, const OptionalTensor& gamma, const OptionalTensor& beta,
    double eps);

void update_running(
    const at::Tensor& mean, const at::Tensor& var, int64_t count, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& tracked, std::optional<double> momentum);

std::string cpu_isa();

}  // namespace resfuse
