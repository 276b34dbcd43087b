// mbarrier, TMA and wgmma (sm_90a), in the manner of ptx.h.
#pragma once
#include "ptx.h"

// Where these instructions can be compiled; the host's side of nvcc does not look into device code.
#if !defined(__CUDACC__) || !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_WGMMA
#endif

#ifdef __CUDACC__
#include <cuda.h>

using TensorMap = CUtensorMap;
#else
using TensorMap = emu::TensorMap2d;
#endif

// Row-major bf16 matrix, boxes of box_height rows x 64 columns, 128-byte swizzle.
inline bool make_tensor_map(TensorMap* map, const void* base, int width, int height, int box_height) {
#ifdef __CUDACC__
  const char* const name = "cuTensorMapEncodeTiled";
  void* encode = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &encode, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return false;
  const cuuint64_t dims[2] = {cuuint64_t(width), cuuint64_t(height)}, strides[1] = {cuuint64_t(width) * 2};
  const cuuint32_t box[2] = {64, cuuint32_t(box_height)}, steps[2] = {1, 1};
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
             map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(base), dims, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
#else
  *map = {static_cast<const char*>(base), width, height, width * 2, box_height};
  return true;
#endif
}

// 128-byte-swizzle operand descriptor. K-major: stride = bytes between 8-row groups (1024).
// MN-major: stride = bytes between groups of 8 k, lead = bytes between blocks of 64 mn.
DEVICE_FN uint64_t wgmma_descriptor(uint32_t address, uint32_t stride, uint32_t lead = 0) {
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(lead >> 4 & 0x3fff) << 16 | uint64_t(stride >> 4 & 0x3fff) << 32 |
         uint64_t(1) << 62;
}

#ifdef __CUDACC__
DEVICE_FN void mbarrier_init(uint32_t bar, int n) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(n) : "memory");
}

DEVICE_FN void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE_FN void mbarrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

DEVICE_FN void mbarrier_arrive_expect_tx(uint32_t bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

DEVICE_FN void mbarrier_wait(uint32_t bar, unsigned parity) {
  asm volatile("{\n.reg .pred p;\nwait_%=:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra wait_%=;\n}"
               ::"r"(bar), "r"(parity) : "memory");
}

DEVICE_FN void tma_load_2d(uint32_t dst, const TensorMap& map, int x, int y, uint32_t bar) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4}], [%2];"
               ::"r"(dst), "l"(&map), "r"(bar), "r"(x), "r"(y) : "memory");
}

DEVICE_FN void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE_FN void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE_FN void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kGroupsLeft>
DEVICE_FN void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory");
}

#define ACC4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ACC32 ACC4(0), ACC4(4), ACC4(8), ACC4(12), ACC4(16), ACC4(20), ACC4(24), ACC4(28)
#define ACC32_TEXT                                        \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define WGMMA_TEXT "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " ACC32_TEXT
template <bool kTransposeB>
DEVICE_FN void wgmma_m64n64k16_ss(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n" WGMMA_TEXT ", %32, %33, p, 1, 1, 0, %35;\n}"
               : ACC32 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kTransposeB)));
}

template <bool kTransposeB>
DEVICE_FN void wgmma_m64n64k16_rs(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n" WGMMA_TEXT ", {%32,%33,%34,%35}, %36, p, 1, 1, %38;\n}"
               : ACC32
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kTransposeB)));
}

// lead of b's descriptor: between its two blocks of 64 columns, where it is transposed.
template <bool kTransposeB>
DEVICE_FN void wgmma_m64n128k16_ss(float (&d)[64], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
      "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,"
      "%58,%59,%60,%61,%62,%63}, %64, %65, 1, 1, 1, 0, %66;"
      : ACC32, ACC4(32), ACC4(36), ACC4(40), ACC4(44), ACC4(48), ACC4(52), ACC4(56), ACC4(60)
      : "l"(a), "l"(b), "n"(int(kTransposeB)));
}
#undef ACC4
#undef ACC32
#undef ACC32_TEXT
#undef WGMMA_TEXT
#else
DEVICE_FN void mbarrier_init(uint32_t bar, int n) { emu::mbarrier_init(bar, n); }
DEVICE_FN void mbarrier_init_fence() {}
DEVICE_FN void mbarrier_arrive(uint32_t bar) { emu::mbarrier_arrive(bar, 0); }
DEVICE_FN void mbarrier_arrive_expect_tx(uint32_t bar, int bytes) { emu::mbarrier_arrive(bar, bytes); }
DEVICE_FN void mbarrier_wait(uint32_t bar, unsigned parity) { emu::mbarrier_wait(bar, parity); }
DEVICE_FN void tma_load_2d(uint32_t dst, const TensorMap& map, int x, int y, uint32_t bar) {
  emu::tma_load_2d(dst, &map, x, y, bar);
}

DEVICE_FN void fence_proxy_async() { emu::fence_proxy_async(); }
DEVICE_FN void wgmma_fence() { emu::wgmma_fence(); }
DEVICE_FN void wgmma_commit() { emu::wgmma_commit(); }
template <int kGroupsLeft>
DEVICE_FN void wgmma_wait() { emu::wgmma_wait(kGroupsLeft); }
template <bool kTransposeB>
DEVICE_FN void wgmma_m64n64k16_ss(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  emu::wgmma(64, d, nullptr, a, b, false, kTransposeB, accumulate);
}

template <bool kTransposeB>
DEVICE_FN void wgmma_m64n64k16_rs(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  emu::wgmma(64, d, a, 0, b, false, kTransposeB, accumulate);
}

template <bool kTransposeB>
DEVICE_FN void wgmma_m64n128k16_ss(float (&d)[64], uint64_t a, uint64_t b) {
  emu::wgmma(128, d, nullptr, a, b, false, kTransposeB, true);
}
#endif
