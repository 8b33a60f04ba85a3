// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// Rows of quantized activations times a block of a packed weight, for instruction sets
// that multiply in vector registers. What they differ in is a struct V:
//   Vector             a register
//   kColumns           columns of it, of four values of K each
//   kMR, kNR           rows and columns whose sums stay in registers; kNR is a block
//                      or half of one
//   kChains            sums that one row needs so that none waits for another
//   zero()             sums of 0
//   load(b)            4 * kColumns weights
//   broadcast(a)       four values of a row, for each column
//   read(c)            the sums of kColumns int32
//   dot(sum, w, x)     sum + w . x
//   add(sum, other)
//   store(sum, c)      kColumns int32
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "int8_moe.h"
#include "unrolled.h"

namespace int8_moe {
namespace {

// So much of K of half a block, 4 KiB, stays in the first-level cache.
constexpr int64_t kKC = 256;
// Up to so many rows, those in registers take turns at KC.
constexpr int64_t kMostRowsByKC = 28;
// How far ahead of its use the weight is prefetched, in bytes: KC of half a block.
constexpr int64_t kAhead = kKC * kHalf;

// How far from what is read of each half the next is prefetched, in bytes; `last` more
// in a block's last KC, which gets the next block's start.
struct Prefetch {
  int64_t left, right, last;
};

// Four values of a row, as a register is filled with them.
inline int32_t read_four(const uint8_t* a) {
  int32_t four;
  __builtin_memcpy(&four, a, 4);
  return four;
}

inline void prefetch(const void* from) { __builtin_prefetch(from, 0, 3); }

// MR rows a [MR, k] times NR columns of b, from `begin` to `end` of K, to c [MR, kNR];
// added to it unless begin is 0. b is a block or, if NR is half of one, that half.
template <class V, int MR, bool kPrefetches>
void microkernel(const uint8_t* a, int64_t stride, const int8_t* b, int64_t k,
                 int64_t begin, int64_t end, const Prefetch& ahead, int32_t* c) {
  constexpr int NR = V::kNR, kRegisters = NR / V::kColumns;
  constexpr int kOfHalf = kHalf / V::kColumns;  // registers of half a block
  typename V::Vector sums[MR * kRegisters];
  unrolled<MR * kRegisters>(INT8_MOE_EACH(j) {
    const int32_t* from = c + j / kRegisters * kNR + j % kRegisters * V::kColumns;
    sums[j] = begin == 0 ? V::zero() : V::read(from);
  });
  // A pointer to each third row, of which the compiler is kept from knowing that they
  // are apart by the stride: with an offset a row it runs out of registers.
  const uint8_t* third[(MR + 2) / 3];
  unrolled<(MR + 2) / 3>(INT8_MOE_EACH(g) { third[g] = a + begin + 3 * g * stride; });
  const int8_t *w = b + begin * kHalf, *const stop = b + end * kHalf;
  const auto multiply = [&](const int8_t* until, int64_t left,
                            int64_t right) __attribute__((always_inline)) {
    for (; w < until; w += 4 * kHalf) {
      if (kPrefetches) {
        prefetch(w + left);
        if (NR > kHalf) prefetch(w + right);
      }
      // The fewer of both stay in registers.
      if constexpr (kRegisters <= MR) {
        typename V::Vector weights[kRegisters];
        unrolled<kRegisters>(INT8_MOE_EACH(j) { weights[j] = V::load(w + j / kOfHalf * k * kHalf +
                               j % kOfHalf * V::kColumns * 4); });
        unrolled<MR>(INT8_MOE_EACH(r) {
          const typename V::Vector x = V::broadcast(third[r / 3] + r % 3 * stride);
          unrolled<kRegisters>(INT8_MOE_EACH(j) {
            auto& sum = sums[kRegisters * r + j];
            sum = V::dot(sum, weights[j], x);
          });
        });
      } else {
        typename V::Vector x[MR];
        unrolled<MR>(INT8_MOE_EACH(r) { x[r] = V::broadcast(third[r / 3] + r % 3 * stride); });
        unrolled<kRegisters>(INT8_MOE_EACH(j) {
          const typename V::Vector weights = V::load(w + j / kOfHalf * k * kHalf +
                               j % kOfHalf * V::kColumns * 4);
          unrolled<MR>(INT8_MOE_EACH(r) {
            auto& sum = sums[kRegisters * r + j];
            sum = V::dot(sum, weights, x[r]);
          });
        });
      }
      unrolled<(MR + 2) / 3>(INT8_MOE_EACH(g) {
        third[g] += 4;
        asm("" : "+r"(third[g]));
      });
    }
  };
  if (kPrefetches) {
    const int64_t right = k * kHalf + ahead.right;
    multiply(std::min(stop, b + (k - kKC) * kHalf), ahead.left, right);
    multiply(stop, ahead.left + ahead.last, right + ahead.last);
  } else {
    multiply(stop, 0, 0);
  }
  unrolled<MR * kRegisters>(INT8_MOE_EACH(j) {
    V::store(sums[j], c + j / kRegisters * kNR + j % kRegisters * V::kColumns);
  });
}

// One row a [k] times half a block, to c [kHalf].
template <class V>
void gemv(const uint8_t* a, const int8_t* half, int64_t k, int32_t* c) {
  constexpr int kRegisters = kHalf / V::kColumns;
  constexpr int kSteps = std::max(1, V::kChains / kRegisters);
  static_assert(kKAlign % (4 * kSteps) == 0);
  typename V::Vector sums[kSteps * kRegisters];
  unrolled<kSteps * kRegisters>(INT8_MOE_EACH(j) { sums[j] = V::zero(); });
  for (int64_t i = 0; i < k; i += 4 * kSteps) {
    unrolled<kSteps>(INT8_MOE_EACH(s) {
      const int8_t* w = half + (i + 4 * s) * kHalf;
      prefetch(w + kAhead);
      const typename V::Vector x = V::broadcast(a + i + 4 * s);
      unrolled<kRegisters>(INT8_MOE_EACH(j) {
        auto& sum = sums[kRegisters * s + j];
        sum = V::dot(sum, V::load(w + j * V::kColumns * 4), x);
      });
    });
  }
  unrolled<kRegisters>(INT8_MOE_EACH(j) {
    unrolled<kSteps - 1>(INT8_MOE_EACH(s) {
      sums[j] = V::add(sums[j], sums[kRegisters * (s + 1) + j]);
    });
    V::store(sums[j], c + j * V::kColumns);
  });
}

using MicrokernelOfRows = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t,
                                   int64_t, int64_t, const Prefetch&, int32_t*);

template <class V, bool kPrefetches, int... MR>
constexpr std::array<MicrokernelOfRows, sizeof...(MR)> microkernels_of(
    std::integer_sequence<int, MR...>) {
  return {microkernel<V, MR + 1, kPrefetches>...};
}

// m rows a [m, k], `stride` apart, times a block, to c [m, kNR].
template <class V>
void gemm(const uint8_t* a, int64_t stride, const int8_t* block, int64_t k, int64_t m,
          int32_t* c) {
  static constexpr auto kFirst =
      microkernels_of<V, true>(std::make_integer_sequence<int, V::kMR>());
  static constexpr auto kLater =
      microkernels_of<V, false>(std::make_integer_sequence<int, V::kMR>());
  constexpr bool kWhole = V::kNR == kNR;
  if (m == 1) {
    // one half after the other: the weight comes from memory in order
    gemv<V>(a, block, k, c);
    return gemv<V>(a, block + k * kHalf, k, c + kHalf);
  }
  const int64_t passes = (m + V::kMR - 1) / V::kMR;
  const int64_t slab = passes > 1 && m <= kMostRowsByKC ? kKC : k;
  for (int64_t first = 0; first < kNR; first += V::kNR, block += k * V::kNR) {
    for (int64_t begin = 0; begin < k; begin += slab) {
      const int64_t end = std::min(k, begin + slab);
      int64_t row = 0;
      for (int64_t pass = 0; pass < passes; ++pass) {
        // equal shares: 37 rows are 10, 9, 9 and 9, not 12, 12, 12 and 1
        const int64_t n = (m - row + passes - pass - 1) / (passes - pass);
        // a half each, by the first two that take turns
        const Prefetch ahead = {
            pass == 0 ? kAhead : 0,
            kWhole && pass == (slab < k ? 1 : 0) ? kAhead : 0, kWhole ? k * kHalf : 0};
        const bool asks = ahead.left + ahead.right > 0;
        (asks ? kFirst : kLater)[n - 1](a + row * stride, stride, block, k, begin, end,
                                        ahead, c + row * kNR + first);
        row += n;
      }
    }
  }
}

// What experts.h is told of an instruction set that has a struct V.
template <class V>
struct VectorMicrokernel {
  static constexpr int kOffset = V::kOffset;
  static constexpr int kReadsRows = 1;
  static void end() {}
  // What is prefetched is near: the block's own, and where it ends.
  static void gemm(const uint8_t* a, int64_t stride, const int8_t* block, int64_t k,
                   int64_t m, const int8_t*, int32_t* c) {
    int8_moe::gemm<V>(a, stride, block, k, m, c);
  }
  static void gemv(const uint8_t* a, const int8_t* half, int64_t k, int32_t* c) {
    int8_moe::gemv<V>(a, half, k, c);
  }
};

}  // namespace
}  // namespace int8_moe
