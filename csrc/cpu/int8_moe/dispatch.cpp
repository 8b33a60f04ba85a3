// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
#include <cstring>

#include "int8_moe.h"

namespace int8_moe {

extern const Isa kPortable, kAvx2, kAvx512, kAvx512Vnni, kAmx, kNeon;

const Isa* const kIsas[] = {
#if defined(INT8_MOE_X86)
    &kAmx, &kAvx512Vnni, &kAvx512, &kAvx2,
#elif defined(INT8_MOE_NEON)
    &kNeon,
#endif
    &kPortable,
};
const size_t kIsaCount = sizeof(kIsas) / sizeof(kIsas[0]);

namespace {

struct Packing {
  const int8_t* weight;
  int64_t experts, rows, k;
  const int32_t* order;
  int64_t columns;
  int8_t* packed;
  int32_t* sums;
  int count;

  void block(int64_t expert, int64_t index) const {
    const int64_t padded = round_up(k, kGroup);
    int8_t* to = packed + (expert * columns + index * kBlock) * padded;
    std::memset(to, 0, kBlock * padded);
    for (int64_t j = 0; j < kBlock; ++j) {
      const int64_t column = index * kBlock + j;
      int32_t sum = 0;
      if (order[column] >= 0) {
        const int8_t* from = weight + (expert * rows + order[column]) * k;
        for (int64_t i = 0; i < k; ++i) {
          to[(i / 4 * kBlock + j) * 4 + i % 4] = from[i];
          sum += from[i];
        }
      }
      sums[expert * columns + column] = 128 * sum;
    }
  }
};

}  // namespace

void pack(const int8_t* weight, int64_t experts, int64_t rows, int64_t k,
          const int32_t* order, int64_t columns, int8_t* packed, int32_t* sums,
          const Threads& threads) {
  Packing packing = {weight,  experts, rows, k,            order,
                     columns, packed,  sums, threads.count};
  threads.run(
      threads.count,
      [](void* context, int thread) {
        const Packing& p = *static_cast<const Packing*>(context);
        const int64_t blocks = p.columns / kBlock, all = p.experts * blocks;
        for (int64_t i = thread; i < all; i += p.count) {
          p.block(i / blocks, i % blocks);
        }
      },
      &packing);
}

}  // namespace int8_moe
