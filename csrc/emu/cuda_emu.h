// CUDA C++ on the host, for tests: g++ compiles a kernel's source unchanged against this and runs it, one fiber per
// CUDA thread, with every memory access checked (memory.cpp). Needs no CUDA toolkit; never goes with CUDA's headers.
//
// Not seen: coalescing, ordinary bank conflicts, occupancy, registers, clusters, spin-waits between blocks, and calls
// of memcpy or memset that are not expanded in place. A matrix product rounds once, from double.
#pragma once
#ifdef __CUDACC__
#error "cuda_emu.h is for host compilers; nvcc builds use the CUDA headers"
#endif

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__  // empty: libstdc++ spells __attribute__((__noinline__))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
// A bare __shared__ would go unchecked: function statics of templates have no section of their own to watch. ptx.h
// has the same macros for nvcc.
#define __shared__ _Pragma("GCC error \"use SHARED_ARRAY or SHARED_DYNAMIC instead of __shared__\"")
#define SHARED_ARRAY(T, name, count)                                    \
  T* const name = static_cast<T*>([] {                                  \
    static char key;                                                    \
    return ::emu::shared_static(&key, sizeof(T) * (count), alignof(T)); \
  }())
#define SHARED_DYNAMIC(T, name) T* const name = static_cast<T*>(::emu::shared_dynamic())

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
#define EMU_VECTOR(S, T)                                     \
  struct alignas(2 * sizeof(S)) T##2 {                       \
    S x, y;                                                  \
  };                                                         \
  struct alignas(4 * sizeof(S)) T##4 {                       \
    S x, y, z, w;                                            \
  };                                                         \
  inline T##2 make_##T##2(S x, S y) { return {x, y}; }       \
  inline T##4 make_##T##4(S x, S y, S z, S w) { return {x, y, z, w}; }
EMU_VECTOR(float, float)
EMU_VECTOR(int, int)
EMU_VECTOR(unsigned, uint)
EMU_VECTOR(unsigned char, uchar)
#undef EMU_VECTOR

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// Each library has its own runtime. Types stay visible, or functions of them would be hidden too.
#pragma GCC visibility push(hidden)

extern uint3 threadIdx, blockIdx;  // rewritten at every fiber switch
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// The runtime.
namespace emu {

enum class Collective { syncwarp, shuffle, vote, reduce, ldmatrix, mma };
// Executed once, by the last lane to arrive; lane_args[l] is what lane l passed in.
using CollectiveFn = void (*)(void* const* lane_args, uint32_t mask);

void* shared_static(const void* key, size_t bytes, size_t align);
void* shared_dynamic();
void block_barrier(int id, int thread_count);  // thread_count 0: the whole block
void warp_collective(Collective kind, uint32_t mask, void* lane_arg, CollectiveFn fn);
void check_atomic(void* p, size_t bytes);
void fence_gpu();
unsigned lane_id();
[[noreturn]] void fail(const char* kind, const char* message);
void ask_for_shared(const void* kernel, int dynamic_bytes);
int run_grid(const void* kernel, const cudaLaunchConfig_t& config, void (*enter)(void*), void* params,
             size_t params_bytes);

template <class T>
uint64_t to_bits(T v) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "shuffle type");
  uint64_t b = 0;
  std::memcpy(&b, &v, sizeof(T));
  return b;
}

template <class T>
T from_bits(uint64_t b) {
  T v;
  std::memcpy(&v, &b, sizeof(T));
  return v;
}

struct ShflArg {
  uint64_t value, result;
  int src;
};
inline void shfl_fn(void* const* args, uint32_t mask) {
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    auto* me = static_cast<ShflArg*>(args[l]);
    if (!(mask >> me->src & 1)) fail("warp", "shuffle reads a lane that is not in the mask");
    me->result = static_cast<ShflArg*>(args[me->src])->value;
  }
}

template <class T>
T shfl(uint32_t mask, T v, int src) {
  ShflArg a{to_bits(v), 0, src};
  warp_collective(Collective::shuffle, mask, &a, shfl_fn);
  return from_bits<T>(a.result);
}

inline void vote_fn(void* const* args, uint32_t mask) {
  uint32_t r = 0;
  for (int l = 0; l < 32; ++l) {
    if ((mask >> l & 1) && *static_cast<uint32_t*>(args[l])) r |= 1u << l;
  }
  for (int l = 0; l < 32; ++l) {
    if (mask >> l & 1) *static_cast<uint32_t*>(args[l]) = r;
  }
}

template <class T, class F>
void reduce_fn(void* const* args, uint32_t mask) {
  T r{};
  bool first = true;
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    T v = *static_cast<T*>(args[l]);
    r = first ? v : F::apply(r, v);
    first = false;
  }
  for (int l = 0; l < 32; ++l) {
    if (mask >> l & 1) *static_cast<T*>(args[l]) = r;
  }
}

template <class T, class F>
T reduce(uint32_t mask, T v) {
  warp_collective(Collective::reduce, mask, &v, reduce_fn<T, F>);
  return v;
}

struct Add {
  template <class T>
  static T apply(T a, T b) { return T(std::make_unsigned_t<T>(a) + std::make_unsigned_t<T>(b)); }
};

#define EMU_OPERATION(name, expression)                  \
  struct name {                                          \
    template <class T>                                   \
    static T apply(T a, T b) { return expression; }      \
  };
EMU_OPERATION(Max, a > b ? a : b)
EMU_OPERATION(Min, a < b ? a : b)
EMU_OPERATION(And, a & b)
EMU_OPERATION(Or, a | b)
EMU_OPERATION(Xor, a ^ b)
#undef EMU_OPERATION

template <class T, class F>
__attribute__((no_sanitize_thread)) T atomic_rmw(T* p, F f) {
  check_atomic(p, sizeof(T));  // fibers share one OS thread: a plain update is atomic
  T old = *p;
  *p = f(old);
  return old;
}

}  // namespace emu
#pragma GCC visibility pop

// Synchronisation and warp collectives.
inline void __syncthreads() { emu::block_barrier(0, 0); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  emu::warp_collective(emu::Collective::syncwarp, mask, nullptr, [](void* const*, uint32_t) {});
}

template <class T>
T __shfl_sync(uint32_t mask, T v, int src, int width = 32) {
  return emu::shfl(mask, v, int(emu::lane_id() & ~(width - 1)) | (src & (width - 1)));
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T v, int x, int width = 32) {
  const int me = emu::lane_id(), src = me ^ x;
  return emu::shfl(mask, v, (src & ~(width - 1)) > (me & ~(width - 1)) ? me : src);
}

template <class T>
T __shfl_down_sync(uint32_t mask, T v, unsigned d, int width = 32) {
  const int me = emu::lane_id();
  return emu::shfl(mask, v, (me & (width - 1)) + int(d) >= width ? me : me + int(d));
}

template <class T>
T __shfl_up_sync(uint32_t mask, T v, unsigned d, int width = 32) {
  const int me = emu::lane_id();
  return emu::shfl(mask, v, (me & (width - 1)) < int(d) ? me : me - int(d));
}

inline uint32_t __ballot_sync(uint32_t mask, int pred) {
  uint32_t v = pred != 0;
  emu::warp_collective(emu::Collective::vote, mask, &v, emu::vote_fn);
  return v;
}

inline int __any_sync(uint32_t mask, int pred) { return __ballot_sync(mask, pred) != 0; }
inline int __all_sync(uint32_t mask, int pred) { return __ballot_sync(mask, !pred) == 0; }

#define EMU_REDUCE(name, T, Operation) \
  inline T __reduce_##name##_sync(uint32_t mask, T v) { return emu::reduce<T, emu::Operation>(mask, v); }
EMU_REDUCE(add, unsigned, Add)
EMU_REDUCE(add, int, Add)
EMU_REDUCE(max, unsigned, Max)
EMU_REDUCE(max, int, Max)
EMU_REDUCE(min, unsigned, Min)
EMU_REDUCE(min, int, Min)
EMU_REDUCE(or, unsigned, Or)
EMU_REDUCE(and, unsigned, And)
EMU_REDUCE(xor, unsigned, Xor)
#undef EMU_REDUCE

inline void __threadfence() { emu::fence_gpu(); }
inline void __threadfence_block() {}

#define EMU_ATOMIC(name, expression)                              \
  template <class T>                                              \
  T name(T* p, std::common_type_t<T> v) {                         \
    return emu::atomic_rmw(p, [=](T o) { return T(expression); }); \
  }
EMU_ATOMIC(atomicAdd, o + v)
EMU_ATOMIC(atomicMax, o > v ? o : v)
EMU_ATOMIC(atomicMin, o < v ? o : v)
EMU_ATOMIC(atomicOr, o | v)
EMU_ATOMIC(atomicAnd, o & v)
EMU_ATOMIC(atomicExch, v)
#undef EMU_ATOMIC

template <class T>
T atomicCAS(T* p, std::common_type_t<T> c, std::common_type_t<T> v) {
  return emu::atomic_rmw(p, [=](T o) { return o == c ? v : o; });
}

// Loads, stores and scalar functions.
template <class T>
T __ldg(const T* p) { return *p; }
template <class T>
T __ldcs(const T* p) { return *p; }
template <class T>
T __ldcg(const T* p) { return *p; }
template <class T>
void __stcs(T* p, T v) { *p = v; }
template <class T>
void __stcg(T* p, T v) { *p = v; }
template <class T>
T min(T a, T b) { return b < a ? b : a; }
template <class T>
T max(T a, T b) { return a < b ? b : a; }
using std::fmaf;
using std::fmaxf;
using std::fminf;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __float_as_uint(float f) { return emu::from_bits<unsigned>(emu::to_bits(f)); }
inline float __uint_as_float(unsigned u) { return emu::from_bits<float>(u); }
inline int __float_as_int(float f) { return emu::from_bits<int>(emu::to_bits(f)); }
inline float __int_as_float(int i) { return emu::from_bits<float>(unsigned(i)); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline int __ffs(int v) { return __builtin_ffs(v); }

// 16-bit floats: own types, because CUDA's headers need the toolkit and hide device functions from host compilers.
// The tests compare them with torch bit for bit.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};
inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  const uint32_t u = __float_as_uint(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {uint16_t((uint64_t(u) + 0x7fffu + (u >> 16 & 1)) >> 16)};
}

inline float __half2float(__half h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000u) << 16, exp = h.bits >> 10 & 31, man = h.bits & 1023;
  if (exp == 31) return __uint_as_float(sign | 0x7f800000u | man << 13);
  if (exp == 0) {
    const float v = float(man) * 0x1p-24f;
    return sign ? -v : v;
  }
  return __uint_as_float(sign | (exp + 112) << 23 | man << 13);
}

inline __half __float2half_rn(float f) {
  const uint32_t u = __float_as_uint(f), sign = u >> 16 & 0x8000u, mag = u & 0x7fffffffu;
  if (mag > 0x7f800000u) return {0x7fff};
  if (mag >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to infinity
  if (mag < 0x38800000u) {                                    // subnormal half: unit is 2^-24
    return {uint16_t(sign | uint32_t(std::nearbyintf(__uint_as_float(mag) * 0x1p24f)))};
  }
  return {uint16_t(sign | ((mag - 0x38000000u + 0xfffu + (mag >> 13 & 1)) >> 13))};
}

inline __nv_bfloat16 __float2bfloat16(float f) { return __float2bfloat16_rn(f); }
inline __half __float2half(float f) { return __float2half_rn(f); }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}

inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }

namespace emu {

// What a 128B-swizzled 2-D CUtensorMap of 2-byte elements says.
struct TensorMap2d {
  const char* base;
  int width, height, row_bytes, box_height;  // box width: 64 elements
};

// What ptx.h and hopper_ptx.h call in place of instructions.
#pragma GCC visibility push(hidden)

uint32_t smem_address(const void* p);
void ldmatrix(uint32_t* regs, int count, bool transpose, uint32_t row_address);
enum class MmaType { bf16, f16, tf32 };
void mma(MmaType type, float* d, const uint32_t* a, const uint32_t* b, const float* c);
void cp_async(uint32_t dst, const void* src, int bytes, int src_bytes);
void cp_async_commit();
void cp_async_wait(int groups_left);

void mbarrier_init(uint32_t bar, int arrivals);
void mbarrier_arrive(uint32_t bar, int expect_tx_bytes);
void mbarrier_wait(uint32_t bar, unsigned parity);
void fence_proxy_async();
void tma_load_2d(uint32_t dst, const TensorMap2d* map, int x, int y, uint32_t bar);
void wgmma_fence();
void wgmma(int n, float* d, const uint32_t* a_regs, uint64_t a_desc, uint64_t b_desc, bool a_transposed,
           bool b_transposed, bool accumulate);
void wgmma_commit();
void wgmma_wait(int groups_left);

#pragma GCC visibility pop

}  // namespace emu

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  emu::ask_for_shared(kernel, value);
  return cudaSuccess;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A... args) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<std::remove_cv_t<P>...> params;
    static void enter(void* self) {
      auto* call = static_cast<Call*>(self);
      std::apply(call->kernel, call->params);
    }
  } call{kernel, {static_cast<P>(args)...}};
  const auto id = reinterpret_cast<const void*>(kernel);
  const int failed = emu::run_grid(id, *config, &Call::enter, &call, sizeof call);
  return failed ? cudaErrorLaunchFailure : cudaSuccess;
}
