// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// The GEMM of quantized rows and one block of a packed weight, for instruction
// sets that multiply in vector registers. They differ in a struct V:
//   Vector              a register
//   kColumns            columns of a register, kKR values of K each
//   kMR, kNR            rows and columns of the microkernel, whose accumulators
//                       stay in registers; V::kNR is kNR or kHalf
//   kAccumulators       accumulators that hide the latency of dot
//   kZeroPoint          of the activations: 128 (unsigned) or 0 (signed)
//   zero()              accumulators of 0
//   load_weights(b)     kColumns * kKR weights
//   kGroups             groups of kKR values of K in a register of a row
//   broadcast(a)        kGroups * kKR values of a row; a group for each column,
//                       where kGroups is 1
//   dot<G>(acc, w, x)   acc + w . x, per column, of group G of x
//   add(acc, acc)
//   load_sums(c)        accumulators of kColumns int32
//   store_sums(acc, c)  kColumns int32
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "int8_moe.h"
#include "unrolled.h"

namespace int8_moe {
namespace {

// K blocking: KC rows of half a block are 4 KiB, and stay in the L1 cache.
constexpr int64_t kKC = 256;
// More rows than these are faster without K blocking.
constexpr int64_t kMaxRowsOfKBlocking = 28;
// Weights are prefetched this many bytes before their use: KC of half a block.
constexpr int64_t kPrefetchDistance = kKC * kHalf;

// What a microkernel prefetches: the distance in bytes from the weights that it
// reads, for each half of a block. last_kc is added in the last KC of a block,
// from where the distance leads to the next block's start.
struct PrefetchDistances {
  int64_t left, right, last_kc;
};

// kKR values of a row, as a register is filled with them.
inline int32_t load_activations(const uint8_t* a) {
  int32_t values;
  __builtin_memcpy(&values, a, kKR);
  return values;
}

// A prefetch beyond the weight does not fault.
inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }

// MR rows a [MR, k] times V::kNR columns of b, to c [MR, kNR], for K from
// k_begin to k_end. The sums are added to c, unless k_begin is 0. b is a block
// or, if V::kNR is kHalf, half a block.
template <class V, int MR, bool kPrefetch>
void microkernel(const uint8_t* a, int64_t a_stride, const int8_t* b, int64_t k,
                 int64_t k_begin, int64_t k_end,
                 const PrefetchDistances& distances, int32_t* c) {
  using Vector = typename V::Vector;
  constexpr int NR = V::kNR, kGroups = V::kGroups;
  static_assert(kKAlign % (kKR * kGroups) == 0 && kKC % (kKR * kGroups) == 0);
  constexpr int kRegisters = NR / V::kColumns;  // registers of a row
  constexpr int kRegistersOfHalf = kHalf / V::kColumns;
  Vector accumulators[MR * kRegisters];
  unroll<MR * kRegisters>(INT8_MOE_EACH(j) {
    const int32_t* sums =
        c + j / kRegisters * kNR + j % kRegisters * V::kColumns;
    accumulators[j] = k_begin == 0 ? V::zero() : V::load_sums(sums);
  });
  // Pointers to rows 0, 3, 6, ...: an address of x86 reaches the two rows after
  // each by one and two strides. The asm statement below hides from the
  // compiler that the pointers are three strides apart. Otherwise it would
  // replace them by an offset per row, and run out of registers.
  constexpr int kTriples = (MR + 2) / 3;
  const uint8_t* triples[kTriples];
  unroll<kTriples>(
      INT8_MOE_EACH(g) { triples[g] = a + k_begin + 3 * g * a_stride; });
  const int8_t* w = b + k_begin * kHalf;
  const int8_t* const w_end = b + k_end * kHalf;
  const auto multiply_until =
      [&](const int8_t* end, int64_t left,
          int64_t right) __attribute__((always_inline)) {
        for (; w < end; w += kGroups * kKR * kHalf) {
          if (kPrefetch) {
            unroll<kGroups>(INT8_MOE_EACH(g) {
              prefetch(w + g * kKR * kHalf + left);
              if (NR > kHalf) prefetch(w + g * kKR * kHalf + right);
            });
          }
          const auto load_weights = [&](auto g,
                                        auto j) __attribute__((always_inline)) {
            return V::load_weights(w + g * kKR * kHalf +
                                   j / kRegistersOfHalf * k * kHalf +
                                   j % kRegistersOfHalf * V::kColumns * kKR);
          };
          const auto broadcast = [&](auto r) __attribute__((always_inline)) {
            return V::broadcast(triples[r / 3] + r % 3 * a_stride);
          };
          // The operand with fewer registers stays in them. The other one takes
          // one register at a time. With several groups it is the rows that
          // stay, as each of their registers serves several weights.
          if constexpr (kRegisters <= MR && kGroups == 1) {
            Vector weights[kRegisters];
            unroll<kRegisters>(INT8_MOE_EACH(j) {
              weights[j] = load_weights(std::integral_constant<int, 0>(), j);
            });
            unroll<MR>(INT8_MOE_EACH(r) {
              const Vector x = broadcast(r);
              unroll<kRegisters>(INT8_MOE_EACH(j) {
                Vector& accumulator = accumulators[kRegisters * r + j];
                accumulator = V::template dot<0>(accumulator, weights[j], x);
              });
            });
          } else {
            Vector x[MR];
            unroll<MR>(INT8_MOE_EACH(r) { x[r] = broadcast(r); });
            unroll<kGroups>(INT8_MOE_EACH(g) {
              unroll<kRegisters>(INT8_MOE_EACH(j) {
                const Vector weights = load_weights(g, j);
                unroll<MR>(INT8_MOE_EACH(r) {
                  Vector& accumulator = accumulators[kRegisters * r + j];
                  accumulator = V::template dot<g>(accumulator, weights, x[r]);
                });
              });
            });
          }
          unroll<kTriples>(INT8_MOE_EACH(g) {
            triples[g] += kGroups * kKR;
            asm("" : "+r"(triples[g]));
          });
        }
      };
  if (kPrefetch) {
    const int64_t right = k * kHalf + distances.right;
    const int64_t last_kc_begin = std::max<int64_t>(0, k - kKC);
    multiply_until(std::min(w_end, b + last_kc_begin * kHalf), distances.left,
                   right);
    multiply_until(w_end, distances.left + distances.last_kc,
                   right + distances.last_kc);
  } else {
    multiply_until(w_end, 0, 0);
  }
  unroll<MR * kRegisters>(INT8_MOE_EACH(j) {
    V::store_sums(accumulators[j],
                  c + j / kRegisters * kNR + j % kRegisters * V::kColumns);
  });
}

// One row a [k] times half a block, to c [kHalf].
template <class V>
void gemv(const uint8_t* a, const int8_t* half, int64_t k, int32_t* c) {
  using Vector = typename V::Vector;
  constexpr int kRegisters = kHalf / V::kColumns;
  // K is unrolled until there are kAccumulators.
  constexpr int kGroups = V::kGroups;
  constexpr int kUnroll = std::max(kGroups, V::kAccumulators / kRegisters);
  static_assert(kUnroll % kGroups == 0 && kKAlign % (kKR * kUnroll) == 0);
  Vector accumulators[kUnroll * kRegisters];
  unroll<kUnroll * kRegisters>(
      INT8_MOE_EACH(j) { accumulators[j] = V::zero(); });
  for (int64_t i = 0; i < k; i += kKR * kUnroll) {
    unroll<kUnroll / kGroups>(INT8_MOE_EACH(v) {
      const Vector x = V::broadcast(a + i + kKR * kGroups * v);
      unroll<kGroups>(INT8_MOE_EACH(g) {
        constexpr int u = kGroups * v + g;
        const int8_t* w = half + (i + kKR * u) * kHalf;
        prefetch(w + kPrefetchDistance);
        unroll<kRegisters>(INT8_MOE_EACH(j) {
          Vector& accumulator = accumulators[kRegisters * u + j];
          accumulator = V::template dot<g>(
              accumulator, V::load_weights(w + j * V::kColumns * kKR), x);
        });
      });
    });
  }
  unroll<kRegisters>(INT8_MOE_EACH(j) {
    unroll<kUnroll - 1>(INT8_MOE_EACH(u) {
      accumulators[j] =
          V::add(accumulators[j], accumulators[kRegisters * (u + 1) + j]);
    });
    V::store_sums(accumulators[j], c + j * V::kColumns);
  });
}

using MicrokernelFunction = void (*)(const uint8_t*, int64_t, const int8_t*,
                                     int64_t, int64_t, int64_t,
                                     const PrefetchDistances&, int32_t*);

// The microkernels of 1 to kMR rows.
template <class V, bool kPrefetch, int... I>
constexpr std::array<MicrokernelFunction, sizeof...(I)> list_microkernels(
    std::integer_sequence<int, I...>) {
  return {microkernel<V, I + 1, kPrefetch>...};
}

// m rows a [m, k], a_stride bytes apart, times a block, to c [m, kNR].
template <class V>
void gemm(const uint8_t* a, int64_t a_stride, const int8_t* block, int64_t k,
          int64_t m, int32_t* c) {
  static constexpr auto kWithPrefetch =
      list_microkernels<V, true>(std::make_integer_sequence<int, V::kMR>());
  static constexpr auto kWithoutPrefetch =
      list_microkernels<V, false>(std::make_integer_sequence<int, V::kMR>());
  constexpr bool kBothHalves = V::kNR == kNR;
  if (m == 1) {
    // One half after the other: so the weight is read in memory's order.
    gemv<V>(a, block, k, c);
    return gemv<V>(a, block + k * kHalf, k, c + kHalf);
  }
  const int64_t panels = (m + V::kMR - 1) / V::kMR;  // of rows
  const int64_t kc = panels > 1 && m <= kMaxRowsOfKBlocking ? kKC : k;
  for (int64_t column = 0; column < kNR;
       column += V::kNR, block += k * V::kNR) {
    for (int64_t k_begin = 0; k_begin < k; k_begin += kc) {
      const int64_t k_end = std::min(k, k_begin + kc);
      int64_t row = 0;
      for (int64_t panel = 0; panel < panels; ++panel) {
        // Panels are of equal size: 37 rows are 10, 9, 9 and 9, not 12, 12, 12
        // and 1.
        const int64_t mr = (m - row + panels - panel - 1) / (panels - panel);
        // The first panel prefetches the left half. With K blocking the second
        // panel, which reads the same KC, prefetches the right half. Without it
        // the first panel prefetches both.
        const PrefetchDistances distances = {
            panel == 0 ? kPrefetchDistance : 0,
            kBothHalves && panel == (kc < k ? 1 : 0) ? kPrefetchDistance : 0,
            kBothHalves ? k * kHalf : 0};
        const bool prefetches = distances.left + distances.right > 0;
        const auto& microkernels =
            prefetches ? kWithPrefetch : kWithoutPrefetch;
        microkernels[mr - 1](a + row * a_stride, a_stride, block, k, k_begin,
                             k_end, distances, c + row * kNR + column);
        row += mr;
      }
    }
  }
}

// The Microkernel of experts.h for a struct V.
template <class V>
struct VectorMicrokernel {
  static constexpr int kZeroPoint = V::kZeroPoint;
  static constexpr int kMAlign = 1;
  static void finish_thread() {}
  // next_block is not used: the block prefetches itself, and beyond its end.
  static void gemm(const uint8_t* a, int64_t a_stride, const int8_t* block,
                   int64_t k, int64_t m, const int8_t* /*next_block*/,
                   int32_t* c) {
    int8_moe::gemm<V>(a, a_stride, block, k, m, c);
  }
  static void gemv(const uint8_t* a, const int8_t* half, int64_t k,
                   int32_t* c) {
    int8_moe::gemv<V>(a, half, k, c);
  }
};

}  // namespace
}  // namespace int8_moe
