// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
#include <immintrin.h>

#include <cstdint>

#include "unrolled.h"

namespace int8_moe {
namespace {

// As in avx2.cpp, 16 columns and more rows at once.
struct Dot {
  static constexpr int kOffset = 0;
  static constexpr int kRowsRead = 1;
  static void end() {}

  // kWide: registers of eight columns
  template <int M, int kWide = 4>
  static void some(const uint8_t* a, int64_t stride, const int8_t* block,
                   int64_t k, int32_t* c) {
    __m512i sum[kWide * M];
    unrolled<kWide * M>(INT8_MOE_EACH(j) { sum[j] = _mm512_setzero_si512(); });
    for (int64_t i = 0; i < k; i += 4) {
      __m512i wide[kWide];
      unrolled<kWide>(INT8_MOE_EACH(j) {
        const int8_t* w = block + (j / 2 * k + i) * 16 + j % 2 * 32;
        wide[j] = _mm512_cvtepi8_epi16(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
      });
      unrolled<M>(INT8_MOE_EACH(r) {
        int32_t four;
        __builtin_memcpy(&four, a + r * stride + i, 4);
        const __m512i x =
            _mm512_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(four)));
        unrolled<kWide>(INT8_MOE_EACH(j) {
          sum[kWide * r + j] =
              _mm512_add_epi32(sum[kWide * r + j], _mm512_madd_epi16(wide[j], x));
        });
      });
    }
    unrolled<kWide * M>(INT8_MOE_EACH(j) {
      alignas(64) int32_t parts[16];
      _mm512_store_si512(parts, sum[j]);
      for (int n = 0; n < 8; ++n) c[8 * j + n] = parts[2 * n] + parts[2 * n + 1];
    });
  }

  static void row(const uint8_t* a, const int8_t* half, int64_t k, int32_t* c) {
    some<1, 2>(a, 0, half, k, c);
  }

  static void rows(const uint8_t* a, int64_t stride, const int8_t* block,
                   int64_t k, int64_t m, int32_t* c) {
    int64_t r = 0;
    for (; r + 6 <= m; r += 6) some<6>(a + r * stride, stride, block, k, c + r * 32);
    a += r * stride;
    c += r * 32;
    switch (m - r) {
      case 1: return some<1>(a, stride, block, k, c);
      case 2: return some<2>(a, stride, block, k, c);
      case 3: return some<3>(a, stride, block, k, c);
      case 4: return some<4>(a, stride, block, k, c);
      case 5: return some<5>(a, stride, block, k, c);
    }
  }
};

}  // namespace
}  // namespace int8_moe

#include "kernel.h"

namespace int8_moe {

extern const Isa kAvx512 = {
    "avx512",
    [] {
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    },
    experts, route};

}  // namespace int8_moe
