// Function multiversioning: one binary that runs on any x86-64 and uses AVX2 or AVX-512 where the machine has them.
//
// A function marked RESFUSE_MULTIVERSION is compiled once per instruction set below; the dynamic loader picks one
// when the library is loaded. Everything it calls must be inlined into it (RESFUSE_HD) to be compiled with it.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define RESFUSE_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define RESFUSE_AVX512 "x86-64-v4"
#define RESFUSE_AVX2 "x86-64-v3"
#else  // these compilers know the levels by their features only
#define RESFUSE_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#define RESFUSE_AVX512 "avx512f"
#define RESFUSE_AVX2 "avx2"
#endif
#else
#define RESFUSE_MULTIVERSION
#endif

namespace resfuse {

// The version that the loader picks on this machine, best first.
inline const char* selected_isa() {
#if defined(RESFUSE_AVX2)
  __builtin_cpu_init();
  if (__builtin_cpu_supports(RESFUSE_AVX512)) return RESFUSE_AVX512;
  if (__builtin_cpu_supports(RESFUSE_AVX2)) return RESFUSE_AVX2;
#endif
  return "baseline";
}

}  // namespace resfuse
