// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// float32 activations to INT8, row by row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "lanes.h"

namespace int8_moe {
namespace {

// The bits of the largest magnitude: of floats that are not negative, they order as
// the values do, NaN above all.
inline uint32_t largest_magnitude(const float* x, int64_t n) {
  uint32_t largest = 0;
  int64_t i = 0;
#if defined(__AVX512F__)
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();
  for (; i + 16 <= n; i += 16) {
    most = _mm512_max_epu32(most, _mm512_and_si512(mask, _mm512_loadu_si512(x + i)));
  }
  largest = _mm512_reduce_max_epu32(most);
#endif
  for (; i < n; ++i) largest = std::max(largest, bits(x[i]) & 0x7fffffffu);
  return largest;
}

// One row of float32 to INT8, `padded` values written; returns its scale. The
// row's largest magnitude becomes 127, or `fixed` is the scale. A row that has
// no such scale (NaN, infinity) gets NaN for one.
template <int kOffset>
inline float quantize(const float* x, int64_t n, int64_t padded,
                      const float* fixed, uint8_t* q) {
  const uint32_t largest = largest_magnitude(x, n);
  const uint32_t first_bad = fixed == nullptr ? 0x7f800000u : 0x7f800001u;
  float scale = fixed != nullptr ? *fixed : from_bits(largest) / 127.0f;
  if (largest >= first_bad) {
    std::memset(q, kOffset, padded);
    return std::numeric_limits<float>::quiet_NaN();
  }
  if (fixed == nullptr && largest == 0) scale = 1.0f;
  // a division: the reciprocal may be infinite, and moves ties
  int64_t i = 0;
#if defined(__AVX512F__)
  const __m128i offset = _mm_set1_epi8(static_cast<char>(kOffset));
  for (; i + 16 <= n; i += 16) {
    const Floats v = at_most(floats(x + i) / scale, 127.0f);
    const __m128i eight = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v.v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), _mm_xor_si128(eight, offset));
  }
#endif
  for (; i < n; ++i) {
    const float v = at_least(at_most(x[i] / scale, 127.0f), -128.0f);
    q[i] = static_cast<uint8_t>(bits(v + kRound) - 0x4B400000u + kOffset);
  }
  std::memset(q + n, kOffset, padded - n);
  return scale;
}

}  // namespace
}  // namespace int8_moe
