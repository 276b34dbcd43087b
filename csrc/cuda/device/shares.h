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
      for (int d = 0; d < kDown; ++d) total += scratch[d * kColumns + tid];
      result[which * kColumns + tid] = total;
    }
    __syncthreads();
  }
}

// A block that merges the shares of kMergeChannels channels: each thread takes every kMergeLanes-th share in order, then
// one thread of a channel adds up what they found.
constexpr int kMergeChannels = 8, kMergeLanes = kThreads / kMergeChannels;

}  // namespace resfuse::cuda
