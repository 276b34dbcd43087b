// bn_act: y = act(scale * z + shift), rounded once to storage. Reads M*C*s, writes M*C*s.
#include "act.h"
#include "isa.h"
#include "operands.h"
#include "parallel.h"
#include "primitives.h"

namespace resfuse {

template <class T, Act act>
struct ActKernel {
  Rows<T> z;
  const float* scale;
  const float* shift;
  float slope;
  T* y;

  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    const float* __restrict__ s = scale;
    const float* __restrict__ t = shift;
    for (int64_t row = begin; row < end; ++row) {
      const T* __restrict__ from = z.row(row);
      T* __restrict__ to = y + row * z.channels;
      for (int64_t c = 0; c < z.channels; ++c) {
        to[c] = store<T>(act_value<act>(affine(load(from[c]), s[c], t[c]), slope));
      }
    }
  }
};

at::Tensor bn_act(const at::Tensor& z, const at::Tensor& scale, const at::Tensor& shift, int64_t act, double slope) {
  check_view(z, "z");
  const int64_t channels = z.size(1), rows = row_count(z);
  check_vector(scale, "scale", channels);
  check_vector(shift, "shift", channels);
  check_act(act, Act::leaky_relu);
  const at::Tensor y = empty_rows(z, channels);
  with_type(z, [&](auto stored) {
    using T = decltype(stored);
    with_act(act, [&](auto tag) {
      const ActKernel<T, tag()> kernel{
          rows_of<T>(z), data_of<float>(scale), data_of<float>(shift), static_cast<float>(slope), mutable_data_of<T>(y)};
      for_shares(rows, share_count(rows, channels),
                 [&](int64_t, int64_t begin, int64_t end) { run_best(kernel, begin, end); });
    });
  });
  return y;
}

}  // namespace resfuse
