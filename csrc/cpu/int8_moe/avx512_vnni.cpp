// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
#include "vnni.h"

namespace int8_moe {
namespace {

struct Dot {
  static constexpr int kOffset = 128;
  static constexpr int kRowsRead = 1;
  static void end() {}
  static void row(const uint8_t* a, const int8_t* half, int64_t k, int32_t* c) {
    vnni_row(a, half, k, c);
  }
  static void rows(const uint8_t* a, int64_t stride, const int8_t* block,
                   int64_t k, int64_t m, int32_t* c) {
    vnni_rows(a, stride, block, k, m, c);
  }
};

}  // namespace
}  // namespace int8_moe

#include "kernel.h"

namespace int8_moe {

extern const Isa kAvx512Vnni = {
    "avx512_vnni",
    [] {
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
    },
    experts, route};

}  // namespace int8_moe
