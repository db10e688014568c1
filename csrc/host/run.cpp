#include "run.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string>

namespace fusegrad {
namespace {

constexpr const char* kNames[kVariants] = {"default", "avx2", "avx512", "cuda"};

Variant best_variant() {
#if defined(__x86_64__)
#ifdef FUSEGRAD_HAS_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return kAvx512;
#endif
#ifdef FUSEGRAD_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
#endif
  return kDefault;
}

Variant choose_variant() {
  const Variant best = best_variant();
  const char* wish = std::getenv("FUSEGRAD_CPU_CAPABILITY");
  if (!wish || !*wish) return best;
  std::string known;
  for (int v = kDefault; v <= best; ++v) {
#ifndef FUSEGRAD_HAS_AVX2
    if (v == kAvx2) continue;
#endif
    if (std::string(wish) == kNames[v]) return Variant(v);
    known += (v ? ", " : "") + std::string(kNames[v]);
  }
  TORCH_CHECK_VALUE(false, "fusegrad: FUSEGRAD_CPU_CAPABILITY must be one of ", known, " on this CPU and in this build, got ",
                    wish);
}

}  // namespace

Variant cpu_variant() {
  static const Variant variant = choose_variant();
  return variant;
}

const char* variant_name(Variant variant) { return kNames[variant]; }

}  // namespace fusegrad
