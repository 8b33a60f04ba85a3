// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
#include <immintrin.h>

#include <cstdint>

#include "experts.h"
#include "microkernel.h"
#include "router.h"
#include "targets.h"

namespace int8_moe {
namespace {

// As in avx2.cpp.
struct Avx512 {
  using Vector = __m512i;
  static constexpr int kColumns = 8, kMR = 6, kNR = int8_moe::kNR, kChains = 4,
                       kOffset = 0;

  static Vector zero() { return _mm512_setzero_si512(); }
  static Vector load(const int8_t* b) {
    return _mm512_cvtepi8_epi16(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  }
  static Vector broadcast(const uint8_t* a) {
    return _mm512_cvtepi8_epi16(_mm256_set1_epi32(read_four(a)));
  }
  static Vector dot(Vector sum, Vector w, Vector x) {
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(w, x));
    // GCC 12 would take the products of all rows first, and run out of registers.
    asm("" : "+v"(sum));
    return sum;
  }
  static Vector add(Vector a, Vector b) { return _mm512_add_epi32(a, b); }
  static Vector read(const int32_t* c) {
    return _mm512_cvtepu32_epi64(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c)));
  }
  static void store(Vector sum, int32_t* c) {
    const __m512i both = _mm512_add_epi32(sum, _mm512_srli_epi64(sum, 32));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(c), _mm512_cvtepi64_epi32(both));
  }
};

}  // namespace

extern const Isa INT8_MOE_TARGET(avx512) = {
    "avx512", avx512_supported,
    run_experts<VectorMicrokernel<Avx512>>, run_router};

}  // namespace int8_moe
