// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// Quantization of float32 activations to INT8, row by row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "lanes.h"

namespace int8_moe {
namespace {

// The bits of the largest magnitude. The bits of floats that are not negative
// order as the floats do, with NaN above all.
inline uint32_t find_largest_magnitude(const float* x, int64_t n) {
  uint32_t largest = 0;
  int64_t i = 0;
#if defined(__AVX512F__)
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  __m512i largest_of_lanes = _mm512_setzero_si512();
  for (; i + kLanes <= n; i += kLanes) {
    largest_of_lanes = _mm512_max_epu32(
        largest_of_lanes, _mm512_and_si512(mask, _mm512_loadu_si512(x + i)));
  }
  largest = _mm512_reduce_max_epu32(largest_of_lanes);
#endif
  for (; i < n; ++i) largest = std::max(largest, to_bits(x[i]) & 0x7fffffffu);
  return largest;
}

// Quantizes x [n] to q [n_padded], whose padding becomes the zero point.
// Returns the scale: static_scale, or, where that is null, the one that makes
// the row's largest magnitude 127. A row with NaN, or with infinity and no
// static scale, has no scale: it becomes 0 and its scale NaN.
template <int kZeroPoint>
inline float quantize_row(const float* x, int64_t n, int64_t n_padded,
                          const float* static_scale, uint8_t* q) {
  constexpr uint32_t kInfinity = 0x7f800000;
  const uint32_t largest = find_largest_magnitude(x, n);
  const uint32_t first_invalid =
      static_scale == nullptr ? kInfinity : kInfinity + 1;
  float scale =
      static_scale != nullptr ? *static_scale : from_bits(largest) / 127.0f;
  if (largest >= first_invalid) {
    std::memset(q, kZeroPoint, n_padded);
    return std::numeric_limits<float>::quiet_NaN();
  }
  if (static_scale == nullptr && largest == 0) scale = 1.0f;
  // The values are divided. A reciprocal of the scale may be infinite, and
  // products with it round other values to ties.
  int64_t i = 0;
#if defined(__AVX512F__)
  const __m128i zero_point = _mm_set1_epi8(static_cast<char>(kZeroPoint));
  for (; i + kLanes <= n; i += kLanes) {
    const Floats v = clamp_max(load_floats(x + i) / scale, 127.0f);
    const __m128i values = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v.v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i),
                     _mm_xor_si128(values, zero_point));
  }
#endif
  for (; i < n; ++i) {
    const float v = clamp_min(clamp_max(x[i] / scale, 127.0f), -128.0f);
    q[i] = static_cast<uint8_t>(to_bits(v + kMagicBias) - kMagicBiasBits +
                                kZeroPoint);
  }
  std::memset(q + n, kZeroPoint, n_padded - n);
  return scale;
}

}  // namespace
}  // namespace int8_moe
