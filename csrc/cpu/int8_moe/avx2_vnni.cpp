// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
#include <cpuid.h>
#include <immintrin.h>

#include <cstdint>

#include "experts.h"
#include "microkernel.h"
#include "router.h"
#include "targets.h"

namespace int8_moe {
namespace {

struct Avx2Vnni {
  using Vector = __m256i;
  static constexpr int kColumns = 8, kMR = 6, kNR = kHalf;
  static constexpr int kAccumulators = 8, kZeroPoint = 128, kGroups = 1;

  static Vector zero() { return _mm256_setzero_si256(); }
  static Vector load_weights(const int8_t* b) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
  }
  static Vector broadcast(const uint8_t* a) {
    return _mm256_set1_epi32(load_activations(a));
  }
  template <int>
  static Vector dot(Vector sum, Vector w, Vector x) {
    return _mm256_dpbusd_avx_epi32(sum, x, w);
  }
  static Vector add(Vector a, Vector b) { return _mm256_add_epi32(a, b); }
  static Vector load_sums(const int32_t* c) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c));
  }
  static void store_sums(Vector sum, int32_t* c) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(c), sum);
  }
};

// Not every compiler's __builtin_cpu_supports knows "avxvnni".
bool avx2_vnni_supported() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kAvxVnni = 1u << 4;
  return avx2_supported() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) &&
         (eax & kAvxVnni) != 0;
}

}  // namespace

extern const Isa INT8_MOE_TARGET(avx2_vnni) = {
    "avx2_vnni", avx2_vnni_supported, run_experts<VectorMicrokernel<Avx2Vnni>>,
    run_router};

}  // namespace int8_moe
