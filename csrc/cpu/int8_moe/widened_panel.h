// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// The GEMM of quantized rows and one block of a packed weight, for instruction
// sets without VNNI. vpmaddubsw saturates, so both operands are widened to 16
// bits for vpmaddwd. A register holds kKR values of K of each of its columns.
// Its even bytes become pairs of values 0 and 2 of each kKR, its odd bytes
// pairs of values 1 and 3. Instruction sets differ in a struct V:
//   Vector               a register
//   kColumns             columns of a register
//   kMR, kNR             rows and columns of the microkernel, whose
//                        accumulators stay in registers; V::kNR is kNR or kHalf
//   load(from), store(v, to)     any address
//   zero()               accumulators of 0
//   broadcast(pair)      two int16 to each column
//   widen_even(v), widen_odd(v)  the even, the odd int8 as int16
//   add_products(acc, v, w)      acc + the products of pairs of int16
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "int8_moe.h"
#include "microkernel.h"
#include "unrolled.h"

namespace int8_moe {
namespace {

// Up to V::kMR rows of at most KC, widened once for all columns of a block.
template <class V>
struct WidenedPanel {
  int16_t even[V::kMR][kKC / 2], odd[V::kMR][kKC / 2];

  // a: [rows, kc], rows a_stride bytes apart. kc is a multiple of kKAlign.
  void widen(const uint8_t* a, int64_t a_stride, int64_t rows, int64_t kc) {
    constexpr int64_t kBytes = sizeof(typename V::Vector);
    static_assert(kKAlign % kBytes == 0);
    for (int64_t r = 0; r < rows; ++r, a += a_stride) {
      for (int64_t i = 0; i < kc; i += kBytes) {
        const auto bytes = V::load(a + i);
        V::store(V::widen_even(bytes), even[r] + i / 2);
        V::store(V::widen_odd(bytes), odd[r] + i / 2);
      }
    }
  }
};

// MR rows of a panel times kc values of K of V::kNR columns, to c [MR, kNR].
// half is the first or only half, and half_bytes leads to the next one. The
// sums are added to c, unless these values are the first.
template <class V, int MR, bool kPrefetch>
void multiply_panel(const WidenedPanel<V>& panel, const int8_t* half,
                    int64_t half_bytes, int64_t kc, bool first,
                    int64_t prefetch_distance, int32_t* c) {
  using Vector = typename V::Vector;
  constexpr int kColumns = V::kColumns, kRegisters = V::kNR / kColumns;
  constexpr int kRegistersOfHalf = kHalf / kColumns;
  Vector accumulators[MR * kRegisters];
  unroll<MR * kRegisters>(INT8_MOE_EACH(j) {
    accumulators[j] =
        first ? V::zero()
              : V::load(c + j / kRegisters * kNR + j % kRegisters * kColumns);
  });
  const int16_t *even = panel.even[0], *odd = panel.odd[0];
  for (const int8_t* const end = half + kc * kHalf; half < end;
       half += kKR * kHalf) {
    if (kPrefetch) {
      prefetch(half + prefetch_distance);
      if (V::kNR > kHalf) prefetch(half + half_bytes + prefetch_distance);
    }
    const auto multiply = [&](auto widen, const int16_t* rows) __attribute__((
                              always_inline)) {
      Vector weights[kRegisters];
      unroll<kRegisters>(INT8_MOE_EACH(j) {
        weights[j] = widen(V::load(half + j / kRegistersOfHalf * half_bytes +
                                   j % kRegistersOfHalf * kColumns * kKR));
      });
      unroll<MR>(INT8_MOE_EACH(r) {
        int32_t pair;
        __builtin_memcpy(&pair, rows + r * (kKC / 2), sizeof(pair));
        const Vector x = V::broadcast(pair);
        unroll<kRegisters>(INT8_MOE_EACH(j) {
          Vector& sum = accumulators[kRegisters * r + j];
          sum = V::add_products(sum, weights[j], x);
          // Keeps GCC 12 from computing the products of all rows before
          // the sums: it would run out of registers.
          asm("" : "+v"(sum));
        });
      });
    };
    multiply(V::widen_even, even);
    multiply(V::widen_odd, odd);
    even += kKR / 2;
    odd += kKR / 2;
  }
  unroll<MR * kRegisters>(INT8_MOE_EACH(j) {
    V::store(accumulators[j],
             c + j / kRegisters * kNR + j % kRegisters * kColumns);
  });
}

template <class V>
using PanelFunction = void (*)(const WidenedPanel<V>&, const int8_t*, int64_t,
                               int64_t, bool, int64_t, int32_t*);

// Those of 1 to V::kMR rows.
template <class V, bool kPrefetch, int... I>
constexpr std::array<PanelFunction<V>, sizeof...(I)> list_panel_functions(
    std::integer_sequence<int, I...>) {
  return {multiply_panel<V, I + 1, kPrefetch>...};
}

// m rows a [m, k], a_stride bytes apart, times a block, to c [m, kNR].
template <class V>
void multiply_panels(const uint8_t* a, int64_t a_stride, const int8_t* block,
                     int64_t k, int64_t m, int32_t* c) {
  constexpr int kMR = V::kMR;
  static constexpr auto kWithPrefetch =
      list_panel_functions<V, true>(std::make_integer_sequence<int, kMR>());
  static constexpr auto kWithoutPrefetch =
      list_panel_functions<V, false>(std::make_integer_sequence<int, kMR>());
  const int64_t half_bytes = k * kHalf;
  WidenedPanel<V> panel;
  const int64_t panels = (m + kMR - 1) / kMR;
  const int64_t parts = (k + kKC - 1) / kKC;  // of K
  int64_t k_begin = 0;
  for (int64_t part = 0; part < parts; ++part) {
    // Parts and panels are of equal size, as panels are in microkernel.h.
    const int64_t kc = round_up((k - k_begin) / (parts - part), kKAlign);
    // To the next part, from the last one to the next block's start.
    const int64_t distance = kc * kHalf + (part + 1 == parts ? half_bytes : 0);
    const int8_t* const left = block + k_begin * kHalf;
    int64_t row = 0;
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t mr = (m - row + panels - i - 1) / (panels - i);
      panel.widen(a + row * a_stride + k_begin, a_stride, mr, kc);
      const auto& functions = i == 0 ? kWithPrefetch : kWithoutPrefetch;
      for (int column = 0; column < kNR; column += V::kNR) {
        functions[mr - 1](panel, left + column / kHalf * half_bytes, half_bytes,
                          kc, k_begin == 0, distance, c + row * kNR + column);
      }
      row += mr;
    }
    k_begin += kc;
  }
}

}  // namespace
}  // namespace int8_moe
