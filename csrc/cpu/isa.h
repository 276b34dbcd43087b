// Run-time choice of instruction set: one binary that runs on any processor and uses what this one has.
//
// A kernel is a function object whose call operator is RESFUSE_HD (always inlined); `run_best` inlines it into one
// function per instruction set, where the compiler vectorises its loops, and calls the version for this machine.
// Everything a kernel calls must be RESFUSE_HD too, or a plain function that makes its own choice.
#pragma once

#include <cstdint>

#include "../common/scalar.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define RESFUSE_X86 1
#define RESFUSE_AVX2 __attribute__((target("avx2,fma,bmi,bmi2,f16c,lzcnt,popcnt")))
#if defined(__clang__)
#define RESFUSE_AVX512_FEATURES "avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,fma,bmi,bmi2"
#else
#define RESFUSE_AVX512_FEATURES \
  "avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,fma,bmi,bmi2,prefer-vector-width=512"
#endif
#define RESFUSE_AVX512 __attribute__((target(RESFUSE_AVX512_FEATURES)))
#define RESFUSE_AVX512_BF16 __attribute__((target(RESFUSE_AVX512_FEATURES ",avx512bf16")))
#else
#define RESFUSE_X86 0
#endif

namespace resfuse {

enum class Isa { baseline, avx2, avx512, avx512_bf16, amx };

// The best instruction set of this processor within ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA; probed once.
Isa isa();
// The same without the matrix unit, whose own probe runs on it.
Isa vector_isa();
const char* isa_name(Isa isa);

#if RESFUSE_X86
template <class Kernel>
RESFUSE_AVX512 void run_avx512(const Kernel& kernel, int64_t begin, int64_t end) {
  kernel(begin, end);
}

template <class Kernel>
RESFUSE_AVX2 void run_avx2(const Kernel& kernel, int64_t begin, int64_t end) {
  kernel(begin, end);
}
#endif

template <class Kernel>
void run_baseline(const Kernel& kernel, int64_t begin, int64_t end) {
  kernel(begin, end);
}

template <class Kernel>
void run_best(const Kernel& kernel, int64_t begin, int64_t end) {
#if RESFUSE_X86
  if (isa() >= Isa::avx512) return run_avx512(kernel, begin, end);
  if (isa() >= Isa::avx2) return run_avx2(kernel, begin, end);
#endif
  run_baseline(kernel, begin, end);
}

}  // namespace resfuse
