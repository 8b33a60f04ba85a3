// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// Conversions of float16 and bfloat16 from and to float32. They round as
// PyTorch does.
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
  const uint32_t magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) {  // infinity or NaN
    return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  }
  // float32's exponent bias is larger by 112. The product with 2^112 corrects
  // it, and normalizes subnormals.
  constexpr uint32_t kTwoTo112 = 0x77800000;
  return from_bits(sign |
                   to_bits(from_bits(magnitude << 13) * from_bits(kTwoTo112)));
}

inline uint16_t float_to_half(float f) {
  constexpr uint32_t kInfinity = 0x7f800000;
  constexpr uint32_t kRoundsToInfinity = 0x477ff000;  // 65520
  constexpr uint32_t kSmallestNormal = 0x38800000;    // 2^-14
  constexpr uint32_t kExponentBias = 112u << 23;
  const uint32_t sign = to_bits(f) >> 16 & 0x8000;
  const uint32_t magnitude = to_bits(f) & 0x7fffffff;
  if (magnitude > kInfinity) return sign | 0x7e00;
  if (magnitude >= kRoundsToInfinity) return sign | 0x7c00;
  if (magnitude < kSmallestNormal) {
    // A unit in the last place of 0.5f is the smallest subnormal of float16, so
    // the sum is rounded to one.
    return sign | (to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f));
  }
  const uint32_t odd = magnitude >> 13 & 1;
  return sign | ((magnitude - kExponentBias + 0xfff + odd) >> 13);
}

inline uint16_t float_to_bfloat16(float f) {
  const uint32_t word = to_bits(f);
  if ((word & 0x7fffffff) > 0x7f800000) return (word >> 16) | 0x40;  // NaN
  return (word + 0x7fff + (word >> 16 & 1)) >> 16;
}

// Converts n values.
inline void convert_to_float(const void* from, Dtype dtype, int64_t n,
                             float* to) {
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
      const auto* halves = reinterpret_cast<const __m128i*>(source + i);
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(halves)));
    }
#endif
    for (; i < n; ++i) to[i] = half_to_float(source[i]);
  }
}

// Converts n values.
inline void convert_from_float(const float* from, Dtype dtype, int64_t n,
                               void* to) {
  if (dtype == Dtype::f32) {
    std::memcpy(to, from, n * sizeof(float));
  } else if (dtype == Dtype::bf16) {
    uint16_t* target = static_cast<uint16_t*>(to);
    int64_t i = 0;
#if defined(__AVX512F__)
    // float_to_bfloat16, kLanes values at a time
    const __m512i lowest_bit = _mm512_set1_epi32(1);
    const __m512i rounding_bias = _mm512_set1_epi32(0x7fff);
    const __m512i quiet_bit = _mm512_set1_epi32(0x40);
    for (; i + kLanes <= n; i += kLanes) {
      const __m512 f = _mm512_loadu_ps(from + i);
      const __m512i words = _mm512_castps_si512(f);
      const __m512i high = _mm512_srli_epi32(words, 16);
      const __m512i odd = _mm512_and_si512(high, lowest_bit);
      const __m512i sums =
          _mm512_add_epi32(words, _mm512_add_epi32(rounding_bias, odd));
      const __m512i bfloats = _mm512_mask_or_epi32(
          _mm512_srli_epi32(sums, 16), _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q),
          high, quiet_bit);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i),
                          _mm512_cvtepi32_epi16(bfloats));
    }
#endif
    for (; i < n; ++i) target[i] = float_to_bfloat16(from[i]);
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

inline int64_t element_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

}  // namespace
}  // namespace int8_moe
