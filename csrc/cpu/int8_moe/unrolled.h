// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// Loops that are unrolled in source.
#pragma once

#include <utility>

namespace int8_moe {
namespace {

template <typename F, int... I>
inline __attribute__((always_inline)) void unroll(
    const F& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>()), ...);
}

// Calls body(0), body(1), ... body(N - 1), each with a constant. An array of
// vectors stays in registers where every index is a constant. The compiler
// unrolls a loop too late for that.
template <int N, typename F>
inline __attribute__((always_inline)) void unroll(const F& body) {
  unroll(body, std::make_integer_sequence<int, N>());
}

}  // namespace
}  // namespace int8_moe

// The head of a body for unroll: unroll<4>(INT8_MOE_EACH(i) { ... });
#define INT8_MOE_EACH(i) [&](auto i) __attribute__((always_inline))
