// The schema of every operator. cpu/ops.cpp and cuda/ops.cpp register the implementations, each for its device; kernels
// run without a GPU have a library of their own with the same schemas.
//
// A recipe comes as its tensor with `scale` and `shift`, absent where the tensor itself is meant. Tensors of no
// elements stand for results that were not asked for. tf32: a GPU's products of float32 read operands rounded to it.
#pragma once

#include <torch/library.h>

// The operands of interface.Sum and interface.Want.
#define RESFUSE_SUM                                                                                    \
  "Tensor? residual, Tensor? residual_scale, Tensor? residual_shift, bool residual_relu, int before, " \
  "Tensor? row_scale, Tensor? gate, float total_scale, bool relu, bool want_mask, bool want_stats"

// Those of interface.Masked, and of interface.BNGrad behind it.
#define RESFUSE_MASKED "Tensor dout, Tensor? mask, Tensor? row_scale, float factor"
#define RESFUSE_GRADIENT \
  RESFUSE_MASKED ", Tensor? z, Tensor? scale, Tensor? shift, Tensor? mean, Tensor? mean_dy, Tensor? slope"

// An activation, interface.Act.
#define RESFUSE_ACT "Tensor x, Tensor? x_scale, Tensor? x_shift, bool x_relu"
// One with any activation, by its number in csrc/common/activations.h.
#define RESFUSE_ANY_ACT "Tensor x, Tensor? x_scale, Tensor? x_shift, int act, float act_slope"

namespace resfuse {

inline void define_operators(torch::Library& m) {
  m.def("cpu_isa() -> str");
  m.def("apply(Tensor z, Tensor scale, Tensor shift, " RESFUSE_SUM
        ") -> (Tensor out, Tensor mask, Tensor mean, Tensor var)");
  m.def("bn_act(Tensor z, Tensor scale, Tensor shift, int act, float slope) -> Tensor");
  m.def("bn_act_backward(Tensor dy, Tensor z, Tensor scale, Tensor shift, int act, float slope, Tensor mean, "
        "Tensor invstd, bool batch) -> (Tensor dz, Tensor dgamma, Tensor dbeta)");
  m.def("bn_stats(Tensor z) -> (Tensor mean, Tensor var)");
  m.def("conv_depthwise(" RESFUSE_ANY_ACT ", Tensor weight, int[] stride, int[] padding, int[] dilation, "
        "int out_height, int out_width, bool want_stats) -> (Tensor z, Tensor mean, Tensor var)");
  m.def("conv_depthwise_dgrad(" RESFUSE_GRADIENT ", Tensor weight, int height, int width, int[] stride, "
        "int[] padding, int[] dilation, Tensor? add, Tensor? add_mask, Tensor? add_row_scale, float add_factor) "
        "-> Tensor");
  m.def("conv_depthwise_wgrad(" RESFUSE_GRADIENT ", " RESFUSE_ANY_ACT ", int[] size, int[] stride, int[] padding, "
        "int[] dilation) -> Tensor");
  m.def("conv_stats(" RESFUSE_ACT ", Tensor weight, bool want_stats, bool tf32=False) "
        "-> (Tensor z, Tensor mean, Tensor var)");
  m.def("conv_window(" RESFUSE_ACT ", Tensor weight, int[] stride, int[] padding, int[] dilation, int out_height, "
        "int out_width, bool want_stats) -> (Tensor z, Tensor mean, Tensor var)");
  m.def("conv_window_dgrad(" RESFUSE_GRADIENT ", Tensor weight, int height, int width, int[] stride, int[] padding, "
        "int[] dilation, Tensor? add, Tensor? add_mask, Tensor? add_row_scale, float add_factor) -> Tensor");
  m.def("conv_window_wgrad(" RESFUSE_GRADIENT ", " RESFUSE_ACT ", int[] size, int[] stride, int[] padding, "
        "int[] dilation) -> Tensor");
  m.def("covariance(" RESFUSE_ACT ", bool tf32=False) -> (Tensor mean, Tensor cov)");
  m.def("expand(" RESFUSE_ACT ", Tensor weight, Tensor scale, Tensor shift, Tensor? second, Tensor? second_scale, "
        "Tensor? second_shift, bool second_relu, Tensor? second_weight, " RESFUSE_SUM
        ", bool tf32=False) -> (Tensor out, Tensor mask, Tensor mean, Tensor var)");
  m.def("expand_products(" RESFUSE_MASKED ", " RESFUSE_ACT
        ", Tensor? mean, Tensor? wg, bool tf32=False) -> (Tensor products, Tensor sum_g, Tensor u)");
  m.def("expand_dgrad(" RESFUSE_MASKED ", Tensor? u, " RESFUSE_ACT
        ", Tensor wg, Tensor? q, Tensor? q_scale, Tensor? c, bool relu, bool tf32=False) -> Tensor");
  m.def("expand_stats(Tensor weight, Tensor mean, Tensor cov) -> (Tensor mean, Tensor var)");
  m.def("expand_coefficients(Tensor products, Tensor sum_g, Tensor weight, Tensor wg, Tensor mean, Tensor cov, "
        "Tensor scale, Tensor invstd, int count) "
        "-> (Tensor dgamma, Tensor dweight, Tensor q, Tensor q_scale, Tensor c)");
  m.def("finalize(Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps) "
        "-> (Tensor scale, Tensor shift, Tensor invstd)");
  m.def("update_running(Tensor mean, Tensor var, int count, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
        "Tensor(c!)? tracked, float? momentum) -> ()");
  m.def("bn_reduce(" RESFUSE_MASKED ", Tensor z, Tensor? scale, Tensor? shift, Tensor mean, Tensor invstd, "
        "Tensor? gamma) -> (Tensor dbeta, Tensor dgamma, Tensor mean_dy, Tensor slope, Tensor bn_scale)");
  m.def("bn_relu_max_pool(Tensor x, Tensor scale, Tensor shift, bool relu, int out_height, int out_width, int[] size, "
        "int[] stride, int[] padding, int[] dilation) -> (Tensor out, Tensor argmax)");
  m.def("max_pool_backward(Tensor dout, Tensor argmax, Tensor x, int[] size, int[] stride, int[] padding, "
        "int[] dilation) -> Tensor");
  m.def("bn_dgrad(" RESFUSE_GRADIENT ") -> Tensor");
  m.def("conv_backward(" RESFUSE_GRADIENT ", " RESFUSE_ACT ", Tensor weight, Tensor? add, Tensor? add_mask, "
        "Tensor? add_row_scale, float add_factor, bool want_input, bool want_weight, bool tf32=False) "
        "-> (Tensor da, Tensor dweight)");
}

}  // namespace resfuse
