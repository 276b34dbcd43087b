// Probing the processor, once, and the operator that reports it.
#include "isa.h"
#include "primitives.h"

#include <ATen/Version.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "amx.h"

namespace resfuse {

namespace {

#if RESFUSE_X86
// oneDNN's own cap: torch's convolutions and ours then agree on what is there.
Isa onednn_cap() {
  const char* named = std::getenv("ONEDNN_MAX_CPU_ISA");
  const std::string cap(named == nullptr ? "" : named);
  if (cap == "SSE41" || cap == "AVX") return Isa::baseline;
  if (cap == "AVX2" || cap == "AVX2_VNNI" || cap == "AVX2_VNNI_2") return Isa::avx2;
  if (cap == "AVX512_CORE" || cap == "AVX512_CORE_VNNI") return Isa::avx512;
  if (cap == "AVX512_CORE_BF16" || cap == "AVX512_CORE_FP16" || cap == "AVX10_1_512") return Isa::avx512_bf16;
  return Isa::amx;
}
#endif

Isa probe() {
  Isa found = Isa::baseline;
#if RESFUSE_X86
  // torch's choice, which ATEN_CPU_CAPABILITY lowers; versions differ in what they call the least
  const std::string capability = at::get_cpu_capability();
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if ((capability == "AVX2" || capability == "AVX512") && avx2) found = Isa::avx2;
  if (capability == "AVX512" && avx512) {
    found = __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  }
  found = std::min(found, onednn_cap());
#endif
  return found;
}

bool takes_matrix_unit() {
#if RESFUSE_X86
  return vector_isa() == Isa::avx512_bf16 && onednn_cap() == Isa::amx && amx_works();
#else
  return false;
#endif
}

}  // namespace

Isa vector_isa() {
  static const Isa found = probe();
  return found;
}

Isa isa() {
  static const Isa found = takes_matrix_unit() ? Isa::amx : vector_isa();
  return found;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2: return "AVX2";
    case Isa::avx512: return "AVX-512";
    case Isa::avx512_bf16: return "AVX-512 with bfloat16";
    case Isa::amx: return "AVX-512 with bfloat16 and AMX";
    default: return "baseline";
  }
}

std::string cpu_isa() {
  return isa_name(isa());
}

}  // namespace resfuse
