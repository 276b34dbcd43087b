// bn_reduce: the two sums of BatchNorm's backward, over all rows of a gradient dy (gradient.h) and z [M, C], and the
// vectors of the recipe that dz is (gradient.h):
//   dbeta = sum(dy)     dgamma = invstd * sum(dy * (z - mean))
//   mean_dy = dbeta / M     slope = dgamma * invstd / M     bn_scale = gamma * invstd
//
// dy is masked by relu(scale * z + shift) where shift is given. Reads M*C*s twice (dy, z). Sums in float32 over a
// chunk, chunks in double, in order.
#include <vector>

#include "gradient_tensors.h"
#include "isa.h"
#include "parallel.h"
#include "primitives.h"

namespace resfuse {

template <class T>
struct ReduceKernel {
  Gradient<T> g;  // without BatchNorm
  const T* z;
  const float* scale;
  const float* shift;
  const float* mean;
  double* sums;  // [2, C] of this share

  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t channels = g.channels, size = chunk_size(end - begin, chunk_rows);
    const Buffer<float> chunk_sums(2 * channels);
    float* __restrict__ plain = chunk_sums;
    float* __restrict__ weighed = chunk_sums + channels;
    for (int64_t chunk = begin; chunk < end; chunk += size) {
      for (int64_t c = 0; c < 2 * channels; ++c) chunk_sums[c] = 0.0f;
      for (int64_t row = chunk; row < std::min(end, chunk + size); ++row) {
        for (int64_t first = 0; first < channels; first += gradient_columns) {
          add_row(row, first, std::min(gradient_columns, channels - first), plain + first, weighed + first);
        }
      }
      for (int64_t c = 0; c < 2 * channels; ++c) sums[c] += chunk_sums[c];
    }
  }

  RESFUSE_HD void add_row(
      int64_t row, int64_t first, int64_t count, float* __restrict__ plain, float* __restrict__ weighed) const {
    T piece[gradient_columns];
    masked_row(g, row, first, count, piece);
    if (shift) {
      add_piece<true>(piece, row, first, count, plain, weighed);
    } else {
      add_piece<false>(piece, row, first, count, plain, weighed);
    }
  }

  template <bool relu>
  RESFUSE_HD void add_piece(
      const T* __restrict__ piece, int64_t row, int64_t first, int64_t count, float* __restrict__ plain,
      float* __restrict__ weighed) const {
    const T* __restrict__ own = z + row * g.channels + first;
    const float* __restrict__ own_scale = scale + first;
    const float* __restrict__ own_shift = shift + first;
    const float* __restrict__ about = mean + first;
    for (int64_t i = 0; i < count; ++i) {
      float dy = load(piece[i]);
      if constexpr (relu) dy = passes_relu(own[i], own_scale[i], own_shift[i]) ? dy : 0.0f;
      plain[i] += dy;
      weighed[i] += dy * (load(own[i]) - about[i]);
    }
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> bn_reduce(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const at::Tensor& z, const OptionalTensor& scale, const OptionalTensor& shift, const at::Tensor& mean,
    const at::Tensor& invstd, const OptionalTensor& gamma) {
  const OptionalTensor none;
  const GradientTensors g{dout, mask, row_scale, factor, none, none, none, none, none, none};
  g.check();
  const int64_t channels = dout.size(1), rows = row_count(dout);
  check_rows_beside(z, "z", dout, channels);
  check_affine(scale, shift, "scale", "shift", channels);
  check_vector(mean, "mean", channels);
  check_vector(invstd, "invstd", channels);
  if (gamma) check_vector(*gamma, "gamma", channels);

  const int64_t shares = share_count(rows, channels);
  std::vector<std::vector<double>> sums(shares, std::vector<double>(2 * channels, 0.0));
  with_type(dout, [&](auto stored) {
    using T = decltype(stored);
    for_shares(rows, shares, [&](int64_t share, int64_t begin, int64_t end) {
      run_best(ReduceKernel<T>{g.arguments<T>(), data_of<T>(z), vector_of(scale), vector_of(shift), vector_of(mean),
                               sums[share].data()},
               begin, end);
    });
  });

  const auto vector = [&] { return uninitialized({channels}, at::kFloat); };
  const at::Tensor dbeta = vector(), dgamma = vector(), mean_dy = vector(), slope = vector(), bn_scale = vector();
  const float *i = data_of<float>(invstd), *given = vector_of(gamma), count = static_cast<float>(rows);
  for (int64_t c = 0; c < channels; ++c) {
    double plain = 0.0, weighed = 0.0;
    for (const auto& share : sums) {
      plain += share[c];
      weighed += share[channels + c];
    }
    const float total = static_cast<float>(plain), own = static_cast<float>(i[c] * weighed);
    mutable_data_of<float>(dbeta)[c] = total;
    mutable_data_of<float>(dgamma)[c] = own;
    mutable_data_of<float>(mean_dy)[c] = total / count;
    mutable_data_of<float>(slope)[c] = own * i[c] / count;
    mutable_data_of<float>(bn_scale)[c] = given ? given[c] * i[c] : i[c];
  }
  return {dbeta, dgamma, mean_dy, slope, bn_scale};
}

}  // namespace resfuse
