// finalize: BatchNorm as one affine map, scale = gamma / sqrt(var + eps), shift = beta - mean * scale; and
// update_running: (1 - f) * running + f * batch, f = momentum or 1 / num_batches_tracked. C-length work.
#include <ATen/core/Tensor.h>

#include <cmath>

#include "operands.h"
#include "primitives.h"

namespace resfuse {

std::tuple<at::Tensor, at::Tensor, at::Tensor> finalize(
    const at::Tensor& mean, const at::Tensor& var, const OptionalTensor& gamma, const OptionalTensor& beta,
    double eps) {
  const int64_t channels = mean.numel();
  check_vector(mean, "mean", channels);
  check_vector(var, "var", channels);
  if (gamma) check_vector(*gamma, "gamma", channels);
  if (beta) check_vector(*beta, "beta", channels);
  const at::Tensor scale = uninitialized({channels}, at::kFloat), shift = uninitialized({channels}, at::kFloat);
  const at::Tensor invstd = uninitialized({channels}, at::kFloat);
  const float *m = vector_of(mean), *v = vector_of(var), *g = vector_of(gamma), *b = vector_of(beta);
  float *s = mutable_data_of<float>(scale), *t = mutable_data_of<float>(shift), *i = mutable_data_of<float>(invstd);
  for (int64_t c = 0; c < channels; ++c) {
    i[c] = static_cast<float>(1.0 / std::sqrt(static_cast<double>(v[c]) + eps));
    s[c] = g ? g[c] * i[c] : i[c];
    t[c] = static_cast<float>((b ? b[c] : 0.0) - static_cast<double>(m[c]) * s[c]);
  }
  return {scale, shift, invstd};
}

namespace {

void towards(const at::Tensor& buffer, const float* target, double unbiased, double factor) {
  float* running = mutable_data_of<float>(buffer);
  for (int64_t c = 0; c < buffer.numel(); ++c) {
    running[c] = static_cast<float>(running[c] * (1.0 - factor) + target[c] * unbiased * factor);
  }
  buffer.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

// Buffers float32 [C], the counter int64; any may be absent.
void update_running(
    const at::Tensor& mean, const at::Tensor& var, int64_t count, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& tracked, std::optional<double> momentum) {
  const int64_t channels = mean.numel();
  check_vector(mean, "mean", channels);
  check_vector(var, "var", channels);
  if (running_mean) check_vector(*running_mean, "running_mean", channels);
  if (running_var) check_vector(*running_var, "running_var", channels);
  if (tracked) {
    TORCH_CHECK_TYPE(tracked->scalar_type() == at::kLong, "tracked must be int64, not ", tracked->scalar_type());
    TORCH_CHECK(tracked->numel() == 1, "tracked must be one number, not ", tracked->sizes());
  }
  double factor = momentum.value_or(0.0);  // as in torch, a cumulative average without a counter stands still
  if (tracked) {
    const int64_t steps = ++*tracked->mutable_data_ptr<int64_t>();
    tracked->unsafeGetTensorImpl()->bump_version();
    if (!momentum) factor = 1.0 / static_cast<double>(steps);
  }
  if (running_mean) towards(*running_mean, vector_of(mean), 1.0, factor);
  const double n = static_cast<double>(count);
  if (running_var) towards(*running_var, vector_of(var), n / (n - 1.0), factor);
}

}  // namespace resfuse
