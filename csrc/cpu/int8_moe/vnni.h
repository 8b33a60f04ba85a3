// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// Rows of unsigned activations times a block, with vpdpbusd.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace int8_moe {
namespace {

// How far ahead of its use a block is asked for, bytes: one row leaves no time to.
constexpr int64_t kAhead = 4096;

template <int M>
inline void vnni_some(const uint8_t* a, int64_t stride, const int8_t* block,
                      int64_t k, int32_t* c) {
  __m512i sum[M][2];
  for (auto& row : sum) row[0] = row[1] = _mm512_setzero_si512();
  for (int64_t i = 0; i < k; i += 4) {
    const int8_t* w = block + i * 32;
    const __m512i left = _mm512_loadu_si512(w), right = _mm512_loadu_si512(w + 64);
#pragma GCC unroll 16
    for (int r = 0; r < M; ++r) {
      int32_t four;
      __builtin_memcpy(&four, a + r * stride + i, 4);
      const __m512i x = _mm512_set1_epi32(four);
      sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], x, left);
      sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], x, right);
    }
  }
  for (int r = 0; r < M; ++r) {
    _mm512_storeu_si512(c + r * 32, sum[r][0]);
    _mm512_storeu_si512(c + r * 32 + 16, sum[r][1]);
  }
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

inline void vnni_rows(const uint8_t* a, int64_t stride, const int8_t* block,
                      int64_t k, int64_t m, int32_t* c) {
  constexpr int kMost = 12;
  // equal shares: 13 rows are 7 and 6, not 12 and 1
  for (int64_t parts = (m + kMost - 1) / kMost; parts > 0; --parts) {
    const int64_t n = (m + parts - 1) / parts;
    switch (n) {
      case 1: vnni_one(a, block, k, c); break;
      case 2: vnni_some<2>(a, stride, block, k, c); break;
      case 3: vnni_some<3>(a, stride, block, k, c); break;
      case 4: vnni_some<4>(a, stride, block, k, c); break;
      case 5: vnni_some<5>(a, stride, block, k, c); break;
      case 6: vnni_some<6>(a, stride, block, k, c); break;
      case 7: vnni_some<7>(a, stride, block, k, c); break;
      case 8: vnni_some<8>(a, stride, block, k, c); break;
      case 9: vnni_some<9>(a, stride, block, k, c); break;
      case 10: vnni_some<10>(a, stride, block, k, c); break;
      case 11: vnni_some<11>(a, stride, block, k, c); break;
      case 12: vnni_some<12>(a, stride, block, k, c); break;
    }
    a += n * stride;
    c += n * 32;
    m -= n;
  }
}

}  // namespace
}  // namespace int8_moe
