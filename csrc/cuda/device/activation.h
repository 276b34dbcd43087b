// What follows a BatchNorm other than ReLU (common/activations.h), of a thread's eight channels. One kernel serves all
// of them: which it is all threads find alike, once for eight values.
#pragma once

#include <type_traits>

#include "common/activations.h"
#include "rows.h"

namespace resfuse::cuda {

template <class Work>
DEVICE_FN void with_act(Act act, const Work& work) {
  switch (act) {
    case Act::leaky_relu: return work(std::integral_constant<Act, Act::leaky_relu>{});
    case Act::relu6: return work(std::integral_constant<Act, Act::relu6>{});
    case Act::silu: return work(std::integral_constant<Act, Act::silu>{});
    case Act::hardswish: return work(std::integral_constant<Act, Act::hardswish>{});
    default: return;
  }
}

// act(v) in place of v.
DEVICE_FN void act_values(float (&v)[kVector], Act act, float slope) {
  with_act(act, [&](auto tag) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = act_value<decltype(tag)::value>(v[i], slope);
  });
}

// act'(v) in place of v.
DEVICE_FN void act_slopes(float (&v)[kVector], Act act, float slope) {
  with_act(act, [&](auto tag) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = act_slope<decltype(tag)::value>(v[i], slope);
  });
}

}  // namespace resfuse::cuda
