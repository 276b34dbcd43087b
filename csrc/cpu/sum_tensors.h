// The operands of a sum as an operator gets them: checks, and what the kernels read.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "moments.h"
#include "operands.h"
#include "sum.h"

namespace resfuse {



struct SumTensors {
  const OptionalTensor& residual;        // [N, C', H, W] in storage dtype
  const OptionalTensor& residual_scale;  // [C'], or [K] of a second product
  const OptionalTensor& residual_shift;
  bool residual_relu;
  int64_t before;
  const OptionalTensor& row_scale;  // float32 [N]
  const OptionalTensor& gate;       // [N, K, H, W] in storage dtype
  double total_scale;
  bool relu;
  bool want_mask;
  bool want_stats;

  // like: a tensor with the pixels and dtype of out; second: whether a second product stands for the residual.
  void check(const at::Tensor& like, int64_t channels, bool second) const {
    int64_t affine = channels;
    if (residual) {
      check_view_beside(*residual, "residual", like, residual->dim() == 4 ? residual->size(1) : 0);
      affine = residual->size(1);
      TORCH_CHECK(before >= 0 && before + affine <= channels, "residual has ", affine, " channels from ", before,
                  " on, which do not fit into ", channels);
    } else {
      TORCH_CHECK(second || !residual_scale, "residual_scale and residual_shift need residual");
    }
    check_affine(residual_scale, residual_shift, "residual_scale", "residual_shift", affine);
    if (row_scale) check_vector(*row_scale, "row_scale", like.size(0));
    if (gate) check_rows_beside(*gate, "gate", like, channels);
  }
};

// out, its mask and its statistics, uninitialised; tensors of no elements for what is not wanted.
struct SumResult {
  at::Tensor out;
  at::Tensor mask;

  SumResult(const SumTensors& sum, const at::Tensor& like, int64_t channels)
      : out(empty_rows(like, channels)),
        mask(uninitialized({sum.want_mask ? row_count(like) : 0, mask_row_bytes(channels)},
                           like.options().dtype(at::kByte))) {}

  template <class T>
  SumArgs<T> arguments(const SumTensors& sum, const float* scale, const float* shift) const {
    return {scale,
            shift,
            rows_of<T>(sum.residual),
            sum.before,
            vector_of(sum.residual_scale),
            vector_of(sum.residual_shift),
            lower_bound(sum.residual_relu),
            sum.gate ? data_of<T>(*sum.gate) : nullptr,
            vector_of(sum.row_scale),
            std::max<int64_t>(1, out.size(2) * out.size(3)),
            static_cast<float>(sum.total_scale),
            lower_bound(sum.relu),
            mutable_data_of<T>(out),
            sum.want_mask ? mask.mutable_data_ptr<uint8_t>() : nullptr,
            out.size(1)};
  }

  // With the statistics of the shares, if there are any.
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> with(const std::vector<Moments>& shares) const {
    if (shares.empty()) return {out, mask, uninitialized({0}, at::kFloat), uninitialized({0}, at::kFloat)};
    auto [mean, var] = merged(shares);
    return {out, mask, mean, var};
  }
};

}  // namespace resfuse
