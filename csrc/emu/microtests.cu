// Small kernels that test the emulator itself, one instruction or pattern each; also valid CUDA.
#include "hopper_ptx.h"

namespace {

__global__ void warp_ops_kernel(int* out) {  // one warp; out[8][32]
  const int l = threadIdx.x;
  const unsigned all = 0xffffffffu;
  out[0 * 32 + l] = __shfl_sync(all, l * 3, 5, 8);
  out[1 * 32 + l] = __shfl_up_sync(all, l, 3u, 16);
  out[2 * 32 + l] = __shfl_down_sync(all, l, 3u, 16);
  out[3 * 32 + l] = __shfl_xor_sync(all, l, 9);
  out[4 * 32 + l] = int(__ballot_sync(all, l % 3 == 0));
  out[5 * 32 + l] = __reduce_add_sync(all, l);
  out[6 * 32 + l] = l < 8 ? __reduce_max_sync(0xffu, l * 7) : -1;
  out[7 * 32 + l] = __any_sync(all, l == 40) * 2 + __all_sync(all, l < 32);
}

// One m16n8k16 (bf16/f16) or m16n8k8 (tf32) product from row-major A [16,k], B [8,k] in global memory.
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* d, int type) {
  const int l = threadIdx.x, row = l >> 2, t = l & 3;
  float acc[4] = {};
  const uint32_t fa[4] = {a[row * 8 + t], a[(row + 8) * 8 + t], a[row * 8 + t + 4], a[(row + 8) * 8 + t + 4]};
  const uint32_t fb[2] = {b[row * 8 + t], b[row * 8 + t + 4]};
  if (type == 0) mma_m16n8k16_bf16(acc, fa, fb);
  if (type == 1) mma_m16n8k16_f16(acc, fa, fb);
  if (type == 2) mma_m16n8k8_tf32(acc, fa, fb);
  for (int i = 0; i < 4; ++i) d[(row + 8 * (i >> 1)) * 8 + t * 2 + (i & 1)] = acc[i];
}

// 32 rows of 8 16-bit values copied to shared memory, rows from `valid` on as zeros, then read as four 8x8 matrices.
__global__ void copy_kernel(const uint4* in, uint32_t* out, int valid, int transpose) {
  SHARED_ARRAY(uint4, rows, 32);
  const int l = threadIdx.x, copied = 31 - l;  // no lane reads what it copied
  const uint32_t address = smem_address(rows + l);
  cp_async_16(smem_address(rows + copied), in + (copied < valid ? copied : 0), copied < valid);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp(0xffffffffu);
  uint32_t r[4];
  if (transpose) {
    ldmatrix_x4_trans(r, address);
  } else {
    ldmatrix_x4(r, address);
  }
  for (int i = 0; i < 4; ++i) out[i * 32 + l] = r[i];
}

// Grid-wide sum with the "last block done" pattern.
__global__ void last_block_kernel(const float* x, float* partial, unsigned* ticket, float* total) {
  SHARED_ARRAY(float, s, 32);
  SHARED_ARRAY(int, is_last, 1);
  s[threadIdx.x] = x[blockIdx.x * 32 + threadIdx.x];
  __syncwarp();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < 32; ++i) sum += s[i];
    partial[blockIdx.x] = sum;
    __threadfence();
    is_last[0] = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (is_last[0] && threadIdx.x == 0) {
    __threadfence();
    float sum = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) sum += partial[i];
    *total = sum;
  }
}

// packed: in[i] as bfloat16 bits | float16 bits << 16. back: the former's value, and the negative of the latter's.
__global__ void convert_kernel(const float* in, unsigned* packed, float2* back, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const unsigned b = pack_bf16x2(in[i], -in[i]), h = pack_f16x2(in[i], -in[i]);
  packed[i] = (b & 0xffff) | h << 16;
  back[i] = make_float2(unpack_bf16x2(b).x, unpack_f16x2(h).y);
}

// Warp specialisation: warp 0 produces 32 values per step into a ring of two slots (full/empty
// mbarriers), warps 1 and 2 consume them and combine through a named barrier of their own.
__global__ void pipeline_kernel(const int* x, int* out, int steps) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  SHARED_ARRAY(int, ring, 2 * 32);
  SHARED_ARRAY(int, sums, 2 * 32);
  SHARED_ARRAY(uint64_t, bars, 4);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const uint32_t full = smem_address(bars), empty = full + 16;
  if (threadIdx.x < 2) {
    mbarrier_init(full + threadIdx.x * 8, 32);
    mbarrier_init(empty + threadIdx.x * 8, 64);
  }
  __syncthreads();
  if (warp == 0) {
    for (int s = 0; s < steps; ++s) {
      if (s >= 2) mbarrier_wait(empty + (s & 1) * 8, (s >> 1 & 1) ^ 1);
      ring[(s & 1) * 32 + lane] = x[s * 32 + lane];
      mbarrier_arrive(full + (s & 1) * 8);
    }
  } else {
    int sum = 0;
    for (int s = 0; s < steps; ++s) {
      mbarrier_wait(full + (s & 1) * 8, s >> 1 & 1);
      sum += ring[(s & 1) * 32 + (lane + warp) % 32];
      mbarrier_arrive(empty + (s & 1) * 8);
    }
    sums[(warp - 1) * 32 + lane] = sum;
    named_barrier_sync(1, 64);
    if (warp == 1) out[lane] = sums[lane] + sums[32 + (lane + 31) % 32];  // both hold column lane + 1
  }
#endif
}

}  // namespace

extern "C" int pipeline(const int* x, int* out, int steps, void* stream) {
  return launch(pipeline_kernel, dim3(1), dim3(96), 0, cudaStream_t(stream), x, out, steps);
}

extern "C" int warp_ops(int* out, void* stream) {
  return launch(warp_ops_kernel, dim3(1), dim3(32), 0, cudaStream_t(stream), out);
}

extern "C" int mma_once(const uint32_t* a, const uint32_t* b, float* d, int type, void* stream) {
  return launch(mma_kernel, dim3(1), dim3(32), 0, cudaStream_t(stream), a, b, d, type);
}

extern "C" int copy(const void* in, uint32_t* out, int valid, int transpose, void* stream) {
  const auto rows = static_cast<const uint4*>(in);
  return launch(copy_kernel, dim3(1), dim3(32), 0, cudaStream_t(stream), rows, out, valid, transpose);
}

extern "C" int last_block_sum(const float* x, float* partial, unsigned* ticket, float* total, int blocks,
                              void* stream) {
  return launch(last_block_kernel, dim3(blocks), dim3(32), 0, cudaStream_t(stream), x, partial, ticket, total);
}

extern "C" int convert(const float* in, unsigned* packed, float2* back, int n, void* stream) {
  return launch(convert_kernel, dim3((n + 255) / 256), dim3(256), 0, cudaStream_t(stream), in, packed, back, n);
}
