// Argument checks of the CPU operators. Each raises, before anything is allocated, a sentence naming the argument.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

#include "product.h"
#include "rows.h"

namespace resfuse {

inline int64_t row_count(const at::Tensor& t) {
  return t.size(0) * t.size(2) * t.size(3);
}

inline bool is_dense(const at::Tensor& t) {
  return t.is_contiguous(at::MemoryFormat::ChannelsLast);
}

// t: [N, C, H, W] float32 or bfloat16 on the CPU, its channels side by side: channels_last, or a strided view of it.
inline void check_view(const at::Tensor& t, const char* name) {
  TORCH_CHECK(t.device().is_cpu(), name, " must be on the CPU, not on ", t.device());
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16, name,
                   " must be float32 or bfloat16, not ", t.scalar_type());
  TORCH_CHECK(t.dim() == 4, name, " must have 4 dimensions [N, C, H, W], not ", t.dim());
  TORCH_CHECK(t.stride(1) == 1 || is_dense(t), name, " must be channels_last or a strided view of it; its sizes are ",
              t.sizes(), " and its strides ", t.strides());
}

// As check_view, and dense.
inline void check_rows(const at::Tensor& t, const char* name) {
  check_view(t, name);
  TORCH_CHECK(is_dense(t), name, " must be dense in channels_last; its sizes are ", t.sizes(), " and its strides ",
              t.strides());
}

inline void check_same_dtype(const at::Tensor& t, const char* name, const at::Tensor& z) {
  TORCH_CHECK_TYPE(t.scalar_type() == z.scalar_type(), name, " must have the dtype ", z.scalar_type(), ", not ",
                   t.scalar_type());
}

// t: a view with `channels` channels and the pixels and dtype of z.
inline void check_view_beside(const at::Tensor& t, const char* name, const at::Tensor& z, int64_t channels) {
  check_view(t, name);
  check_same_dtype(t, name, z);
  TORCH_CHECK(t.size(0) == z.size(0) && t.size(1) == channels && t.size(2) == z.size(2) && t.size(3) == z.size(3),
              name, " must have the shape [", z.size(0), ", ", channels, ", ", z.size(2), ", ", z.size(3), "], not ",
              t.sizes());
}

inline void check_rows_beside(const at::Tensor& t, const char* name, const at::Tensor& z, int64_t channels) {
  check_view_beside(t, name, z, channels);
  check_rows(t, name);
}

// t: float32, contiguous, of `count` values.
inline void check_vector(const at::Tensor& t, const char* name, int64_t count) {
  TORCH_CHECK(t.device().is_cpu(), name, " must be on the CPU, not on ", t.device());
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat, name, " must be float32, not ", t.scalar_type());
  TORCH_CHECK(t.dim() == 1 && t.size(0) == count, name, " must have shape [", count, "], not ", t.sizes());
  TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

// scale and shift of a recipe, both or neither.
inline void check_affine(
    const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift, const char* scale_name,
    const char* shift_name, int64_t channels) {
  TORCH_CHECK(scale.has_value() == shift.has_value(), scale_name, " and ", shift_name, " must be given together");
  if (!scale) return;
  check_vector(*scale, scale_name, channels);
  check_vector(*shift, shift_name, channels);
}

// t: [rows, columns], contiguous.
inline void check_matrix(const at::Tensor& t, const char* name, at::ScalarType dtype, int64_t rows, int64_t columns) {
  TORCH_CHECK(t.device().is_cpu(), name, " must be on the CPU, not on ", t.device());
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " must have the dtype ", dtype, ", not ", t.scalar_type());
  TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, " must have shape [", rows, ", ",
              columns, "], not ", t.sizes());
  TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

inline void check_mask(const at::Tensor& t, const char* name, int64_t rows, int64_t channels) {
  check_matrix(t, name, at::kByte, rows, (channels + 7) / 8);
}

}  // namespace resfuse
