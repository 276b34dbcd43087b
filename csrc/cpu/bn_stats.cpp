// bn_stats: mean and biased variance of each channel (moments.h). Reads z once.
#include "isa.h"
#include "moments.h"
#include "operands.h"
#include "parallel.h"
#include "primitives.h"

namespace resfuse {

template <class T>
struct StatsKernel {
  const T* z;
  int64_t channels;
  Moments* moments;

  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t size = chunk_size(end - begin, chunk_rows);
    for (int64_t chunk = begin; chunk < end; chunk += size) {
      moments->add(z + chunk * channels, std::min(size, end - chunk), channels);
    }
  }
};

std::tuple<at::Tensor, at::Tensor> bn_stats(const at::Tensor& z) {
  check_rows(z, "z");
  const int64_t channels = z.size(1), rows = row_count(z), shares = share_count(rows, channels);
  std::vector<Moments> moments(shares, Moments(channels));
  with_type(z, [&](auto stored) {
    using T = decltype(stored);
    for_shares(rows, shares, [&](int64_t share, int64_t begin, int64_t end) {
      run_best(StatsKernel<T>{data_of<T>(z), channels, &moments[share]}, begin, end);
    });
  });
  return merged(moments);
}

}  // namespace resfuse
