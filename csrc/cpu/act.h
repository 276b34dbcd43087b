// From an activation's number to its template.
#pragma once

#include <c10/util/Exception.h>

#include <type_traits>

#include "../common/activations.h"

namespace resfuse {

template <Act act>
using ActTag = std::integral_constant<Act, act>;

inline void check_act(int64_t act, Act first = Act::none) {
  TORCH_CHECK(act >= static_cast<int64_t>(first) && act < activations, "act must be the number of an activation, from ",
              static_cast<int64_t>(first), " to ", activations - 1, ", not ", act);
}

// work(tag), tag() being an activation other than ReLU, which has a place in every kernel's prologue.
template <class Work>
void with_act(int64_t act, const Work& work) {
  switch (static_cast<Act>(act)) {
    case Act::leaky_relu: return work(ActTag<Act::leaky_relu>{});
    case Act::relu6: return work(ActTag<Act::relu6>{});
    case Act::silu: return work(ActTag<Act::silu>{});
    case Act::hardswish: return work(ActTag<Act::hardswish>{});
    default: return;
  }
}

}  // namespace resfuse
