// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
#include <cstdint>

#include "experts.h"
#include "router.h"
#include "targets.h"

namespace int8_moe {
namespace {

struct Portable {
  static constexpr int kOffset = 0;
  static constexpr int kReadsRows = 1;
  static void end() {}

  static void gemv(const uint8_t* a, const int8_t* half, int64_t k, int32_t* c) {
    const int8_t* x = reinterpret_cast<const int8_t*>(a);
    int32_t sum[kHalf] = {};
    for (int64_t i = 0; i < k; i += 4, half += 4 * kHalf) {
      for (int j = 0; j < kHalf; ++j) {
        sum[j] += x[i] * half[4 * j] + x[i + 1] * half[4 * j + 1] +
                  x[i + 2] * half[4 * j + 2] + x[i + 3] * half[4 * j + 3];
      }
    }
    for (int j = 0; j < kHalf; ++j) c[j] = sum[j];
  }

  static void gemm(const uint8_t* a, int64_t stride, const int8_t* block,
                   int64_t k, int64_t m, const int8_t*, int32_t* c) {
    for (int64_t r = 0; r < m; ++r, a += stride, c += kNR) {
      gemv(a, block, k, c);
      gemv(a, block + k * kHalf, k, c + kHalf);
    }
  }
};

}  // namespace

extern const Isa INT8_MOE_TARGET(portable) = {"portable", [] { return true; },
                                              run_experts<Portable>, run_router};

}  // namespace int8_moe
