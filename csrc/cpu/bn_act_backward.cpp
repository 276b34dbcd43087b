// bn_act_backward: BatchNorm's backward of d = dy * act'(scale * z + shift), which is nowhere written.
//   dbeta = sum(d)     dgamma = invstd * sum(d * (z - mean))
//   dz = scale * (d - dbeta / M - (z - mean) * invstd * dgamma / M)     or, of constant statistics, scale * d
//
// Reads M*C*s four times (dy, z, for the sums and for dz), writes M*C*s. Sums in float32 over a chunk, chunks in double,
// in order.
#include <vector>

#include "act.h"
#include "isa.h"
#include "operands.h"
#include "parallel.h"
#include "primitives.h"

namespace resfuse {

template <class T>
struct ActGradient {
  const T* dy;  // [M, C]
  const T* z;
  const float* scale;
  const float* shift;
  const float* mean;
  float slope;
  int64_t channels;
};

// A row's loops are functions of their own: compilers believe what they are told of a function's pointers.
template <class T, Act act>
RESFUSE_HD void add_act_sums(
    const T* __restrict__ dy, const T* __restrict__ z, const float* __restrict__ scale,
    const float* __restrict__ shift, const float* __restrict__ mean, float slope, int64_t channels,
    float* __restrict__ plain, float* __restrict__ weighed) {
  for (int64_t c = 0; c < channels; ++c) {
    const float v = load(z[c]);
    const float d = load(dy[c]) * act_slope<act>(affine(v, scale[c], shift[c]), slope);
    plain[c] += d;
    weighed[c] += d * (v - mean[c]);
  }
}

template <class T, Act act, bool batch>
RESFUSE_HD void act_gradient_row(
    const T* __restrict__ dy, const T* __restrict__ z, const float* __restrict__ scale,
    const float* __restrict__ shift, const float* __restrict__ mean, const float* __restrict__ mean_dy,
    const float* __restrict__ along, float slope, int64_t channels, T* __restrict__ dz) {
  for (int64_t c = 0; c < channels; ++c) {
    const float v = load(z[c]);
    float d = load(dy[c]) * act_slope<act>(affine(v, scale[c], shift[c]), slope);
    if constexpr (batch) d = d - mean_dy[c] - (v - mean[c]) * along[c];
    dz[c] = store<T>(scale[c] * d);
  }
}

template <class T, Act act>
struct ActSumsKernel {
  ActGradient<T> g;
  double* sums;  // [2, C] of this share

  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t channels = g.channels, size = chunk_size(end - begin, chunk_rows);
    const Buffer<float> own(2 * channels);
    for (int64_t chunk = begin; chunk < end; chunk += size) {
      for (int64_t c = 0; c < 2 * channels; ++c) own[c] = 0.0f;
      for (int64_t row = chunk; row < std::min(end, chunk + size); ++row) {
        add_act_sums<T, act>(g.dy + row * channels, g.z + row * channels, g.scale, g.shift, g.mean, g.slope, channels,
                             own, own + channels);
      }
      for (int64_t c = 0; c < 2 * channels; ++c) sums[c] += own[c];
    }
  }
};

template <class T, Act act>
struct ActGradientKernel {
  ActGradient<T> g;
  const float* mean_dy;  // null: constant statistics
  const float* along;
  T* dz;

  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      mean_dy ? make_row<true>(row * g.channels) : make_row<false>(row * g.channels);
    }
  }

  template <bool batch>
  RESFUSE_HD void make_row(int64_t at) const {
    act_gradient_row<T, act, batch>(g.dy + at, g.z + at, g.scale, g.shift, g.mean, mean_dy, along, g.slope, g.channels,
                                    dz + at);
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> bn_act_backward(
    const at::Tensor& dy, const at::Tensor& z, const at::Tensor& scale, const at::Tensor& shift, int64_t act,
    double slope, const at::Tensor& mean, const at::Tensor& invstd, bool batch) {
  check_rows(z, "z");
  const int64_t channels = z.size(1), rows = row_count(z);
  check_rows_beside(dy, "dy", z, channels);
  check_vector(scale, "scale", channels);
  check_vector(shift, "shift", channels);
  check_vector(mean, "mean", channels);
  check_vector(invstd, "invstd", channels);
  check_act(act, Act::leaky_relu);

  const at::Tensor dz = empty_rows(z, channels);
  const at::Tensor dgamma = uninitialized({channels}, at::kFloat), dbeta = uninitialized({channels}, at::kFloat);
  const int64_t shares = share_count(rows, channels);
  std::vector<std::vector<double>> sums(shares, std::vector<double>(2 * channels, 0.0));
  with_type(z, [&](auto stored) {
    using T = decltype(stored);
    with_act(act, [&](auto tag) {
      const ActGradient<T> g{data_of<T>(dy),       data_of<T>(z),       data_of<float>(scale),     data_of<float>(shift),
                             data_of<float>(mean), static_cast<float>(slope), channels};
      for_shares(rows, shares, [&](int64_t share, int64_t begin, int64_t end) {
        run_best(ActSumsKernel<T, tag()>{g, sums[share].data()}, begin, end);
      });
      std::vector<float> mean_dy(channels), along(channels);
      const float* i = data_of<float>(invstd);
      for (int64_t c = 0; c < channels; ++c) {
        double plain = 0.0, weighed = 0.0;
        for (const auto& share : sums) {
          plain += share[c];
          weighed += share[channels + c];
        }
        const float own = static_cast<float>(i[c] * weighed);
        mutable_data_of<float>(dbeta)[c] = static_cast<float>(plain);
        mutable_data_of<float>(dgamma)[c] = own;
        mean_dy[c] = static_cast<float>(plain) / static_cast<float>(rows);
        along[c] = own * i[c] / static_cast<float>(rows);
      }
      const ActGradientKernel<T, tag()> kernel{
          g, batch ? mean_dy.data() : nullptr, batch ? along.data() : nullptr, mutable_data_of<T>(dz)};
      for_shares(rows, shares, [&](int64_t, int64_t begin, int64_t end) { run_best(kernel, begin, end); });
    });
  });
  return {dz, dgamma, dbeta};
}

}  // namespace resfuse
