// From tensors, already checked, to what the kernels read.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <type_traits>

#include "checks.h"
#include "rows.h"
#include "tensors.h"

namespace resfuse {

using OptionalTensor = std::optional<at::Tensor>;

template <class T>
using Scalar = std::conditional_t<std::is_same_v<T, float>, float, at::BFloat16>;

template <class T>
const T* data_of(const at::Tensor& t) {
  return reinterpret_cast<const T*>(t.const_data_ptr<Scalar<T>>());
}

template <class T>
T* mutable_data_of(const at::Tensor& t) {
  return reinterpret_cast<T*>(t.mutable_data_ptr<Scalar<T>>());
}

inline const float* vector_of(const std::optional<at::Tensor>& t) {
  return t ? t->const_data_ptr<float>() : nullptr;
}

inline const uint8_t* mask_of(const std::optional<at::Tensor>& t) {
  return t ? t->const_data_ptr<uint8_t>() : nullptr;
}

template <class T>
Rows<T> rows_of(const at::Tensor& t) {
  return {data_of<T>(t), t.size(1), t.size(2), t.size(3), t.stride(0), t.stride(2), t.stride(3), is_dense(t)};
}

template <class T>
Rows<T> rows_of(const std::optional<at::Tensor>& t) {
  return t ? rows_of<T>(*t) : Rows<T>{};
}

template <class T>
Activation<T> activation_of(
    const at::Tensor& z, const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift, bool relu) {
  return {rows_of<T>(z), vector_of(scale), vector_of(shift), lower_bound(relu)};
}

// Uninitialised [N, channels, H, W] with like's N, H, W and dtype, dense in channels_last.
inline at::Tensor empty_rows(const at::Tensor& like, int64_t channels) {
  return uninitialized({like.size(0), channels, like.size(2), like.size(3)}, like.options(),
                       at::MemoryFormat::ChannelsLast);
}

// work(stored type, element type of products) for a tensor's dtype: bfloat16 is multiplied as it is where the processor
// can, and widened in cache elsewhere.
template <class Work>
auto with_types(const at::Tensor& t, const Work& work) {
  if (t.scalar_type() == at::kFloat) return work(float{}, float{});
  if (multiplies_bfloat16()) return work(bfloat16{}, bfloat16{});
  return work(bfloat16{}, float{});
}

// work(stored type), for kernels without products.
template <class Work>
auto with_type(const at::Tensor& t, const Work& work) {
  return t.scalar_type() == at::kFloat ? work(float{}) : work(bfloat16{});
}

}  // namespace resfuse
