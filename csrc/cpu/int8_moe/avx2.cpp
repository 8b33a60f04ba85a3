// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
#include <immintrin.h>

#include <cstdint>

#include "unrolled.h"

namespace int8_moe {
namespace {

// vpmaddubsw saturates, so both sides go to 16 bits. Sums of values 0, 1 and of
// values 2, 3 of each four stay apart until the end.
struct Dot {
  static constexpr int kOffset = 0;
  static constexpr int kRowsRead = 1;
  static void end() {}

  template <int M>
  static void some(const uint8_t* a, int64_t stride, const int8_t* half,
                   int64_t k, int32_t* c) {
    __m256i sum[4 * M];
    unrolled<4 * M>(INT8_MOE_EACH(j) { sum[j] = _mm256_setzero_si256(); });
    for (int64_t i = 0; i < k; i += 4) {
      const __m128i* w = reinterpret_cast<const __m128i*>(half + i * 16);
      __m256i x[M];
      unrolled<M>(INT8_MOE_EACH(r) {
        int32_t four;
        __builtin_memcpy(&four, a + r * stride + i, 4);
        x[r] = _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(four)));
      });
      unrolled<4>(INT8_MOE_EACH(j) {
        const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(w + j));
        unrolled<M>(INT8_MOE_EACH(r) {
          sum[4 * r + j] =
              _mm256_add_epi32(sum[4 * r + j], _mm256_madd_epi16(wide, x[r]));
        });
      });
    }
    unrolled<4 * M>(INT8_MOE_EACH(j) {
      alignas(32) int32_t parts[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(parts), sum[j]);
      int32_t* to = c + j / 4 * 32 + j % 4 * 4;
      for (int n = 0; n < 4; ++n) to[n] = parts[2 * n] + parts[2 * n + 1];
    });
  }

  static void row(const uint8_t* a, const int8_t* half, int64_t k, int32_t* c) {
    some<1>(a, 0, half, k, c);
  }

  static void rows(const uint8_t* a, int64_t stride, const int8_t* block,
                   int64_t k, int64_t m, int32_t* c) {
    for (int half = 0; half < 2; ++half) {
      const int8_t* w = block + half * k * 16;
      int64_t r = 0;
      for (; r + 2 <= m; r += 2) {
        some<2>(a + r * stride, stride, w, k, c + r * 32 + half * 16);
      }
      if (r < m) some<1>(a + r * stride, stride, w, k, c + r * 32 + half * 16);
    }
  }
};

}  // namespace
}  // namespace int8_moe

#include "kernel.h"

namespace int8_moe {

extern const Isa kAvx2 = {
    "avx2",
    [] {
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    },
    experts, route};

}  // namespace int8_moe
