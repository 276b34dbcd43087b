// The operators of torch.ops.resfuse.
#include "schemas.h"

TORCH_LIBRARY(resfuse, m) {
  resfuse::define_operators(m);
}
