// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
#pragma once

#include <utility>

namespace int8_moe {
namespace {

template <typename F, int... I>
inline __attribute__((always_inline)) void unrolled(
    const F& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>()), ...);
}

// body(0), body(1), ... body(N - 1), in source: arrays of vectors that are indexed
// by constants only stay in registers, which loops that are unrolled late do not
// give.
template <int N, typename F>
inline __attribute__((always_inline)) void unrolled(const F& body) {
  unrolled(body, std::make_integer_sequence<int, N>());
}

}  // namespace
}  // namespace int8_moe

#define INT8_MOE_EACH(i) [&](auto i) __attribute__((always_inline))
