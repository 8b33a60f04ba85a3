// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// float16 and bfloat16 from and to float32, as PyTorch rounds them.
#pragma once

#include <cstdint>
#include <cstring>

#include "int8_moe.h"
#include "lanes.h"

#if defined(__F16C__)
  #include <immintrin.h>
#endif

namespace int8_moe {
namespace {

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t rest = h & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // an exponent too high by 2^112, subnormals included
  return from_bits(sign | bits(from_bits(rest << 13) * from_bits(0x77800000)));
}

inline uint16_t float_to_half(float f) {
  const uint32_t sign = bits(f) >> 16 & 0x8000, rest = bits(f) & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7e00;
  if (rest >= 0x477ff000) return sign | 0x7c00;
  if (rest < 0x38800000) {  // subnormal: the addition rounds
    return sign | (bits(from_bits(rest) + 0.5f) - bits(0.5f));
  }
  return sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

inline uint16_t float_to_bfloat(float f) {
  const uint32_t all = bits(f);
  if ((all & 0x7fffffff) > 0x7f800000) return (all >> 16) | 0x40;
  return (all + 0x7fff + (all >> 16 & 1)) >> 16;
}

inline void to_float(const void* from, Dtype dtype, int64_t n, float* to) {
  if (dtype == Dtype::f32) {
    std::memcpy(to, from, n * sizeof(float));
  } else if (dtype == Dtype::bf16) {
    const uint16_t* source = static_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < n; ++i) {
      to[i] = from_bits(static_cast<uint32_t>(source[i]) << 16);
    }
  } else {
    const uint16_t* source = static_cast<const uint16_t*>(from);
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(
                                   reinterpret_cast<const __m128i*>(source + i))));
    }
#endif
    for (; i < n; ++i) to[i] = half_to_float(source[i]);
  }
}

inline void from_float(const float* from, Dtype dtype, int64_t n, void* to) {
  if (dtype == Dtype::f32) {
    std::memcpy(to, from, n * sizeof(float));
  } else if (dtype == Dtype::bf16) {
    uint16_t* target = static_cast<uint16_t*>(to);
    int64_t i = 0;
#if defined(__AVX512F__)
    const __m512i one = _mm512_set1_epi32(1), bias = _mm512_set1_epi32(0x7fff);
    for (; i + 16 <= n; i += 16) {
      const __m512 f = _mm512_loadu_ps(from + i);
      const __m512i all = _mm512_castps_si512(f), high = _mm512_srli_epi32(all, 16);
      const __m512i odd = _mm512_and_si512(high, one);
      __m512i found = _mm512_add_epi32(all, _mm512_add_epi32(bias, odd));
      found = _mm512_mask_or_epi32(_mm512_srli_epi32(found, 16),
                                   _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q), high,
                                   _mm512_set1_epi32(0x40));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i),
                          _mm512_cvtepi32_epi16(found));
    }
#endif
    for (; i < n; ++i) target[i] = float_to_bfloat(from[i]);
  } else {
    uint16_t* target = static_cast<uint16_t*>(to);
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + i),
                                       _MM_FROUND_TO_NEAREST_INT));
    }
#endif
    for (; i < n; ++i) target[i] = float_to_half(from[i]);
  }
}

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

}  // namespace
}  // namespace int8_moe
