// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
#include <arm_neon.h>

#include <algorithm>
#include <cstdint>

#if defined(__linux__)
  #include <asm/hwcap.h>
  #include <sys/auxv.h>
#endif

#include "experts.h"
#include "microkernel.h"
#include "neon_dotprod.h"
#include "router.h"
#include "targets.h"
#include "unrolled.h"

namespace int8_moe {
namespace {

// smmla: two rows times two columns, eight values of K each.
struct NeonI8mm {
  static constexpr int kOffset = 0;
  static constexpr int kReadsRows = 2;
  static constexpr int kPairs = 3;  // of rows, whose sums stay in registers
  static void end() {}

  // Pairs of rows times half a block.
  template <int Pairs>
  static void microkernel(const uint8_t* a, int64_t stride, const int8_t* half,
                          int64_t k, int32_t* c) {
    int32x4_t sums[Pairs][8];  // of columns 0, 1; 2, 3; ..., first the first row's
    unrolled<Pairs>(INT8_MOE_EACH(p) {
      unrolled<8>(INT8_MOE_EACH(j) { sums[p][j] = vdupq_n_s32(0); });
    });
    const int8_t* x = reinterpret_cast<const int8_t*>(a);
    for (int64_t i = 0; i < k; i += 8, x += 8, half += 8 * kHalf) {
      int8x16_t rows[Pairs];
      unrolled<Pairs>(INT8_MOE_EACH(p) {
        rows[p] = vcombine_s8(vld1_s8(x + 2 * p * stride),
                              vld1_s8(x + (2 * p + 1) * stride));
      });
      unrolled<4>(INT8_MOE_EACH(j) {
        // four columns, of each the next four values of K and those after them
        const int32x4_t near = vreinterpretq_s32_s8(vld1q_s8(half + 16 * j));
        const int32x4_t far = vreinterpretq_s32_s8(vld1q_s8(half + 4 * kHalf + 16 * j));
        const int8x16_t left = vreinterpretq_s8_s32(vzip1q_s32(near, far));
        const int8x16_t right = vreinterpretq_s8_s32(vzip2q_s32(near, far));
        unrolled<Pairs>(INT8_MOE_EACH(p) {
          sums[p][2 * j] = vmmlaq_s32(sums[p][2 * j], rows[p], left);
          sums[p][2 * j + 1] = vmmlaq_s32(sums[p][2 * j + 1], rows[p], right);
        });
      });
    }
    unrolled<Pairs>(INT8_MOE_EACH(p) {
      unrolled<4>(INT8_MOE_EACH(j) {
        const int32x4_t left = sums[p][2 * j], right = sums[p][2 * j + 1];
        vst1q_s32(c + 2 * p * kNR + 4 * j,
                  vcombine_s32(vget_low_s32(left), vget_low_s32(right)));
        vst1q_s32(c + (2 * p + 1) * kNR + 4 * j,
                  vcombine_s32(vget_high_s32(left), vget_high_s32(right)));
      });
    });
  }

  static void gemm(const uint8_t* a, int64_t stride, const int8_t* block, int64_t k,
                   int64_t m, const int8_t*, int32_t* c) {
    if (m == 1) return int8_moe::gemm<NeonDotprod>(a, stride, block, k, m, c);
    const int64_t pairs = (m + 1) / 2;
    for (int half = 0; half < 2; ++half, block += k * kHalf) {
      for (int64_t p = 0; p < pairs; p += kPairs) {
        const uint8_t* rows = a + 2 * p * stride;
        int32_t* to = c + 2 * p * kNR + half * kHalf;
        switch (std::min<int64_t>(kPairs, pairs - p)) {
          case 1: microkernel<1>(rows, stride, block, k, to); break;
          case 2: microkernel<2>(rows, stride, block, k, to); break;
          case 3: microkernel<3>(rows, stride, block, k, to); break;
        }
      }
    }
  }

  static void gemv(const uint8_t* a, const int8_t* half, int64_t k, int32_t* c) {
    int8_moe::gemv<NeonDotprod>(a, half, k, c);
  }
};

bool i8mm_supported() {
#if defined(__linux__) && defined(HWCAP2_I8MM)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0 &&
         (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0;
#else
  return false;
#endif
}

}  // namespace

extern const Isa INT8_MOE_TARGET(neon_i8mm) = {
    "neon_i8mm", i8mm_supported, run_experts<NeonI8mm>, run_router};

}  // namespace int8_moe
