// Tensors made by kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace resfuse {

// at::empty, by one file alone: its header takes longer to compile than most kernels.
at::Tensor uninitialized(
    at::IntArrayRef size, at::TensorOptions options, std::optional<at::MemoryFormat> format = std::nullopt);

}  // namespace resfuse
