// Instructions that CUDA C++ has no function for; all inline PTX is here and in hopper_ptx.h. Compiled by nvcc each
// function is one instruction; compiled by a host compiler it calls the emulator (csrc/emu).
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#define DEVICE_FN static __device__ __forceinline__
#define SHARED_ARRAY(T, name, count) __shared__ __align__(16) T name[count]
#define SHARED_DYNAMIC(T, name)                                    \
  extern __shared__ __align__(1024) unsigned char dynamic_smem_[]; \
  T* const name = reinterpret_cast<T*>(dynamic_smem_)
#else
#include "cuda_emu.h"

#define DEVICE_FN static inline
#endif

DEVICE_FN uint32_t smem_address(const void* p) {
#ifdef __CUDACC__
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#else
  return emu::smem_address(p);
#endif
}

// .x is the low half: the element at the lower address.
DEVICE_FN float2 unpack_bf16x2(uint32_t v) {
  return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
}

DEVICE_FN uint32_t pack_bf16x2(float low, float high) {
#ifdef __CUDACC__
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
#else
  return __float2bfloat16_rn(low).bits | uint32_t(__float2bfloat16_rn(high).bits) << 16;
#endif
}

DEVICE_FN float2 unpack_f16x2(uint32_t v) {
  __half2 h;
  memcpy(&h, &v, sizeof h);
  return __half22float2(h);
}

DEVICE_FN uint32_t pack_f16x2(float low, float high) {
  const __half2 h = __floats2half2_rn(low, high);
  uint32_t v;
  memcpy(&v, &h, sizeof v);
  return v;
}

DEVICE_FN uint32_t round_tf32(float f) {
#ifdef __CUDACC__
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(f));
  return r;
#else
  return f != f ? 0x7fffffffu : (__float_as_uint(f) + 0x1000u) & ~0x1fffu;
#endif
}

// max(v, bound) that keeps NaN, and of the two zeros takes +0: resfuse::clamp_below as one instruction.
DEVICE_FN float at_least(float v, float bound) {
#ifdef __CUDACC__
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(v), "f"(bound));
  return r;
#else
  return v <= bound ? bound : v;
#endif
}

// ldmatrix: 8x8 matrices of 16-bit elements, lane l supplies row l%8 of matrix l/8.
#ifdef __CUDACC__
#define LDMATRIX(suffix, trans_)                                                                     \
  DEVICE_FN void ldmatrix_x1##suffix(uint32_t (&r)[1], uint32_t a) {                                 \
    asm volatile("ldmatrix.sync.aligned.m8n8.x1" trans_ ".shared.b16 {%0}, [%1];"                    \
                 : "=r"(r[0]) : "r"(a) : "memory");                                                  \
  }                                                                                                  \
  DEVICE_FN void ldmatrix_x2##suffix(uint32_t (&r)[2], uint32_t a) {                                 \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" trans_ ".shared.b16 {%0,%1}, [%2];"                 \
                 : "=r"(r[0]), "=r"(r[1]) : "r"(a) : "memory");                                      \
  }                                                                                                  \
  DEVICE_FN void ldmatrix_x4##suffix(uint32_t (&r)[4], uint32_t a) {                                 \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" trans_ ".shared.b16 {%0,%1,%2,%3}, [%4];"           \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory");              \
  }
LDMATRIX(, "")
LDMATRIX(_trans, ".trans")
#else
#define LDMATRIX(suffix, trans_)                                                                     \
  DEVICE_FN void ldmatrix_x1##suffix(uint32_t (&r)[1], uint32_t a) { emu::ldmatrix(r, 1, trans_, a); } \
  DEVICE_FN void ldmatrix_x2##suffix(uint32_t (&r)[2], uint32_t a) { emu::ldmatrix(r, 2, trans_, a); } \
  DEVICE_FN void ldmatrix_x4##suffix(uint32_t (&r)[4], uint32_t a) { emu::ldmatrix(r, 4, trans_, a); }
LDMATRIX(, false)
LDMATRIX(_trans, true)
#endif
#undef LDMATRIX

// mma.sync: d += a * b, float32 sums.
#ifdef __CUDACC__
#define MMA_16816(name, type)                                                                        \
  DEVICE_FN void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {               \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                      \
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                             \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                \
  }
MMA_16816(mma_m16n8k16_bf16, "bf16")
MMA_16816(mma_m16n8k16_f16, "f16")
#undef MMA_16816
DEVICE_FN void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#else
DEVICE_FN void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emu::mma(emu::MmaType::bf16, d, a, b, d);
}

DEVICE_FN void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emu::mma(emu::MmaType::f16, d, a, b, d);
}

DEVICE_FN void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emu::mma(emu::MmaType::tf32, d, a, b, d);
}
#endif

// cp.async: copies 16 bytes, or writes 16 zeros when !valid (src must still be a mapped address on a GPU).
DEVICE_FN void cp_async_16(uint32_t dst, const void* src, bool valid = true) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(dst), "l"(__cvta_generic_to_global(src)), "r"(valid ? 16 : 0) : "memory");
#else
  emu::cp_async(dst, src, 16, valid ? 16 : 0);
#endif
}

DEVICE_FN void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emu::cp_async_commit();
#endif
}

template <int kGroupsLeft>
DEVICE_FN void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" :: "n"(kGroupsLeft) : "memory");
#else
  emu::cp_async_wait(kGroupsLeft);
#endif
}

// Named barriers: id 1..15, `threads` a multiple of 32.
DEVICE_FN void named_barrier_sync(int id, int threads) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emu::block_barrier(id, threads);
#endif
}

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t stream, A... args) {
  // Needed as soon as these bytes and the kernel's SHARED_ARRAYs, whose size is not known here, pass 48 KB together.
  if (smem_bytes > 0) {
    const cudaError_t e = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                               cudaFuncAttributeMaxDynamicSharedMemorySize, int(smem_bytes));
    if (e != cudaSuccess) return e;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
}
