// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// Rows of unsigned activations times a block, with vpdpbusd.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "unrolled.h"

namespace int8_moe {
namespace {

// How far ahead of its use a block is asked for, bytes: one row leaves no time to.
constexpr int64_t kAhead = 4096;

// ahead: what lies so far behind the block is asked for, kLines of two lines a step.
template <int M, int kLines>
inline void vnni_some(const uint8_t* a, int64_t stride, const int8_t* block,
                      int64_t k, int64_t ahead, int32_t* c) {
  __m512i left[M], right[M];
  unrolled<M>(INT8_MOE_EACH(r) { left[r] = right[r] = _mm512_setzero_si512(); });
  for (int64_t i = 0; i < k; i += 4) {
    const int8_t* w = block + i * 32;
    const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
    if (kLines > 0) _mm_prefetch(w + ahead, _MM_HINT_T1);
    if (kLines > 1) _mm_prefetch(w + ahead + 64, _MM_HINT_T1);
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

// One row: as fast as memory gives, so more sums at once, and asked for early.
inline void vnni_one(const uint8_t* a, const int8_t* block, int64_t k, int32_t* c) {
  __m512i sum[8];
  for (auto& s : sum) s = _mm512_setzero_si512();
  for (int64_t i = 0; i < k; i += 16) {
    const int8_t* w = block + i * 32;
    for (int j = 0; j < 4; ++j) {
      _mm_prefetch(w + kAhead + j * 128, _MM_HINT_T0);
      _mm_prefetch(w + kAhead + j * 128 + 64, _MM_HINT_T0);
      int32_t four;
      __builtin_memcpy(&four, a + i + 4 * j, 4);
      const __m512i x = _mm512_set1_epi32(four);
      sum[2 * j] = _mm512_dpbusd_epi32(sum[2 * j], x,
                                       _mm512_loadu_si512(w + j * 128));
      sum[2 * j + 1] = _mm512_dpbusd_epi32(sum[2 * j + 1], x,
                                           _mm512_loadu_si512(w + j * 128 + 64));
    }
  }
  for (int half = 0; half < 2; ++half) {
    _mm512_storeu_si512(
        c + half * 16,
        _mm512_add_epi32(_mm512_add_epi32(sum[half], sum[2 + half]),
                         _mm512_add_epi32(sum[4 + half], sum[6 + half])));
  }
}

template <int kLines>
inline void vnni_rows(const uint8_t* a, int64_t stride, const int8_t* block,
                      int64_t k, int64_t n, int64_t ahead, int32_t* c) {
  switch (n) {
    case 1: return vnni_one(a, block, k, c);
    case 2: return vnni_some<2, kLines>(a, stride, block, k, ahead, c);
    case 3: return vnni_some<3, kLines>(a, stride, block, k, ahead, c);
    case 4: return vnni_some<4, kLines>(a, stride, block, k, ahead, c);
    case 5: return vnni_some<5, kLines>(a, stride, block, k, ahead, c);
    case 6: return vnni_some<6, kLines>(a, stride, block, k, ahead, c);
    case 7: return vnni_some<7, kLines>(a, stride, block, k, ahead, c);
    case 8: return vnni_some<8, kLines>(a, stride, block, k, ahead, c);
    case 9: return vnni_some<9, kLines>(a, stride, block, k, ahead, c);
    case 10: return vnni_some<10, kLines>(a, stride, block, k, ahead, c);
    case 11: return vnni_some<11, kLines>(a, stride, block, k, ahead, c);
    case 12: return vnni_some<12, kLines>(a, stride, block, k, ahead, c);
  }
}

// The next block comes into the cache while this one is computed with: of two
// passes over it, each asks for half.
inline void vnni_rows(const uint8_t* a, int64_t stride, const int8_t* block,
                      int64_t k, int64_t m, int32_t* c) {
  constexpr int kMost = 12;
  const int64_t passes = (m + kMost - 1) / kMost, size = k * 32;
  for (int64_t pass = 0; pass < passes; ++pass) {
    // equal shares: 13 rows are 7 and 6, not 12 and 1
    const int64_t n = (m + passes - pass - 1) / (passes - pass);
    if (passes == 1) {
      vnni_rows<2>(a, stride, block, k, n, size, c);
    } else if (pass < 2) {
      vnni_rows<1>(a, stride, block, k, n, size + 64 * pass, c);
    } else {
      vnni_rows<0>(a, stride, block, k, n, size, c);
    }
    a += n * stride;
    c += n * 32;
    m -= n;
  }
}

}  // namespace
}  // namespace int8_moe
