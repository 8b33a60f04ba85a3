// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// Floats, kLanes of them at a time: a register of AVX-512, else one, in loops that
// the compiler vectorizes. What follows is written once for both.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "int8_moe.h"

#if defined(__AVX512F__)
  #include <immintrin.h>
#endif

namespace int8_moe {
namespace {

inline uint32_t bits(float v) {
  uint32_t found;
  std::memcpy(&found, &v, 4);
  return found;
}

inline float from_bits(uint32_t v) {
  float found;
  std::memcpy(&found, &v, 4);
  return found;
}

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds half to even

// Of both: NaN stays NaN.
inline float at_most(float x, float limit) { return x > limit ? limit : x; }
inline float at_least(float x, float limit) { return x < limit ? limit : x; }
inline float magnitude(float x) { return std::fabs(x); }
inline float with_sign_of(float x, float sign) { return std::copysign(x, sign); }
// 1 / x for x that is neither infinite nor 0
inline float reciprocal(float x) { return 1.0f / x; }
inline float rounded(float x) { return (x + kRound) - kRound; }
// x * 2^n, n whole and between -126 and 127
inline float times_power_of_two(float x, float n) {
  return x * from_bits((bits(n + kRound) - 0x4B400000u + 127u) << 23);
}

#if defined(__AVX512F__)

constexpr int kLanes = 16;

struct Floats {
  __m512 v;

  Floats(__m512 v) : v(v) {}
  Floats(float all) : v(_mm512_set1_ps(all)) {}
};

inline Floats operator+(Floats a, Floats b) { return _mm512_add_ps(a.v, b.v); }
inline Floats operator-(Floats a, Floats b) { return _mm512_sub_ps(a.v, b.v); }
inline Floats operator*(Floats a, Floats b) { return _mm512_mul_ps(a.v, b.v); }
inline Floats operator/(Floats a, Floats b) { return _mm512_div_ps(a.v, b.v); }
inline Floats operator-(Floats a) {
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a.v), sign));
}
// The second operand is the result where one is NaN.
inline Floats at_most(Floats x, float limit) {
  return _mm512_min_ps(_mm512_set1_ps(limit), x.v);
}
inline Floats at_least(Floats x, float limit) {
  return _mm512_max_ps(_mm512_set1_ps(limit), x.v);
}
inline Floats magnitude(Floats x) { return _mm512_abs_ps(x.v); }
inline Floats with_sign_of(Floats x, Floats sign) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
      mask, _mm512_castps_si512(sign.v), _mm512_castps_si512(x.v), 0xCA));
}
// An estimate of 14 bits, and a step of Newton's.
inline Floats reciprocal(Floats x) {
  const __m512 y = _mm512_rcp14_ps(x.v);
  return _mm512_mul_ps(y, _mm512_fnmadd_ps(x.v, y, _mm512_set1_ps(2.0f)));
}
inline Floats rounded(Floats x) {
  return _mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Floats times_power_of_two(Floats x, Floats n) {
  return _mm512_scalef_ps(x.v, n.v);
}
inline Floats floats(const float* from) { return _mm512_loadu_ps(from); }
inline Floats floats(const int32_t* from, const int32_t* minus) {
  return _mm512_cvtepi32_ps(
      _mm512_sub_epi32(_mm512_loadu_si512(from), _mm512_loadu_si512(minus)));
}
inline void store(Floats x, float* to) { _mm512_storeu_ps(to, x.v); }

#else

constexpr int kLanes = 1;
using Floats = float;

inline float floats(const float* from) { return *from; }
inline float floats(const int32_t* from, const int32_t* minus) {
  return static_cast<float>(*from - *minus);
}
inline void store(float x, float* to) { *to = x; }

#endif

// Cephes' expf: within 2 ulp.
template <typename F>
inline F exponential(F x) {
  x = at_least(at_most(x, 88.0f), -87.0f);
  const F n = rounded(x * 1.44269504f);
  const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  return times_power_of_two(p, n);
}

template <typename F>
inline F sigmoid(F x) {
  return reciprocal(exponential(-x) + 1.0f);
}

// Abramowitz and Stegun 7.1.26: within 1.5e-7.
template <typename F>
inline F error_function(F x) {
  const F a = magnitude(x);
  const F t = F(1.0f) / (a * 0.3275911f + 1.0f);
  F p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  return with_sign_of(F(1.0f) - p * t * exponential(-a * a), x);
}

template <Activation kind, typename F>
inline F activate(F gate, F up, float limit) {
  if constexpr (kind == Activation::silu) {
    return gate * sigmoid(gate) * up;
  } else if constexpr (kind == Activation::gelu) {
    return gate * 0.5f * (error_function(gate * 0.70710678f) + 1.0f) * up;
  } else if constexpr (kind == Activation::gelu_tanh) {
    const F inner = (gate + gate * gate * gate * 0.044715f) * 0.79788456f;
    return gate * sigmoid(inner * 2.0f) * up;
  } else if constexpr (kind == Activation::swigluoai) {
    gate = at_most(gate, limit);
    up = at_least(at_most(up, limit), -limit);
    return gate * sigmoid(gate * 1.702f) * (up + 1.0f);
  } else {
    return at_most(gate * sigmoid(gate), limit) *
           at_least(at_most(up, limit), -limit);
  }
}

}  // namespace
}  // namespace int8_moe
