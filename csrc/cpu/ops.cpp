// The operators of the CPU. torch/library.h takes seconds to compile: here, once.
#include "primitives.h"

#include <torch/library.h>

namespace resfuse {

TORCH_LIBRARY_IMPL(resfuse, CPU, m) {
  m.impl("apply", &apply);
  m.impl("bn_act", &bn_act);
  m.impl("bn_act_backward", &bn_act_backward);
  m.impl("bn_dgrad", &bn_dgrad);
  m.impl("bn_reduce", &bn_reduce);
  m.impl("bn_relu_max_pool", &bn_relu_max_pool);
  m.impl("max_pool_backward", &max_pool_backward);
  m.impl("bn_stats", &bn_stats);
  m.impl("conv_backward", &conv_backward);
  m.impl("conv_depthwise", &conv_depthwise);
  m.impl("conv_depthwise_dgrad", &conv_depthwise_dgrad);
  m.impl("conv_depthwise_wgrad", &conv_depthwise_wgrad);
  m.impl("conv_stats", &conv_stats);
  m.impl("conv_window", &conv_window);
  m.impl("conv_window_dgrad", &conv_window_dgrad);
  m.impl("conv_window_wgrad", &conv_window_wgrad);
  m.impl("covariance", &covariance);
  m.impl("expand", &expand);
  m.impl("expand_dgrad", &expand_dgrad);
  m.impl("expand_products", &expand_products);
  m.impl("expand_stats", &expand_stats);
  m.impl("expand_coefficients", &expand_coefficients);
  m.impl("finalize", &finalize);
  m.impl("update_running", &update_running);
}

TORCH_LIBRARY_IMPL(resfuse, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", &cpu_isa);
}

}  // namespace resfuse
