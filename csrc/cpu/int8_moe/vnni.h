// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// Rows of unsigned activations times a block, with vpdpbusd.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "unrolled.h"

namespace int8_moe {
namespace {

// Rows in registers: 32 of them hold the sums, the weight and an activation.
constexpr int kMostRows = 12;
// Some more take turns at so much of K, which stays in the first-level cache.
constexpr int64_t kSlab = 256;
constexpr int64_t kMostInTurns = 28;
// How far ahead of its first use the weight is asked for: a slab of 16 columns.
constexpr int64_t kAhead = kSlab * 16;

// How far from what is read of each half, in bytes, the next is asked for; `last`
// more at the end of a block, which is the next one's start.
struct Ahead {
  int64_t left, right, last;
};

// M rows times both halves of a block, from `begin` to `end` of K; c is added to
// unless begin is 0.
template <int M, bool kAsk>
void vnni_some(const uint8_t* a, int64_t stride, const int8_t* block, int64_t k,
               int64_t begin, int64_t end, const Ahead& ahead, int32_t* c) {
  __m512i left[M], right[M];
  if (begin == 0) {
    unrolled<M>(INT8_MOE_EACH(r) { left[r] = right[r] = _mm512_setzero_si512(); });
  } else {
    unrolled<M>(INT8_MOE_EACH(r) {
      left[r] = _mm512_loadu_si512(c + r * 32);
      right[r] = _mm512_loadu_si512(c + r * 32 + 16);
    });
  }
  // A pointer to each third row, of which the compiler is kept from knowing that they
  // are apart by the stride: with an offset a row it runs out of registers.
  const uint8_t* third[(M + 2) / 3];
  unrolled<(M + 2) / 3>(INT8_MOE_EACH(g) { third[g] = a + begin + 3 * g * stride; });
  const int8_t *w = block + begin * 16, *const stop = block + end * 16;
  const auto some = [&](const int8_t* until, int64_t next_left,
                        int64_t next_right) __attribute__((always_inline)) {
    for (; w < until; w += 64) {
      const __m512i w0 = _mm512_loadu_si512(w);
      const __m512i w1 = _mm512_loadu_si512(w + k * 16);
      if (kAsk) {
        _mm_prefetch(w + next_left, _MM_HINT_T0);
        _mm_prefetch(w + next_right, _MM_HINT_T0);
      }
      unrolled<M>(INT8_MOE_EACH(r) {
        int32_t four;
        __builtin_memcpy(&four, third[r / 3] + r % 3 * stride, 4);
        const __m512i x = _mm512_set1_epi32(four);
        left[r] = _mm512_dpbusd_epi32(left[r], x, w0);
        right[r] = _mm512_dpbusd_epi32(right[r], x, w1);
      });
      unrolled<(M + 2) / 3>(INT8_MOE_EACH(g) {
        third[g] += 4;
        asm("" : "+r"(third[g]));
      });
    }
  };
  if (kAsk) {
    const int64_t next_right = k * 16 + ahead.right;
    some(std::min(stop, block + (k - kSlab) * 16), ahead.left, next_right);
    some(stop, ahead.left + ahead.last, next_right + ahead.last);
  } else {
    some(stop, 0, 0);
  }
  unrolled<M>(INT8_MOE_EACH(r) {
    _mm512_storeu_si512(c + r * 32, left[r]);
    _mm512_storeu_si512(c + r * 32 + 16, right[r]);
  });
}

// One row and half a block. Four sums, to wait for none.
inline void vnni_row(const uint8_t* a, const int8_t* half, int64_t k, int32_t* c) {
  __m512i sum[4];
  unrolled<4>(INT8_MOE_EACH(j) { sum[j] = _mm512_setzero_si512(); });
  for (int64_t i = 0; i < k; i += 16) {
    unrolled<4>(INT8_MOE_EACH(j) {
      const int8_t* w = half + (i + 4 * j) * 16;
      _mm_prefetch(w + kAhead, _MM_HINT_T0);
      int32_t four;
      __builtin_memcpy(&four, a + i + 4 * j, 4);
      sum[j] = _mm512_dpbusd_epi32(sum[j], _mm512_set1_epi32(four),
                                   _mm512_loadu_si512(w));
    });
  }
  _mm512_storeu_si512(c, _mm512_add_epi32(_mm512_add_epi32(sum[0], sum[1]),
                                          _mm512_add_epi32(sum[2], sum[3])));
}

using VnniSome = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int64_t,
                          int64_t, const Ahead&, int32_t*);

template <bool kAsk, int... M>
constexpr std::array<VnniSome, sizeof...(M)> vnni_of(std::integer_sequence<int, M...>) {
  return {vnni_some<M + 1, kAsk>...};
}

inline void vnni_rows(const uint8_t* a, int64_t stride, const int8_t* block,
                      int64_t k, int64_t m, int32_t* c) {
  static constexpr auto kAsking =
      vnni_of<true>(std::make_integer_sequence<int, kMostRows>());
  static constexpr auto kLater =
      vnni_of<false>(std::make_integer_sequence<int, kMostRows>());
  if (m == 1) {
    // one half after the other: the weight comes from memory in order
    vnni_row(a, block, k, c);
    return vnni_row(a, block + k * 16, k, c + 16);
  }
  const int64_t passes = (m + kMostRows - 1) / kMostRows;
  const int64_t slab = passes > 1 && m <= kMostInTurns ? kSlab : k;
  for (int64_t begin = 0; begin < k; begin += slab) {
    const int64_t end = std::min(k, begin + slab);
    int64_t row = 0;
    for (int64_t pass = 0; pass < passes; ++pass) {
      // equal shares: 37 rows are 10, 9, 9 and 9, not 12, 12, 12 and 1
      const int64_t n = (m - row + passes - pass - 1) / (passes - pass);
      // a half each, by the first two that take turns
      const Ahead ahead = {pass == 0 ? kAhead : 0,
                           pass == (slab < k ? 1 : 0) ? kAhead : 0, k * 16};
      const bool asks = ahead.left + ahead.right > 0;
      (asks ? kAsking : kLater)[n - 1](a + row * stride, stride, block, k, begin, end,
                                       ahead, c + row * 32);
      row += n;
    }
  }
}

}  // namespace
}  // namespace int8_moe
