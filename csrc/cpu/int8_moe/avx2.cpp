// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "experts.h"
#include "microkernel.h"
#include "router.h"
#include "targets.h"

namespace int8_moe {
namespace {

// vpmaddubsw saturates, so both operands are widened to 16 bits for vpmaddwd.
// A register holds kKR values of K of 8 columns. Its even bytes become pairs of
// values 0 and 2 of each kKR, its odd bytes pairs of values 1 and 3.
inline __m256i load(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
inline void store(__m256i value, void* to) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), value);
}
inline __m256i widen_even(__m256i bytes) {
  return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
}
inline __m256i widen_odd(__m256i bytes) { return _mm256_srai_epi16(bytes, 8); }

// For gemv, which is bound by memory.
struct Avx2 {
  using Vector = __m256i;
  static constexpr int kColumns = 8, kAccumulators = 8, kGroups = 1;

  static Vector zero() { return _mm256_setzero_si256(); }
  static Vector load_weights(const int8_t* b) { return load(b); }
  static Vector broadcast(const uint8_t* a) {
    return _mm256_set1_epi32(load_activations(a));
  }
  template <int>
  static Vector dot(Vector sum, Vector w, Vector x) {
    sum = add(sum, _mm256_madd_epi16(widen_even(w), widen_even(x)));
    return add(sum, _mm256_madd_epi16(widen_odd(w), widen_odd(x)));
  }
  static Vector add(Vector a, Vector b) { return _mm256_add_epi32(a, b); }
  static void store_sums(Vector sum, int32_t* c) { store(sum, c); }
};

constexpr int kMR = 6;

// Up to kMR rows of at most KC, widened once for both halves of a block.
struct WidenedPanel {
  int16_t even[kMR][kKC / 2], odd[kMR][kKC / 2];

  // a: [rows, kc], rows a_stride bytes apart. kc is a multiple of kKAlign.
  void widen(const uint8_t* a, int64_t a_stride, int64_t rows, int64_t kc) {
    static_assert(kKAlign % sizeof(__m256i) == 0);
    for (int64_t r = 0; r < rows; ++r, a += a_stride) {
      for (int64_t i = 0; i < kc; i += sizeof(__m256i)) {
        const __m256i bytes = load(a + i);
        store(widen_even(bytes), even[r] + i / 2);
        store(widen_odd(bytes), odd[r] + i / 2);
      }
    }
  }
};

// MR rows of a panel times kc values of K of half a block, to c [MR, kNR]. The
// sums are added to c, unless these values are the first.
template <int MR, bool kPrefetch>
void multiply_panel(const WidenedPanel& panel, const int8_t* half, int64_t kc,
                    bool first, int64_t prefetch_distance, int32_t* c) {
  constexpr int kColumns = Avx2::kColumns, kRegisters = kHalf / kColumns;
  __m256i accumulators[MR * kRegisters];
  unroll<MR * kRegisters>(INT8_MOE_EACH(j) {
    accumulators[j] =
        first ? Avx2::zero()
              : load(c + j / kRegisters * kNR + j % kRegisters * kColumns);
  });
  const int16_t *even = panel.even[0], *odd = panel.odd[0];
  for (const int8_t* const end = half + kc * kHalf; half < end;
       half += kKR * kHalf) {
    if (kPrefetch) prefetch(half + prefetch_distance);
    const auto multiply =
        [&](auto widen, const int16_t* rows) __attribute__((always_inline)) {
          __m256i weights[kRegisters];
          unroll<kRegisters>(INT8_MOE_EACH(j) {
            weights[j] = widen(load(half + j * kColumns * kKR));
          });
          unroll<MR>(INT8_MOE_EACH(r) {
            int32_t pair;
            __builtin_memcpy(&pair, rows + r * (kKC / 2), sizeof(pair));
            const __m256i x = _mm256_set1_epi32(pair);
            unroll<kRegisters>(INT8_MOE_EACH(j) {
              __m256i& sum = accumulators[kRegisters * r + j];
              sum = _mm256_add_epi32(sum, _mm256_madd_epi16(weights[j], x));
              // Keeps GCC 12 from computing the products of all rows before
              // the sums: it would run out of registers.
              asm("" : "+x"(sum));
            });
          });
        };
    multiply(widen_even, even);
    multiply(widen_odd, odd);
    even += kKR / 2;
    odd += kKR / 2;
  }
  unroll<MR * kRegisters>(INT8_MOE_EACH(j) {
    store(accumulators[j],
          c + j / kRegisters * kNR + j % kRegisters * kColumns);
  });
}

using PanelFunction = void (*)(const WidenedPanel&, const int8_t*, int64_t,
                               bool, int64_t, int32_t*);

// Those of 1 to kMR rows.
template <bool kPrefetch, int... I>
constexpr std::array<PanelFunction, sizeof...(I)> list_panel_functions(
    std::integer_sequence<int, I...>) {
  return {multiply_panel<I + 1, kPrefetch>...};
}

struct Avx2Microkernel {
  static constexpr int kZeroPoint = 0, kMAlign = 1;
  static void finish_thread() {}

  static void gemv(const uint8_t* a, const int8_t* half, int64_t k,
                   int32_t* c) {
    int8_moe::gemv<Avx2>(a, half, k, c);
  }

  // next_block is not used: the block prefetches itself, and beyond its end.
  static void gemm(const uint8_t* a, int64_t a_stride, const int8_t* block,
                   int64_t k, int64_t m, const int8_t* /*next_block*/,
                   int32_t* c) {
    static constexpr auto kWithPrefetch =
        list_panel_functions<true>(std::make_integer_sequence<int, kMR>());
    static constexpr auto kWithoutPrefetch =
        list_panel_functions<false>(std::make_integer_sequence<int, kMR>());
    const int64_t half_bytes = k * kHalf;
    if (m == 1) {
      gemv(a, block, k, c);
      return gemv(a, block + half_bytes, k, c + kHalf);
    }
    WidenedPanel panel;
    const int64_t panels = (m + kMR - 1) / kMR;
    const int64_t parts = (k + kKC - 1) / kKC;  // of K
    int64_t k_begin = 0;
    for (int64_t part = 0; part < parts; ++part) {
      // Parts and panels are of equal size, as panels are in microkernel.h.
      const int64_t kc = round_up((k - k_begin) / (parts - part), kKAlign);
      // To the next part, from the last one to the next block's start.
      const int64_t distance =
          kc * kHalf + (part + 1 == parts ? half_bytes : 0);
      const int8_t* const left = block + k_begin * kHalf;
      int64_t row = 0;
      for (int64_t i = 0; i < panels; ++i) {
        const int64_t mr = (m - row + panels - i - 1) / (panels - i);
        panel.widen(a + row * a_stride + k_begin, a_stride, mr, kc);
        const auto& functions = i == 0 ? kWithPrefetch : kWithoutPrefetch;
        for (const int half : {0, 1}) {
          functions[mr - 1](panel, left + half * half_bytes, kc, k_begin == 0,
                            distance, c + row * kNR + half * kHalf);
        }
        row += mr;
      }
      k_begin += kc;
    }
  }
};

}  // namespace

extern const Isa INT8_MOE_TARGET(avx2) = {
    "avx2", avx2_supported, run_experts<Avx2Microkernel>, run_router};

}  // namespace int8_moe
