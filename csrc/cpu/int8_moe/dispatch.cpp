// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__linux__)
  #include <sys/mman.h>
#endif

#include "int8_moe.h"
#include "targets.h"

namespace int8_moe {

namespace {

#define INT8_MOE_ADDRESS(name) &INT8_MOE_TARGET(name),
constexpr const Isa* kBuilt[] = {INT8_MOE_TARGETS(INT8_MOE_ADDRESS)};
#undef INT8_MOE_ADDRESS

std::vector<const Isa*> find_isas() {
  const char* cap = std::getenv("VLLM_INT8_MOE_ISA");
  bool below = cap == nullptr || *cap == 0;
  std::vector<const Isa*> found;
  std::string names;
  for (const Isa* isa : kBuilt) {
    names += (names.empty() ? "" : ", ") + std::string(isa->name);
    below = below || std::strcmp(isa->name, cap) == 0;
    if (below && isa->supported()) found.push_back(isa);
  }
  if (!below) {
    throw std::invalid_argument("VLLM_INT8_MOE_ISA=" + std::string(cap) +
                                " is none of " + names);
  }
  return found;
}

struct Packing {
  const int8_t* weight;
  const float *scale, *bias;
  int64_t experts, rows;
  Order order;
  Weight to;
  int count;

  // of a column; negative: none, a column of zeros
  int64_t row_of(int64_t column) const {
    if (order == Order::plain) return column < rows ? column : -1;
    const int64_t part = column % kNR / kHalf, half = rows / 2;
    const int64_t i = column / kNR * kHalf + column % kHalf;
    if (i >= half) return -1;
    return order == Order::halves ? part * half + i : 2 * i + part;
  }

  void block(int64_t expert, int64_t index) const {
    int8_t* packed = to.block(expert, index);
    std::memset(packed, 0, kNR * to.k_padded());
    for (int64_t j = 0; j < kNR; ++j) {
      const int64_t column = index * kNR + j, found = row_of(column);
      int32_t sum = 0;
      float factor = 0, offset = 0;
      if (found >= 0) {
        const int64_t row = expert * rows + found;
        const int8_t* from = weight + row * to.k;
        int8_t* half = packed + j / kHalf * kHalf * to.k_padded() + j % kHalf * 4;
        for (int64_t i = 0; i < to.k; ++i) {
          half[i / 4 * 4 * kHalf + i % 4] = from[i];
          sum += from[i];
        }
        factor = scale[row];
        if (bias != nullptr) offset = bias[row];
      }
      to.compensation(expert)[column] = 128 * sum;
      to.scale(expert)[column] = factor;
      to.bias(expert)[column] = offset;
    }
  }
};

// Not yet touched memory in large pages, where the system gives them when asked:
// a page is walked to, and prefetched within, once for 2 MiB, not once for 4 KiB.
void ask_for_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLarge = 2 << 20;
  const uintptr_t start =
      (reinterpret_cast<uintptr_t>(data) + kLarge - 1) & ~(kLarge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kLarge - 1);
  if (end > start) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace

const std::vector<const Isa*>& isas() {
  static const std::vector<const Isa*> found = find_isas();
  return found;
}

void pack(const int8_t* weight, const float* scale, const float* bias,
          int64_t experts, int64_t rows, Order order, const Weight& to,
          const Threads& threads) {
  ask_for_large_pages(to.packed, experts * to.bytes());
  Packing packing = {weight, scale, bias, experts, rows, order, to, threads.count};
  threads.run(
      threads.count,
      [](void* context, int thread) {
        const Packing& p = *static_cast<const Packing*>(context);
        const int64_t blocks = p.to.columns / kNR, all = p.experts * blocks;
        for (int64_t i = thread; i < all; i += p.count) {
          p.block(i / blocks, i % blocks);
        }
      },
      &packing);
}

}  // namespace int8_moe
