// For the emulator's tests, and valid CUDA: out [M, N] = f(A [M, K]) @ B, float32 of bfloat16, on sm_90a. One warpgroup
// per 64 x 64 tile, two stages of TMA.
// kRegisterA: A goes through registers and f is ReLU, else f is the identity. kTransposeB: B is stored [K, N], else
// [N, K].
#include "hopper_ptx.h"

namespace {

constexpr int kTile = 64, kTileBytes = kTile * kTile * 2, kStageBytes = 2 * kTileBytes;

template <bool kRegisterA, bool kTransposeB>
__global__ void __launch_bounds__(128)
wgmma_tile_kernel(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
                  float* __restrict__ out, int M, int N, int K) {
#ifdef HAS_WGMMA
  SHARED_DYNAMIC(unsigned char, smem);
  SHARED_ARRAY(uint64_t, full, 2);
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int m0 = blockIdx.x * kTile, n0 = blockIdx.y * kTile, steps = (K + kTile - 1) / kTile;
  const uint32_t tiles = smem_address(smem), bar = smem_address(full);

  const auto load_stage = [&](int step) {  // one thread
    const uint32_t base = tiles + (step & 1) * kStageBytes, b = bar + (step & 1) * 8;
    mbarrier_arrive_expect_tx(b, kStageBytes);
    tma_load_2d(base, map_a, step * kTile, m0, b);
    if (kTransposeB) tma_load_2d(base + kTileBytes, map_b, n0, step * kTile, b);
    else tma_load_2d(base + kTileBytes, map_b, step * kTile, n0, b);
  };
  if (tid == 0) {
    mbarrier_init(bar, 1);
    mbarrier_init(bar + 8, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (tid == 0) load_stage(0);

  float acc[32] = {};
  for (int step = 0; step < steps; ++step) {
    if (tid == 0 && step + 1 < steps) load_stage(step + 1);
    mbarrier_wait(bar + (step & 1) * 8, step >> 1 & 1);
    const uint32_t tile_a = tiles + (step & 1) * kStageBytes, tile_b = tile_a + kTileBytes;
    uint32_t a[4][4];
    if (kRegisterA) {
#pragma unroll
      for (int kk = 0; kk < 4; ++kk) {
        const int row = warp * 16 + (lane & 15), chunk = kk * 2 + (lane >> 4);
        ldmatrix_x4(a[kk], tile_a + row * 128 + ((chunk ^ row) & 7) * 16);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float2 x = unpack_bf16x2(a[kk][r]);
          a[kk][r] = pack_bf16x2(fmaxf(x.x, 0.0f), fmaxf(x.y, 0.0f));
        }
      }
    }
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
      const uint64_t b = kTransposeB ? wgmma_descriptor(tile_b + kk * 16 * 128, 1024)
                                     : wgmma_descriptor(tile_b + kk * 32, 1024);
      if (kRegisterA) wgmma_m64n64k16_rs<kTransposeB>(acc, a[kk], b, true);
      else wgmma_m64n64k16_ss<kTransposeB>(acc, wgmma_descriptor(tile_a + kk * 32, 1024), b, true);
    }
    wgmma_commit();
    wgmma_wait<0>();
    __syncthreads();  // the whole warpgroup is done with this stage
  }
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int row = m0 + warp * 16 + (lane >> 2) + (i >> 1 & 1) * 8, col = n0 + (i >> 2) * 8 + (lane & 3) * 2 + (i & 1);
    if (row < M && col < N) out[size_t(row) * N + col] = acc[i];
  }
#endif
}

}  // namespace

// register_a, transpose_b: as above. K, N: multiples of 8.
extern "C" int wgmma_tile(const void* a, const void* b, float* out, int M, int N, int K, int register_a,
                          int transpose_b, void* stream) {
  TensorMap map_a, map_b;
  if (!make_tensor_map(&map_a, a, K, M, kTile) ||
      !(transpose_b ? make_tensor_map(&map_b, b, N, K, kTile) : make_tensor_map(&map_b, b, K, N, kTile)))
    return 1;
  const auto kernel = register_a ? (transpose_b ? wgmma_tile_kernel<true, true> : wgmma_tile_kernel<true, false>)
                                 : (transpose_b ? wgmma_tile_kernel<false, true> : wgmma_tile_kernel<false, false>);
  return launch(kernel, dim3((M + kTile - 1) / kTile, (N + kTile - 1) / kTile), dim3(128), 2 * kStageBytes,
                static_cast<cudaStream_t>(stream), map_a, map_b, out, M, N, K);
}
