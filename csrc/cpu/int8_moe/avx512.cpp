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

// vpmaddwd of values that are widened to 16 bits, as in avx2.cpp.
struct Avx512 {
  using Vector = __m512i;
  static constexpr int kColumns = 8, kMR = 6, kNR = int8_moe::kNR;
  static constexpr int kAccumulators = 4, kZeroPoint = 0, kGroups = 1;

  static Vector zero() { return _mm512_setzero_si512(); }
  static Vector load_weights(const int8_t* b) {
    return _mm512_cvtepi8_epi16(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  }
  static Vector broadcast(const uint8_t* a) {
    return _mm512_cvtepi8_epi16(_mm256_set1_epi32(load_activations(a)));
  }
  template <int>
  static Vector dot(Vector sum, Vector w, Vector x) {
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(w, x));
    // Keeps GCC 12 from computing the products of all rows before the sums: it
    // would run out of registers.
    asm("" : "+v"(sum));
    return sum;
  }
  static Vector add(Vector a, Vector b) { return _mm512_add_epi32(a, b); }
  static Vector load_sums(const int32_t* c) {
    return _mm512_cvtepu32_epi64(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c)));
  }
  static void store_sums(Vector sum, int32_t* c) {
    const __m512i sums = _mm512_add_epi32(sum, _mm512_srli_epi64(sum, 32));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(c),
                        _mm512_cvtepi64_epi32(sums));
  }
};

}  // namespace

extern const Isa INT8_MOE_TARGET(avx512) = {
    "avx512", avx512_supported, run_experts<VectorMicrokernel<Avx512>>,
    run_router};

}  // namespace int8_moe
