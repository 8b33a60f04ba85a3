// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
#include <cstdint>

#include "experts.h"
#include "router.h"
#include "targets.h"

namespace int8_moe {
namespace {

struct Portable {
  static constexpr int kZeroPoint = 0;
  static constexpr int kMAlign = 1;
  static void finish_thread() {}

  static void gemv(const uint8_t* a, const int8_t* half, int64_t k,
                   int32_t* c) {
    const int8_t* x = reinterpret_cast<const int8_t*>(a);
    int32_t sums[kHalf] = {};
    for (int64_t i = 0; i < k; i += kKR, half += kKR * kHalf) {
      for (int j = 0; j < kHalf; ++j) {
        const int8_t* w = half + kKR * j;
        sums[j] +=
            x[i] * w[0] + x[i + 1] * w[1] + x[i + 2] * w[2] + x[i + 3] * w[3];
      }
    }
    for (int j = 0; j < kHalf; ++j) c[j] = sums[j];
  }

  static void gemm(const uint8_t* a, int64_t a_stride, const int8_t* block,
                   int64_t k, int64_t m, const int8_t* /*next_block*/,
                   int32_t* c) {
    for (int64_t r = 0; r < m; ++r, a += a_stride, c += kNR) {
      gemv(a, block, k, c);
      gemv(a, block + k * kHalf, k, c + kHalf);
    }
  }
};

}  // namespace

extern const Isa INT8_MOE_TARGET(portable) = {
    "portable", [] { return true; }, run_experts<Portable>, run_router};

}  // namespace int8_moe
