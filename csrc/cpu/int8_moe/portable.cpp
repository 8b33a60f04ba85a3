// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
#include <cstdint>

namespace int8_moe {
namespace {

struct Dot {
  static constexpr int kOffset = 0;
  static constexpr int kRowsRead = 1;
  static void end() {}

  static void rows(const uint8_t* a, int64_t stride, const int8_t* block,
                   int64_t k, int64_t m, int32_t* c) {
    for (int64_t r = 0; r < m; ++r) {
      const int8_t* x = reinterpret_cast<const int8_t*>(a + r * stride);
      int32_t sum[32] = {};
      for (int64_t i = 0; i < k; i += 4) {
        for (int half = 0; half < 2; ++half) {
          const int8_t* w = block + (half * k + i) * 16;
          for (int j = 0; j < 16; ++j) {
            sum[16 * half + j] += x[i] * w[4 * j] + x[i + 1] * w[4 * j + 1] +
                                  x[i + 2] * w[4 * j + 2] + x[i + 3] * w[4 * j + 3];
          }
        }
      }
      for (int j = 0; j < 32; ++j) c[r * 32 + j] = sum[j];
    }
  }
};

}  // namespace
}  // namespace int8_moe

#include "kernel.h"

namespace int8_moe {

extern const Isa kPortable = {"portable", [] { return true; }, experts, route};

}  // namespace int8_moe
