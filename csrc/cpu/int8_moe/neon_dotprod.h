// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "microkernel.h"

namespace int8_moe {
namespace {

struct NeonDotprod {
  using Vector = int32x4_t;
  static constexpr int kColumns = 4, kMR = 6, kNR = kHalf;
  static constexpr int kAccumulators = 8, kZeroPoint = 0;
  // vdotq_laneq_s32 takes one of four groups of a row.
  static constexpr int kGroups = 4;

  static Vector zero() { return vdupq_n_s32(0); }
  static Vector load_weights(const int8_t* b) {
    return vreinterpretq_s32_s8(vld1q_s8(b));
  }
  static Vector broadcast(const uint8_t* a) {
    return vreinterpretq_s32_u8(vld1q_u8(a));
  }
  template <int G>
  static Vector dot(Vector sum, Vector w, Vector x) {
    return vdotq_laneq_s32(sum, vreinterpretq_s8_s32(w),
                           vreinterpretq_s8_s32(x), G);
  }
  static Vector add(Vector a, Vector b) { return vaddq_s32(a, b); }
  static Vector load_sums(const int32_t* c) { return vld1q_s32(c); }
  static void store_sums(Vector sum, int32_t* c) { vst1q_s32(c, sum); }
};

}  // namespace
}  // namespace int8_moe
