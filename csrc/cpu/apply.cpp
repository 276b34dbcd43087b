// apply: out = act(scale * z + shift + residual), rounded once to storage, and its mask.
//
//   residual = nothing | r | act_r(scale_r * r + shift_r)          act, act_r = ReLU or identity
//   mask bit = not (out <= 0), of the stored value: channel 8i+j is bit j of byte i, padding bits 0
//
// Rows: M = N*H*W pixels of C channels, dense channels_last. One pass; with s = bytes of a stored value, it reads
// M*C*s (z) and M*C*s (r, if any), writes M*C*s (out) and M*ceil(C/8) (mask, if wanted). Element by element, hence
// the same bits for any number of threads; see common/scalar.h for any instruction set.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../common/multiversion.h"
#include "../common/scalar.h"
#include "../common/storage.h"
#include "checks.h"
#include "mask.h"

namespace resfuse {

enum class Residual { none, tensor, norm };

template <class T>
struct ApplyArgs {
  const T* z;                   // [M, C]
  const float* scale;           // [C]
  const float* shift;           // [C]
  const T* residual;            // [M, C] or null
  const float* residual_scale;  // [C] or null
  const float* residual_shift;  // [C] or null
  T* out;                       // [M, C]
  uint8_t* mask;                // [M, ceil(C/8)] or null
  int64_t channels;
  float bound;
  float residual_bound;
};

template <class T, Residual kind, bool want_mask>
RESFUSE_HD void apply_rows(const ApplyArgs<T>& a, int64_t begin, int64_t end) {
  constexpr int64_t tile = 512;
  uint8_t bits[tile];
  const int64_t mask_bytes = mask_row_bytes(a.channels);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t first = 0; first < a.channels; first += tile) {
      const int64_t count = std::min(tile, a.channels - first);
      const T* __restrict__ z = a.z + row * a.channels + first;
      const T* __restrict__ r = a.residual + (kind == Residual::none ? 0 : row * a.channels + first);
      const float* __restrict__ scale = a.scale + first;
      const float* __restrict__ shift = a.shift + first;
      const float* __restrict__ r_scale = a.residual_scale + (kind == Residual::norm ? first : 0);
      const float* __restrict__ r_shift = a.residual_shift + (kind == Residual::norm ? first : 0);
      T* __restrict__ out = a.out + row * a.channels + first;
      for (int64_t i = 0; i < count; ++i) {
        float v = affine(load(z[i]), scale[i], shift[i]);
        if constexpr (kind == Residual::tensor) v += load(r[i]);
        if constexpr (kind == Residual::norm) {
          v += clamp_below(affine(load(r[i]), r_scale[i], r_shift[i]), a.residual_bound);
        }
        const T stored = store<T>(clamp_below(v, a.bound));
        out[i] = stored;
        if constexpr (want_mask) bits[i] = passes_gradient(load(stored));
      }
      if constexpr (want_mask) pack_bits(bits, count, a.mask + row * mask_bytes + first / 8);
    }
  }
}

template <class T>
RESFUSE_HD void apply_dispatch(const ApplyArgs<T>& a, int64_t begin, int64_t end) {
  if (a.residual == nullptr) {
    a.mask ? apply_rows<T, Residual::none, true>(a, begin, end) : apply_rows<T, Residual::none, false>(a, begin, end);
  } else if (a.residual_scale == nullptr) {
    a.mask ? apply_rows<T, Residual::tensor, true>(a, begin, end)
           : apply_rows<T, Residual::tensor, false>(a, begin, end);
  } else {
    a.mask ? apply_rows<T, Residual::norm, true>(a, begin, end) : apply_rows<T, Residual::norm, false>(a, begin, end);
  }
}

RESFUSE_MULTIVERSION void apply_range(const ApplyArgs<float>& a, int64_t begin, int64_t end) {
  apply_dispatch(a, begin, end);
}

RESFUSE_MULTIVERSION void apply_range(const ApplyArgs<bfloat16>& a, int64_t begin, int64_t end) {
  apply_dispatch(a, begin, end);
}

template <class T, class Scalar>
const T* rows_of(const std::optional<at::Tensor>& t) {
  return t ? reinterpret_cast<const T*>(t->const_data_ptr<Scalar>()) : nullptr;
}

const float* vector_of(const std::optional<at::Tensor>& t) {
  return t ? t->const_data_ptr<float>() : nullptr;
}

template <class T>
void run(const ApplyArgs<T>& a, int64_t rows) {
  constexpr int64_t least_elements = 32768;  // fewer do not repay a thread's start
  const int64_t grain = std::max<int64_t>(1, least_elements / std::max<int64_t>(a.channels, 1));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { apply_range(a, begin, end); });
}

std::tuple<at::Tensor, at::Tensor> apply(
    const at::Tensor& z, const at::Tensor& scale, const at::Tensor& shift, const std::optional<at::Tensor>& residual,
    const std::optional<at::Tensor>& residual_scale, const std::optional<at::Tensor>& residual_shift,
    bool residual_relu, bool relu, bool want_mask) {
  check_rows(z, "z");
  check_channel_vector(scale, "scale", z);
  check_channel_vector(shift, "shift", z);
  TORCH_CHECK(residual_scale.has_value() == residual_shift.has_value(),
              "residual_scale and residual_shift must be given together");
  TORCH_CHECK(residual.has_value() || !residual_scale.has_value(),
              "residual_scale and residual_shift need residual");
  if (residual) check_rows_like(*residual, "residual", z);
  if (residual_scale) {
    check_channel_vector(*residual_scale, "residual_scale", z);
    check_channel_vector(*residual_shift, "residual_shift", z);
  }

  const int64_t channels = z.size(1);
  at::Tensor out = at::empty(z.sizes(), z.options(), at::MemoryFormat::ChannelsLast);
  const int64_t rows = z.size(0) * z.size(2) * z.size(3);
  at::Tensor mask = want_mask ? at::empty({rows, mask_row_bytes(channels)}, z.options().dtype(at::kByte))
                              : at::empty({0}, z.options().dtype(at::kByte));
  const auto arguments = [&](auto stored, auto scalar) {
    using T = decltype(stored);
    using Scalar = decltype(scalar);
    return ApplyArgs<T>{
        rows_of<T, Scalar>(z), vector_of(scale), vector_of(shift),
        rows_of<T, Scalar>(residual), vector_of(residual_scale), vector_of(residual_shift),
        reinterpret_cast<T*>(out.mutable_data_ptr<Scalar>()), want_mask ? mask.mutable_data_ptr<uint8_t>() : nullptr,
        channels, lower_bound(relu), lower_bound(residual_relu)};
  };
  if (z.scalar_type() == at::kFloat) {
    run(arguments(float{}, float{}), rows);
  } else {
    run(arguments(bfloat16{}, at::BFloat16{}), rows);
  }
  return {out, mask};
}

TORCH_LIBRARY_IMPL(resfuse, CPU, m) {
  m.impl("apply", &apply);
}

}  // namespace resfuse
