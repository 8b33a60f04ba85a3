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

// vpmaddubsw saturates, so both operands are widened to 16 bits for vpmaddwd.
// It leaves two sums per column: one of values 0 and 1 of each kKR, one of
// values 2 and 3. store_sums adds them, and load_sums puts a column's sum into
// the first.
struct Avx2 {
  using Vector = __m256i;
  static constexpr int kColumns = 4, kMR = 2, kNR = kHalf;
  static constexpr int kAccumulators = 8, kZeroPoint = 0, kGroups = 1;

  static Vector zero() { return _mm256_setzero_si256(); }
  static Vector load_weights(const int8_t* b) {
    return _mm256_cvtepi8_epi16(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(b)));
  }
  static Vector broadcast(const uint8_t* a) {
    return _mm256_cvtepi8_epi16(_mm_set1_epi32(load_activations(a)));
  }
  template <int>
  static Vector dot(Vector sum, Vector w, Vector x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(w, x));
  }
  static Vector add(Vector a, Vector b) { return _mm256_add_epi32(a, b); }
  static Vector load_sums(const int32_t* c) {
    return _mm256_cvtepu32_epi64(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(c)));
  }
  static void store_sums(Vector sum, int32_t* c) {
    const __m128i low = _mm256_castsi256_si128(sum);
    const __m128i high = _mm256_extracti128_si256(sum, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(c), _mm_hadd_epi32(low, high));
  }
};

}  // namespace

extern const Isa INT8_MOE_TARGET(avx2) = {
    "avx2", avx2_supported, run_experts<VectorMicrokernel<Avx2>>, run_router};

}  // namespace int8_moe
