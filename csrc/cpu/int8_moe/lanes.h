// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// Floats: kLanes float32 values. They are one AVX-512 register, or else a
// single float in loops that the compiler vectorizes. The functions at the end
// are written once for both.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "int8_moe.h"

#if defined(__AVX512F__)
  #include <immintrin.h>
#endif

namespace int8_moe {
namespace {

inline uint32_t to_bits(float v) { return std::bit_cast<uint32_t>(v); }
inline float from_bits(uint32_t v) { return std::bit_cast<float>(v); }

// 1.5 * 2^23. The sum with a float of a magnitude below 2^22 is rounded half to
// even, and its low bits are the integer.
constexpr float kMagicBias = 12582912.0f;
constexpr uint32_t kMagicBiasBits = 0x4B400000;

// NaN stays NaN in both.
inline float clamp_max(float x, float limit) { return x > limit ? limit : x; }
inline float clamp_min(float x, float limit) { return x < limit ? limit : x; }
inline float absolute_value(float x) { return std::fabs(x); }
inline float copy_sign(float x, float sign) { return std::copysign(x, sign); }
// 1 / x, for x that is neither infinite nor 0
inline float reciprocal(float x) { return 1.0f / x; }
inline float round_half_to_even(float x) {
  return (x + kMagicBias) - kMagicBias;
}
// x * 2^n, for an integer n from -126 to 127
inline float multiply_by_power_of_two(float x, float n) {
  const uint32_t integer = to_bits(n + kMagicBias) - kMagicBiasBits;
  return x * from_bits((integer + 127u) << 23);
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
// vminps and vmaxps return their second operand where one is NaN. So x is the
// second.
inline Floats clamp_max(Floats x, float limit) {
  return _mm512_min_ps(_mm512_set1_ps(limit), x.v);
}
inline Floats clamp_min(Floats x, float limit) {
  return _mm512_max_ps(_mm512_set1_ps(limit), x.v);
}
inline Floats absolute_value(Floats x) { return _mm512_abs_ps(x.v); }
inline Floats copy_sign(Floats x, Floats sign) {
  constexpr int kSecondWhereMaskElseThird = 0xCA;
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
      mask, _mm512_castps_si512(sign.v), _mm512_castps_si512(x.v),
      kSecondWhereMaskElseThird));
}
// An estimate of 14 bits and one Newton step
inline Floats reciprocal(Floats x) {
  const __m512 y = _mm512_rcp14_ps(x.v);
  return _mm512_mul_ps(y, _mm512_fnmadd_ps(x.v, y, _mm512_set1_ps(2.0f)));
}
inline Floats round_half_to_even(Floats x) {
  return _mm512_roundscale_ps(x.v,
                              _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Floats multiply_by_power_of_two(Floats x, Floats n) {
  return _mm512_scalef_ps(x.v, n.v);
}
inline Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
// a - b, as floats
inline Floats load_difference(const int32_t* a, const int32_t* b) {
  return _mm512_cvtepi32_ps(
      _mm512_sub_epi32(_mm512_loadu_si512(a), _mm512_loadu_si512(b)));
}
inline void store_floats(Floats x, float* to) { _mm512_storeu_ps(to, x.v); }

#else

constexpr int kLanes = 1;
using Floats = float;

inline float load_floats(const float* from) { return *from; }
inline float load_difference(const int32_t* a, const int32_t* b) {
  return static_cast<float>(*a - *b);
}
inline void store_floats(float x, float* to) { *to = x; }

#endif

// Cephes' expf, within 2 ulp
template <typename F>
inline F exponential(F x) {
  x = clamp_min(clamp_max(x, 88.0f), -87.0f);
  const F n = round_half_to_even(x * 1.44269504f);
  const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  return multiply_by_power_of_two(p, n);
}

template <typename F>
inline F sigmoid(F x) {
  return reciprocal(exponential(-x) + 1.0f);
}

// Abramowitz and Stegun 7.1.26, within 1.5e-7
template <typename F>
inline F error_function(F x) {
  const F a = absolute_value(x);
  const F t = F(1.0f) / (a * 0.3275911f + 1.0f);
  F p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  return copy_sign(F(1.0f) - p * t * exponential(-a * a), x);
}

template <Activation kActivation, typename F>
inline F activate(F gate, F up, float limit) {
  if constexpr (kActivation == Activation::silu) {
    return gate * sigmoid(gate) * up;
  } else if constexpr (kActivation == Activation::gelu) {
    return gate * 0.5f * (error_function(gate * 0.70710678f) + 1.0f) * up;
  } else if constexpr (kActivation == Activation::gelu_tanh) {
    const F inner = (gate + gate * gate * gate * 0.044715f) * 0.79788456f;
    return gate * sigmoid(inner * 2.0f) * up;
  } else if constexpr (kActivation == Activation::swigluoai) {
    gate = clamp_max(gate, limit);
    up = clamp_min(clamp_max(up, limit), -limit);
    return gate * sigmoid(gate * 1.702f) * (up + 1.0f);
  } else {
    static_assert(kActivation == Activation::swiglustep);
    return clamp_max(gate * sigmoid(gate), limit) *
           clamp_min(clamp_max(up, limit), -limit);
  }
}

}  // namespace
}  // namespace int8_moe
