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

struct Avx2Panels {
  using Vector = __m256i;
  static constexpr int kColumns = 8, kMR = 6, kNR = kHalf;

  static Vector load(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  }
  static void store(Vector value, void* to) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), value);
  }
  static Vector zero() { return _mm256_setzero_si256(); }
  static Vector broadcast(int32_t pair) { return _mm256_set1_epi32(pair); }
  static Vector widen_even(Vector bytes) {
    return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
  }
  static Vector widen_odd(Vector bytes) { return _mm256_srai_epi16(bytes, 8); }
  static Vector add_products(Vector sum, Vector a, Vector b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
  }
};

// For gemv, which is bound by memory.
struct Avx2 {
  using Panels = Avx2Panels;
  using Vector = __m256i;
  static constexpr int kColumns = 8, kAccumulators = 8, kGroups = 1;

  static Vector zero() { return Panels::zero(); }
  static Vector load_weights(const int8_t* b) { return Panels::load(b); }
  static Vector broadcast(const uint8_t* a) {
    return _mm256_set1_epi32(load_activations(a));
  }
  template <int>
  static Vector dot(Vector sum, Vector w, Vector x) {
    sum =
        Panels::add_products(sum, Panels::widen_even(w), Panels::widen_even(x));
    return Panels::add_products(sum, Panels::widen_odd(w),
                                Panels::widen_odd(x));
  }
  static Vector add(Vector a, Vector b) { return _mm256_add_epi32(a, b); }
  static void store_sums(Vector sum, int32_t* c) { Panels::store(sum, c); }
};

struct Avx2Microkernel {
  static constexpr int kZeroPoint = 0, kMAlign = 1;
  static void finish_thread() {}

  static void gemv(const uint8_t* a, const int8_t* half, int64_t k,
                   int32_t* c) {
    int8_moe::gemv<Avx2>(a, half, k, c);
  }

  // next_block is not used: the block prefetches itself, and beyond its end.
  static void gemm(const uint8_t* a, int64_t a_stride, const int8_t* block,
                   int64_t k, int64_t m, const int8_t* /*next_block*/,
                   int32_t* c) {
    if (m > 1) return multiply_panels<Avx2Panels>(a, a_stride, block, k, m, c);
    gemv(a, block, k, c);
    gemv(a, block + k * kHalf, k, c + kHalf);
  }
};

}  // namespace

extern const Isa INT8_MOE_TARGET(avx2) = {
    "avx2", avx2_supported, run_experts<Avx2Microkernel>, run_router};

}  // namespace int8_moe
