// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
#include <cstdint>

namespace int8_moe {
namespace {

struct Dot {
  static constexpr int kOffset = 0;
  static constexpr int kRowsRead = 1;
  static void end() {}

  static void row(const uint8_t* a, const int8_t* half, int64_t k, int32_t* c) {
    const int8_t* x = reinterpret_cast<const int8_t*>(a);
    int32_t sum[16] = {};
    for (int64_t i = 0; i < k; i += 4, half += 64) {
      for (int j = 0; j < 16; ++j) {
        sum[j] += x[i] * half[4 * j] + x[i + 1] * half[4 * j + 1] +
                  x[i + 2] * half[4 * j + 2] + x[i + 3] * half[4 * j + 3];
      }
    }
    for (int j = 0; j < 16; ++j) c[j] = sum[j];
  }

  static void rows(const uint8_t* a, int64_t stride, const int8_t* block,
                   int64_t k, int64_t m, int32_t* c) {
    for (int64_t r = 0; r < m; ++r, a += stride, c += 32) {
      row(a, block, k, c);
      row(a, block + k * 16, k, c + 16);
    }
  }
};

}  // namespace
}  // namespace int8_moe

#include "kernel.h"

namespace int8_moe {

extern const Isa kPortable = {"portable", [] { return true; }, experts, route};

}  // namespace int8_moe
