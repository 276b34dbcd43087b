// Probing the processor, once, and the operator that reports it.
#include "isa.h"

#include <ATen/Version.h>
#include <torch/library.h>

#include <cstdlib>
#include <string>

namespace resfuse {

namespace {

#if RESFUSE_X86
// Whether oneDNN's own cap forbids bfloat16 dot products: torch's convolutions and ours then agree on what is there.
bool bf16_capped() {
  const char* named = std::getenv("ONEDNN_MAX_CPU_ISA");
  if (named == nullptr) return false;
  const std::string cap(named);
  for (const char* lower : {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"}) {
    if (cap == lower) return true;
  }
  return false;
}
#endif

Isa probe() {
#if RESFUSE_X86
  const std::string capability = at::get_cpu_capability();  // torch's choice, which ATEN_CPU_CAPABILITY lowers
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (capability == "AVX512" && avx512) {
    return __builtin_cpu_supports("avx512bf16") && !bf16_capped() ? Isa::avx512_bf16 : Isa::avx512;
  }
  if (capability != "DEFAULT" && avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

}  // namespace

Isa isa() {
  static const Isa found = probe();
  return found;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2: return "AVX2";
    case Isa::avx512: return "AVX-512";
    case Isa::avx512_bf16: return "AVX-512 with bfloat16";
    default: return "baseline";
  }
}

std::string cpu_isa() {
  return isa_name(isa());
}

TORCH_LIBRARY_IMPL(resfuse, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", &cpu_isa);
}

}  // namespace resfuse
