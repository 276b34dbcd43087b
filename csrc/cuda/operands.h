// Recipes as the operators are given them: their checks, and what a launch takes of them.
#pragma once

#include <utility>

#include "call.h"

namespace resfuse::cuda {

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

inline Rows rows_of(Call& call, const OptionalTensor& t, const char* name) {
  Rows rows;
  if (!t) return rows;
  rows.data = call.in(*t, name);
  rows.channels = int(t->size(1));
  if (!is_dense(*t))
    rows.view = {int(t->size(2) * t->size(3)), int(t->size(3)), t->stride(0), t->stride(2), t->stride(3)};
  return rows;
}

inline Activation activation(
    Call& call, const at::Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift, bool relu) {
  return {rows_of(call, x, "x"), call.in<float>(scale, "x_scale"), call.in<float>(shift, "x_shift"), relu};
}

inline void check_activation(const at::Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift) {
  TORCH_CHECK(x.dim() == 4 && (x.stride(1) == 1 || is_dense(x)), "x must be channels_last or a strided view of it");
  TORCH_CHECK(scale.has_value() == shift.has_value(), "x_scale and x_shift belong together");
  check_vector(scale, "x_scale", x, x.size(1));
  check_vector(shift, "x_shift", x, x.size(1));
}

struct SumTensors {
  const OptionalTensor &residual, &residual_scale, &residual_shift;
  bool residual_relu;
  int64_t before;
  const OptionalTensor &row_scale, &gate;
  double factor;
  bool relu, want_mask;

  // second: the scale and shift are a second product's.
  void check(const at::Tensor& like, int64_t channels, bool second = false) const {
    check_vector(row_scale, "row_scale", like, like.size(0));
    if (residual) {
      check_beside(*residual, "residual", like, residual->size(1));
      TORCH_CHECK(before >= 0 && before + residual->size(1) <= channels, "residual has too many channels");
      TORCH_CHECK(!residual_scale || residual->size(1) == channels, "a normalised residual must have all channels");
      TORCH_CHECK(residual->stride(1) == 1 || is_dense(*residual), "residual must be channels_last or a strided view of it");
    }
    TORCH_CHECK(residual || second || !residual_scale, "residual_scale is of a residual");
    check_vector(residual_scale, "residual_scale", like, channels);
    check_vector(residual_shift, "residual_shift", like, channels);
    if (gate) {
      check_rows(*gate, "gate");
      check_beside(*gate, "gate", like, channels);
    }
  }

  bool even(int64_t channels) const {
    return (!residual || residual->size(1) != channels || cuda::even(*residual)) && (!gate || cuda::even(*gate));
  }

  at::Tensor empty_mask(const at::Tensor& out) const {
    return at::empty({want_mask ? row_count(out) : 0, (out.size(1) + 7) / 8},
                     out.options().dtype(at::kByte).memory_format(at::MemoryFormat::Contiguous));
  }

  Sum arguments(Call& call, const at::Tensor& out, const at::Tensor& mask) const {
    Sum args;
    args.residual = rows_of(call, residual, "residual");
    args.residual_scale = call.in<float>(residual_scale, "residual_scale");
    args.residual_shift = call.in<float>(residual_shift, "residual_shift");
    args.residual_relu = residual_relu;
    args.before = int(before);
    args.row_scale = call.in<float>(row_scale, "row_scale");
    args.pixels = out.size(2) * out.size(3);
    args.gate = call.in(gate, "gate");
    args.factor = float(factor);
    args.relu = relu;
    args.out = call.out(out, "out");
    args.mask = want_mask ? call.out<uint8_t>(mask, "mask") : nullptr;
    args.rows = row_count(out);
    args.channels = int(out.size(1));
    return args;
  }
};

}  // namespace resfuse::cuda
