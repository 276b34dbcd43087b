// Argument checks of the CPU operators. Each raises, before anything is allocated, a sentence naming the argument.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace resfuse {

// t: [N, C, H, W] float32 or bfloat16 on the CPU, dense in channels_last.
inline void check_rows(const at::Tensor& t, const char* name) {
  TORCH_CHECK(t.device().is_cpu(), name, " must be on the CPU, not on ", t.device());
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16, name,
                   " must be float32 or bfloat16, not ", t.scalar_type());
  TORCH_CHECK(t.dim() == 4, name, " must have 4 dimensions [N, C, H, W], not ", t.dim());
  TORCH_CHECK(t.is_contiguous(at::MemoryFormat::ChannelsLast), name,
              " must be dense in channels_last; its sizes are ", t.sizes(), " and its strides ", t.strides());
}

inline void check_rows_like(const at::Tensor& t, const char* name, const at::Tensor& z) {
  check_rows(t, name);
  TORCH_CHECK_TYPE(t.scalar_type() == z.scalar_type(), name, " must have z's dtype ", z.scalar_type(), ", not ",
                   t.scalar_type());
  TORCH_CHECK(t.sizes() == z.sizes(), name, " must have z's shape ", z.sizes(), ", not ", t.sizes());
}

// t: float32 [C], contiguous, C the channels of z.
inline void check_channel_vector(const at::Tensor& t, const char* name, const at::Tensor& z) {
  TORCH_CHECK(t.device().is_cpu(), name, " must be on the CPU, not on ", t.device());
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat, name, " must be float32, not ", t.scalar_type());
  TORCH_CHECK(t.dim() == 1 && t.size(0) == z.size(1), name, " must have shape [", z.size(1), "], not ", t.sizes());
  TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

}  // namespace resfuse
