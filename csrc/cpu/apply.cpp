// apply: the sum (sum.h) whose main branch is scale * z + shift, its mask and its statistics.
//
// Rows: M = N*H*W pixels of C channels, dense channels_last. One pass; with s = bytes of a stored value, it reads
// M*C*s (z) and M*C*s (r, if any), writes M*C*s (out) and M*ceil(C/8) (mask, if wanted). Element by element, hence
// the same bits for any number of threads and, without fused multiply-add, for any instruction set.
#include "isa.h"
#include "parallel.h"
#include "primitives.h"
#include "sum_tensors.h"

namespace resfuse {

template <class T>
struct ApplyKernel {
  Rows<T> z;
  SumArgs<T> sum;
  Moments* moments;  // of this share, or null

  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t size = chunk_size(end - begin, chunk_rows);
    for (int64_t chunk = begin; chunk < end; chunk += size) {
      const int64_t count = std::min(size, end - chunk);
      for (int64_t row = chunk; row < chunk + count; ++row) {
        for (int64_t first = 0; first < sum.channels; first += sum_columns) {
          sum_row(sum, z.row(row) + first, static_cast<const float*>(nullptr), row, first,
                  std::min(sum_columns, sum.channels - first));
        }
      }
      if (moments) moments->add(sum.out + chunk * sum.channels, count, sum.channels);
    }
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> apply(
    const at::Tensor& z, const at::Tensor& scale, const at::Tensor& shift, const OptionalTensor& residual,
    const OptionalTensor& residual_scale, const OptionalTensor& residual_shift, bool residual_relu, int64_t before,
    const OptionalTensor& row_scale, const OptionalTensor& gate, double total_scale, bool relu, bool want_mask,
    bool want_stats) {
  check_view(z, "z");
  const int64_t channels = z.size(1), rows = row_count(z);
  check_vector(scale, "scale", channels);
  check_vector(shift, "shift", channels);
  const SumTensors sum{residual,    residual_scale, residual_shift, residual_relu, before,    row_scale,
                       gate,        total_scale,    relu,           want_mask,     want_stats};
  sum.check(z, channels, false);

  const SumResult result(sum, z, channels);
  const int64_t shares = share_count(rows, channels);
  std::vector<Moments> moments(want_stats ? shares : 0, Moments(channels));
  with_type(z, [&](auto stored) {
    using T = decltype(stored);
    const auto arguments = result.arguments<T>(sum, vector_of(scale), vector_of(shift));
    for_shares(rows, shares, [&](int64_t share, int64_t begin, int64_t end) {
      run_best(ApplyKernel<T>{rows_of<T>(z), arguments, want_stats ? &moments[share] : nullptr}, begin, end);
    });
  });
  return result.with(moments);
}

}  // namespace resfuse
