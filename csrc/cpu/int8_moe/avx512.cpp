// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
#include <immintrin.h>

#include <cstdint>

#include "experts.h"
#include "microkernel.h"
#include "router.h"
#include "targets.h"
#include "widened_panel.h"

namespace int8_moe {
namespace {

struct Avx512Panels {
  using Vector = __m512i;
  static constexpr int kColumns = 16, kMR = 12, kNR = int8_moe::kNR;

  static Vector load(const void* from) { return _mm512_loadu_si512(from); }
  static void store(Vector value, void* to) { _mm512_storeu_si512(to, value); }
  static Vector zero() { return _mm512_setzero_si512(); }
  static Vector broadcast(int32_t pair) { return _mm512_set1_epi32(pair); }
  static Vector widen_even(Vector bytes) {
    return _mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8);
  }
  static Vector widen_odd(Vector bytes) { return _mm512_srai_epi16(bytes, 8); }
  static Vector add_products(Vector sum, Vector a, Vector b) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
  }
};

// For few rows, which are bound by memory: a load widens all bytes in their
// order.
struct Avx512 {
  using Vector = __m512i;
  static constexpr int kColumns = 8, kMR = 3, kNR = int8_moe::kNR;
  static constexpr int kAccumulators = 4, kZeroPoint = 0, kGroups = 1;

  static Vector zero() { return Avx512Panels::zero(); }
  static Vector load_weights(const int8_t* b) {
    return _mm512_cvtepi8_epi16(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  }
  static Vector broadcast(const uint8_t* a) {
    return _mm512_cvtepi8_epi16(_mm256_set1_epi32(load_activations(a)));
  }
  template <int>
  static Vector dot(Vector sum, Vector w, Vector x) {
    return Avx512Panels::add_products(sum, w, x);
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

// gemv is that of VectorMicrokernel.
struct Avx512Microkernel : VectorMicrokernel<Avx512> {
  static void gemm(const uint8_t* a, int64_t a_stride, const int8_t* block,
                   int64_t k, int64_t m, const int8_t* /*next_block*/,
                   int32_t* c) {
    const auto multiply = m > Avx512::kMR ? multiply_panels<Avx512Panels>
                                          : int8_moe::gemm<Avx512>;
    multiply(a, a_stride, block, k, m, c);
  }
};

}  // namespace

extern const Isa INT8_MOE_TARGET(avx512) = {
    "avx512", avx512_supported, run_experts<Avx512Microkernel>, run_router};

}  // namespace int8_moe
