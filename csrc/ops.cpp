// The schema of every operator. Implementations register themselves where they are defined.
#include <torch/library.h>

TORCH_LIBRARY(resfuse, m) {
  m.def(
      "apply(Tensor z, Tensor scale, Tensor shift, Tensor? residual, Tensor? residual_scale, Tensor? residual_shift, "
      "bool residual_relu, bool relu, bool want_mask) -> (Tensor out, Tensor mask)");
}
