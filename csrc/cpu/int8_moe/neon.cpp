// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
#include <arm_neon.h>

#include <cstdint>

#include "unrolled.h"

#if defined(__linux__)
  #include <asm/hwcap.h>
  #include <sys/auxv.h>
#endif

namespace int8_moe {
namespace {

struct Dot {
  static constexpr int kOffset = 0;
  static constexpr int kRowsRead = 1;
  static void end() {}

  template <int M>
  static void some(const uint8_t* a, int64_t stride, const int8_t* half,
                   int64_t k, int32_t* c) {
    int32x4_t sum[4 * M];
    unrolled<4 * M>(INT8_MOE_EACH(j) { sum[j] = vdupq_n_s32(0); });
    for (int64_t i = 0; i < k; i += 4) {
      int8x16_t w[4];
      unrolled<4>(INT8_MOE_EACH(j) { w[j] = vld1q_s8(half + i * 16 + 16 * j); });
      unrolled<M>(INT8_MOE_EACH(r) {
        int32_t four;
        __builtin_memcpy(&four, a + r * stride + i, 4);
        const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(four));
        unrolled<4>(INT8_MOE_EACH(j) {
          sum[4 * r + j] = vdotq_s32(sum[4 * r + j], w[j], x);
        });
      });
    }
    unrolled<4 * M>(INT8_MOE_EACH(j) {
      vst1q_s32(c + j / 4 * 32 + j % 4 * 4, sum[j]);
    });
  }

  static void row(const uint8_t* a, const int8_t* half, int64_t k, int32_t* c) {
    some<1>(a, 0, half, k, c);
  }

  static void rows(const uint8_t* a, int64_t stride, const int8_t* block,
                   int64_t k, int64_t m, int32_t* c) {
    for (int half = 0; half < 2; ++half) {
      const int8_t* w = block + half * k * 16;
      int32_t* to = c + half * 16;
      int64_t r = 0;
      for (; r + 4 <= m; r += 4) some<4>(a + r * stride, stride, w, k, to + r * 32);
      for (; r < m; ++r) some<1>(a + r * stride, stride, w, k, to + r * 32);
    }
  }
};

bool dot_products() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return true;  // every Apple silicon
#endif
}

}  // namespace
}  // namespace int8_moe

#include "kernel.h"

namespace int8_moe {

extern const Isa kNeon = {"neon_dotprod", dot_products, experts, route};

}  // namespace int8_moe
