// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// Rows of unsigned activations times a block, with vpdpbusd.
#pragma once

#include <immintrin.h>

#include <array>
#include <cstdint>

#include "unrolled.h"

namespace int8_moe {
namespace {

// How far ahead of its first use the weight is asked for, bytes.
constexpr int64_t kAhead = 4096;
// Rows in registers: 32 of them hold the sums, the weight and an activation.
constexpr int kMostWhole = 12;
constexpr int kMostHalf = 28;

// M rows times both halves of a block.
template <int M, bool kFirst>
inline void vnni_some(const uint8_t* a, int64_t stride, const int8_t* block,
                      int64_t k, int32_t* c) {
  __m512i left[M], right[M];
  unrolled<M>(INT8_MOE_EACH(r) { left[r] = right[r] = _mm512_setzero_si512(); });
  for (int64_t i = 0; i < k; i += 4) {
    const __m512i w0 = _mm512_loadu_si512(block + i * 16);
    const __m512i w1 = _mm512_loadu_si512(block + (k + i) * 16);
    if (kFirst) {
      _mm_prefetch(block + i * 16 + kAhead, _MM_HINT_T0);
      _mm_prefetch(block + (k + i) * 16 + kAhead, _MM_HINT_T0);
    }
    unrolled<M>(INT8_MOE_EACH(r) {
      int32_t four;
      __builtin_memcpy(&four, a + r * stride + i, 4);
      const __m512i x = _mm512_set1_epi32(four);
      left[r] = _mm512_dpbusd_epi32(left[r], x, w0);
      right[r] = _mm512_dpbusd_epi32(right[r], x, w1);
    });
  }
  unrolled<M>(INT8_MOE_EACH(r) {
    _mm512_storeu_si512(c + r * 32, left[r]);
    _mm512_storeu_si512(c + r * 32 + 16, right[r]);
  });
}

// One row, or more than vnni_some takes, one half after the other: the weight comes
// from memory once, in order. Few rows have more sums each, to wait for none.
template <int M>
inline void vnni_halves(const uint8_t* a, int64_t stride, const int8_t* block,
                        int64_t k, int32_t* c) {
  constexpr int kSums = M == 1 ? 4 : 1;
  for (int half = 0; half < 2; ++half, block += k * 16, c += 16) {
    __m512i sum[M * kSums];
    unrolled<M * kSums>(INT8_MOE_EACH(j) { sum[j] = _mm512_setzero_si512(); });
    for (int64_t i = 0; i < k; i += 4 * kSums) {
      unrolled<kSums>(INT8_MOE_EACH(j) {
        const int64_t at = i + 4 * j;
        _mm_prefetch(block + at * 16 + kAhead, _MM_HINT_T0);
        const __m512i w = _mm512_loadu_si512(block + at * 16);
        unrolled<M>(INT8_MOE_EACH(r) {
          int32_t four;
          __builtin_memcpy(&four, a + r * stride + at, 4);
          sum[kSums * r + j] =
              _mm512_dpbusd_epi32(sum[kSums * r + j], _mm512_set1_epi32(four), w);
        });
      });
    }
    unrolled<M>(INT8_MOE_EACH(r) {
      __m512i whole = sum[kSums * r];
      if (kSums == 4) {
        whole = _mm512_add_epi32(_mm512_add_epi32(whole, sum[kSums * r + kSums / 4]),
                                 _mm512_add_epi32(sum[kSums * r + kSums / 2],
                                                  sum[kSums * r + kSums - 1]));
      }
      _mm512_storeu_si512(c + r * 32, whole);
    });
  }
}

using VnniRows = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int32_t*);

template <bool kFirst, int... M>
constexpr std::array<VnniRows, sizeof...(M)> vnni_of(std::integer_sequence<int, M...>) {
  return {(M == 0 || M >= kMostWhole ? vnni_halves<M + 1> : vnni_some<M + 1, kFirst>)...};
}

inline void vnni_rows(const uint8_t* a, int64_t stride, const int8_t* block,
                      int64_t k, int64_t m, int32_t* c) {
  static constexpr auto kFirst =
      vnni_of<true>(std::make_integer_sequence<int, kMostHalf>());
  static constexpr auto kLater =
      vnni_of<false>(std::make_integer_sequence<int, kMostWhole>());
  if (m <= kMostHalf) {
    if (m > 0) kFirst[m - 1](a, stride, block, k, c);
    return;
  }
  const int64_t passes = (m + kMostWhole - 1) / kMostWhole;
  for (int64_t pass = 0; pass < passes; ++pass) {
    // equal shares: 37 rows are 10, 9, 9 and 9, not 12, 12, 12 and 1
    const int64_t n = (m + passes - pass - 1) / (passes - pass);
    (pass == 0 ? kFirst[n - 1] : kLater[n - 1])(a, stride, block, k, c);
    a += n * stride;
    c += n * 32;
    m -= n;
  }
}

}  // namespace
}  // namespace int8_moe
