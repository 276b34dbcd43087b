// The scope of one operator: on a GPU, its device and stream; without one, the tensors that the emulator watches.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#ifndef RESFUSE_EMULATED
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif
#include <torch/library.h>

#include "launchers.h"

// What registers the set's operators: a GPU's, or the emulator's.
#ifdef RESFUSE_EMULATED
#define CUDA_OPERATORS(m) TORCH_LIBRARY_IMPL(resfuse_emulated, CPU, m)
extern "C" {
void emu_reset();
void emu_register(void*, uint64_t, const char*, int);
const char* emu_error();
uint64_t emu_unwritten_bytes(const void*);
}
#else
#define CUDA_OPERATORS(m) TORCH_LIBRARY_IMPL(resfuse, CUDA, m)
#endif

namespace resfuse::cuda {

using OptionalTensor = std::optional<at::Tensor>;

class Call {
 public:
#ifdef RESFUSE_EMULATED
  explicit Call(const at::Tensor&) { emu_reset(); }
#else
  explicit Call(const at::Tensor& like) : guard_(like.device()) {}
#endif

  template <class T = void>
  const T* in(const at::Tensor& t, const char* name) {
    watch(t, name, 0);
    return static_cast<const T*>(t.data_ptr());
  }
  template <class T = void>
  const T* in(const OptionalTensor& t, const char* name) {
    return t ? in<T>(*t, name) : nullptr;
  }
  // Every byte of t is written.
  template <class T = void>
  T* out(const at::Tensor& t, const char* name) {
    watch(t, name, 1);
    return static_cast<T*>(t.data_ptr());
  }
  // Not all of t need be written; what is read has been.
  template <class T = void>
  T* part(const at::Tensor& t, const char* name) {
    watch(t, name, 1, false);
    return static_cast<T*>(t.data_ptr());
  }
  template <class T>
  T* inout(const OptionalTensor& t, const char* name) {
    if (!t) return nullptr;
    watch(*t, name, 2);
    return static_cast<T*>(t->data_ptr());
  }

  void* stream() const {
#ifdef RESFUSE_EMULATED
    return nullptr;
#else
    return c10::cuda::getCurrentCUDAStream().stream();
#endif
  }

  void done(int error) {
#ifdef RESFUSE_EMULATED
    const char* const found = emu_error();
    std::string text = found ? found : "";
    for (const auto& [pointer, name] : outputs_) {
      const uint64_t missed = text.empty() ? emu_unwritten_bytes(pointer) : 0;
      if (missed) text = std::to_string(missed) + " bytes of '" + name + "' were never written";
    }
    TORCH_CHECK(error == 0 && text.empty(), "emulated kernel: ", text);
#else
    if (error != 0) cudaGetLastError();  // or the next call that asks for it raises it again
    TORCH_CHECK(error == 0, "a CUDA kernel was not launched: ", cudaGetErrorString(cudaError_t(error)));
#endif
  }

 private:
#ifdef RESFUSE_EMULATED
  std::vector<std::pair<const void*, const char*>> outputs_;

  void watch(const at::Tensor& t, const char* name, int mode, bool all = true) {
    int64_t last = t.numel() == 0 ? -1 : 0;  // a view's memory reaches to its last element
    for (int64_t d = 0; d < t.dim() && last >= 0; ++d) last += (t.size(d) - 1) * t.stride(d);
    emu_register(t.data_ptr(), uint64_t(last + 1) * t.element_size(), name, mode);
    if (mode == 1 && all && last >= 0) outputs_.push_back({t.data_ptr(), name});
  }
#else
  c10::cuda::CUDAGuard guard_;

  void watch(const at::Tensor&, const char*, int, bool = true) {}
#endif
};

inline DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::kFloat;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kHalf;
    default: TORCH_CHECK_TYPE(false, "the CUDA kernels store float32, bfloat16 or float16, not ", t.scalar_type());
  }
}

inline int64_t row_count(const at::Tensor& t) {
  const int64_t rows = t.size(0) * t.size(2) * t.size(3);
  TORCH_CHECK(rows <= 1 << 30, "kernels count up to 2^30 rows, and there are ", rows);
  return rows;
}

inline bool is_dense(const at::Tensor& t) {
  return t.is_contiguous(at::MemoryFormat::ChannelsLast);
}

// Whether eight channels are always one aligned access.
inline bool even(const at::Tensor& t) {
  const auto aligned = [](int64_t bytes) { return bytes % 16 == 0; };
  const int64_t size = t.element_size();
  return t.size(1) % 8 == 0 && aligned(reinterpret_cast<intptr_t>(t.data_ptr())) &&
         (is_dense(t) || (aligned(t.stride(0) * size) && aligned(t.stride(2) * size) && aligned(t.stride(3) * size)));
}

inline void check_rows(const at::Tensor& t, const char* name) {
  TORCH_CHECK(t.dim() == 4 && is_dense(t), name, " must be dense in channels_last, not of sizes ", t.sizes(),
              " and strides ", t.strides());
}

inline void check_beside(const at::Tensor& t, const char* name, const at::Tensor& z, int64_t channels) {
  TORCH_CHECK_TYPE(t.scalar_type() == z.scalar_type(), name, " must have the dtype ", z.scalar_type(), ", not ",
                   t.scalar_type());
  TORCH_CHECK(t.dim() == 4 && t.size(0) == z.size(0) && t.size(1) == channels && t.size(2) == z.size(2) &&
                  t.size(3) == z.size(3) && t.device() == z.device(),
              name, " must have the shape [", z.size(0), ", ", channels, ", ", z.size(2), ", ", z.size(3), "] on ",
              z.device(), ", not ", t.sizes(), " on ", t.device());
}

inline void check_vector(const OptionalTensor& t, const char* name, const at::Tensor& like, int64_t count) {
  if (!t) return;
  TORCH_CHECK_TYPE(t->scalar_type() == at::kFloat, name, " must be float32, not ", t->scalar_type());
  TORCH_CHECK(t->dim() == 1 && t->size(0) == count && t->is_contiguous() && t->device() == like.device(), name,
              " must be contiguous of shape [", count, "] on ", like.device(), ", not ", t->sizes(), " on ", t->device());
}

inline void check_mask(const OptionalTensor& t, const at::Tensor& like, int64_t channels) {
  if (!t) return;
  TORCH_CHECK(t->scalar_type() == at::kByte && t->dim() == 2 && t->size(0) == row_count(like) &&
                  t->size(1) == (channels + 7) / 8 && t->is_contiguous() && t->device() == like.device(),
              "mask must be bytes [", row_count(like), ", ", (channels + 7) / 8, "], not ", t->sizes());
}

inline at::Tensor empty_rows(const at::Tensor& like, int64_t channels) {
  return at::empty({like.size(0), channels, like.size(2), like.size(3)},
                   like.options().memory_format(at::MemoryFormat::ChannelsLast));
}

inline at::Tensor empty_vector(const at::Tensor& like, int64_t count) {
  return at::empty({count}, like.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
}

}  // namespace resfuse::cuda
