// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "microkernel.h"
#include "targets.h"

namespace int8_moe {
namespace {

struct Avx512Vnni {
  using Vector = __m512i;
  static constexpr int kColumns = 16, kMR = 12, kNR = int8_moe::kNR;
  static constexpr int kAccumulators = 4, kZeroPoint = 128, kGroups = 1;

  static Vector zero() { return _mm512_setzero_si512(); }
  static Vector load_weights(const int8_t* b) { return _mm512_loadu_si512(b); }
  static Vector broadcast(const uint8_t* a) {
    return _mm512_set1_epi32(load_activations(a));
  }
  template <int>
  static Vector dot(Vector sum, Vector w, Vector x) {
    return _mm512_dpbusd_epi32(sum, x, w);
  }
  static Vector add(Vector a, Vector b) { return _mm512_add_epi32(a, b); }
  static Vector load_sums(const int32_t* c) { return _mm512_loadu_si512(c); }
  static void store_sums(Vector sum, int32_t* c) {
    _mm512_storeu_si512(c, sum);
  }
};

inline bool avx512_vnni_supported() {
  return avx512_supported() && __builtin_cpu_supports("avx512vnni");
}

}  // namespace
}  // namespace int8_moe
