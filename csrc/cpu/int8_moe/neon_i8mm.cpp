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

// smmla multiplies two rows by two columns, eight values of K each.
struct NeonI8mm {
  static constexpr int kZeroPoint = 0;
  static constexpr int kMAlign = 2;
  static constexpr int kPairs = 3;  // of rows, whose sums stay in registers
  static constexpr int kSmmlaK = 8;
  static void finish_thread() {}

  // Pairs of rows times half a block.
  template <int Pairs>
  static void microkernel(const uint8_t* a, int64_t a_stride,
                          const int8_t* half, int64_t k, int32_t* c) {
    // Register j has columns 2 * j and 2 * j + 1 of a pair's first row, then of
    // its second.
    int32x4_t sums[Pairs][kHalf / 2];
    unroll<Pairs>(INT8_MOE_EACH(p) {
      unroll<kHalf / 2>(INT8_MOE_EACH(j) { sums[p][j] = vdupq_n_s32(0); });
    });
    const int8_t* x = reinterpret_cast<const int8_t*>(a);
    for (int64_t i = 0; i < k;
         i += kSmmlaK, x += kSmmlaK, half += kSmmlaK * kHalf) {
      int8x16_t rows[Pairs];
      unroll<Pairs>(INT8_MOE_EACH(p) {
        rows[p] = vcombine_s8(vld1_s8(x + 2 * p * a_stride),
                              vld1_s8(x + (2 * p + 1) * a_stride));
      });
      unroll<kHalf / 4>(INT8_MOE_EACH(j) {
        // Four columns: the first and the next kKR values of K of each.
        const int8_t* w = half + 4 * kKR * j;
        const int32x4_t first = vreinterpretq_s32_s8(vld1q_s8(w));
        const int32x4_t next = vreinterpretq_s32_s8(vld1q_s8(w + kKR * kHalf));
        const int8x16_t left = vreinterpretq_s8_s32(vzip1q_s32(first, next));
        const int8x16_t right = vreinterpretq_s8_s32(vzip2q_s32(first, next));
        unroll<Pairs>(INT8_MOE_EACH(p) {
          sums[p][2 * j] = vmmlaq_s32(sums[p][2 * j], rows[p], left);
          sums[p][2 * j + 1] = vmmlaq_s32(sums[p][2 * j + 1], rows[p], right);
        });
      });
    }
    unroll<Pairs>(INT8_MOE_EACH(p) {
      unroll<kHalf / 4>(INT8_MOE_EACH(j) {
        const int32x4_t left = sums[p][2 * j], right = sums[p][2 * j + 1];
        vst1q_s32(c + 2 * p * kNR + 4 * j,
                  vcombine_s32(vget_low_s32(left), vget_low_s32(right)));
        vst1q_s32(c + (2 * p + 1) * kNR + 4 * j,
                  vcombine_s32(vget_high_s32(left), vget_high_s32(right)));
      });
    });
  }

  static void gemm(const uint8_t* a, int64_t a_stride, const int8_t* block,
                   int64_t k, int64_t m, const int8_t* /*next_block*/,
                   int32_t* c) {
    if (m == 1) return int8_moe::gemm<NeonDotprod>(a, a_stride, block, k, m, c);
    const int64_t pairs = (m + 1) / 2;
    for (int half = 0; half < 2; ++half, block += k * kHalf) {
      for (int64_t p = 0; p < pairs; p += kPairs) {
        const uint8_t* rows = a + 2 * p * a_stride;
        int32_t* sums = c + 2 * p * kNR + half * kHalf;
        switch (std::min<int64_t>(kPairs, pairs - p)) {
          case 1:
            microkernel<1>(rows, a_stride, block, k, sums);
            break;
          case 2:
            microkernel<2>(rows, a_stride, block, k, sums);
            break;
          case 3:
            microkernel<3>(rows, a_stride, block, k, sums);
            break;
        }
      }
    }
  }

  static void gemv(const uint8_t* a, const int8_t* half, int64_t k,
                   int32_t* c) {
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
