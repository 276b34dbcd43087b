#include "tensors.h"

#include <ATen/ops/empty.h>

namespace resfuse {

at::Tensor uninitialized(at::IntArrayRef size, at::TensorOptions options, std::optional<at::MemoryFormat> format) {
  return at::empty(size, options, format);
}

}  // namespace resfuse
