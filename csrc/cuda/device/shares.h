// Sums over a block's rows, in a fixed order: a thread's own rows one after the other, then the threads of its columns.
#pragma once

#include "rows.h"

namespace resfuse::cuda {

// For each of kCount sums of a thread's eight channels: the sum over the block's threads of those channels, in thread
// order; result[which][column of the block] in shared memory, valid for all threads after the call.
template <int kCount>
DEVICE_FN void add_threads(float* result, float* scratch, const float (&sums)[kCount][kVector]) {
  const int tid = int(threadIdx.x), across = tid % kAcross, down = tid / kAcross;
#pragma unroll
  for (int which = 0; which < kCount; ++which) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) scratch[down * kColumns + across * kVector + i] = sums[which][i];
    __syncthreads();
    if (tid < kColumns) {
      float total = 0.0f;
#pragma unroll 8
      for (int d = 0; d < kDown; ++d) total += scratch[d * kColumns + tid];
      result[which * kColumns + tid] = total;
    }
    __syncthreads();
  }
}

// A block that merges the shares of kMergeChannels channels: each thread takes every kMergeLanes-th share in order.
constexpr int kMergeThreads = 512, kMergeChannels = 8, kMergeLanes = kMergeThreads / kMergeChannels;

// Each of kCount sums over the lanes of a thread's channel, by halves, for all threads; scratch [kCount, kMergeThreads].
template <int kCount>
DEVICE_FN void add_lanes(float (&sums)[kCount], float* scratch) {
  const int tid = int(threadIdx.x), lane = tid / kMergeChannels;
#pragma unroll
  for (int which = 0; which < kCount; ++which) scratch[which * kMergeThreads + tid] = sums[which];
  for (int half = kMergeLanes / 2; half > 0; half /= 2) {
    __syncthreads();  // what is added next is whole
    if (lane >= half) continue;
#pragma unroll
    for (int which = 0; which < kCount; ++which)
      scratch[which * kMergeThreads + tid] += scratch[which * kMergeThreads + tid + half * kMergeChannels];
  }
  __syncthreads();  // the sums are whole
#pragma unroll
  for (int which = 0; which < kCount; ++which) sums[which] = scratch[which * kMergeThreads + tid % kMergeChannels];
  __syncthreads();  // everybody has read them
}

}  // namespace resfuse::cuda
