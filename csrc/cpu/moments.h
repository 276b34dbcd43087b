// Mean and biased variance of each channel, exact to float32 whatever the mean.
//
// Of a chunk: sums in float32, then squares about the chunk's own mean; chunks merge in double by Chan's formula
//   m2 += m2' + d^2 n n' / (n + n'),  mean += d n' / (n + n'),  d = mean' - mean
// in a fixed order: chunks in turn within a share, then the shares.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

#include "../common/scalar.h"
#include "../common/storage.h"
#include "tensors.h"

namespace resfuse {

// What one share has seen: [mean, m2] per channel in double, how many rows, and room for a chunk's sums.
class Moments {
 public:
  explicit Moments(int64_t channels) : channels_(channels), total_(2 * channels, 0.0), chunk_(2 * channels) {}

  template <class T>
  RESFUSE_HD void add(const T* rows, int64_t count, int64_t stride) {
    float* __restrict__ mean = chunk_.data();
    float* __restrict__ square = chunk_.data() + channels_;
    for (int64_t c = 0; c < channels_; ++c) mean[c] = square[c] = 0.0f;
    for (int64_t r = 0; r < count; ++r) {
      const T* __restrict__ row = rows + r * stride;
      for (int64_t c = 0; c < channels_; ++c) mean[c] += load(row[c]);
    }
    const float share = 1.0f / static_cast<float>(count);
    for (int64_t c = 0; c < channels_; ++c) mean[c] *= share;
    for (int64_t r = 0; r < count; ++r) {
      const T* __restrict__ row = rows + r * stride;
      for (int64_t c = 0; c < channels_; ++c) {
        const float d = load(row[c]) - mean[c];
        square[c] += d * d;
      }
    }
    merge(mean, square, count);
  }

  void merge(const Moments& other) { merge(other.total_.data(), other.total_.data() + channels_, other.count_); }

  // (mean, var), float32 [C]; NaN where nothing was added.
  std::tuple<at::Tensor, at::Tensor> finish() const {
    at::Tensor mean = uninitialized({channels_}, at::kFloat), var = uninitialized({channels_}, at::kFloat);
    float* m = mean.mutable_data_ptr<float>();
    float* v = var.mutable_data_ptr<float>();
    for (int64_t c = 0; c < channels_; ++c) {
      m[c] = static_cast<float>(count_ ? total_[c] : NAN);
      v[c] = static_cast<float>(total_[channels_ + c] / static_cast<double>(count_));
    }
    return {mean, var};
  }

 private:
  template <class V>
  RESFUSE_HD void merge(const V* mean, const V* square, int64_t count) {
    if (count == 0) return;
    double* __restrict__ own_mean = total_.data();
    double* __restrict__ own_square = total_.data() + channels_;
    const double n = static_cast<double>(count), all = static_cast<double>(count_ + count);
    const double towards = n / all, between = static_cast<double>(count_) * n / all;
    for (int64_t c = 0; c < channels_; ++c) {
      const double d = mean[c] - own_mean[c];
      own_square[c] += square[c] + d * d * between;
      own_mean[c] += d * towards;
    }
    count_ += count;
  }

  int64_t channels_;
  int64_t count_ = 0;
  std::vector<double> total_;
  std::vector<float> chunk_;
};

inline std::tuple<at::Tensor, at::Tensor> merged(const std::vector<Moments>& shares) {
  Moments total = shares.front();
  for (size_t s = 1; s < shares.size(); ++s) total.merge(shares[s]);
  return total.finish();
}

}  // namespace resfuse
