// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// The choice of an instruction set, and the packing of weights.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__linux__)
  #include <sys/mman.h>
#endif
#if defined(__SSE2__)
  #include <emmintrin.h>
#endif

#include "int8_moe.h"
#include "targets.h"

namespace int8_moe {

namespace {

#define INT8_MOE_ADDRESS(name) &INT8_MOE_TARGET(name),
constexpr const Isa* kBuiltIsas[] = {INT8_MOE_TARGETS(INT8_MOE_ADDRESS)};
#undef INT8_MOE_ADDRESS

std::vector<const Isa*> list_supported_isas() {
  const char* cap = std::getenv("VLLM_INT8_MOE_ISA");
  bool within_cap = cap == nullptr || *cap == 0;
  std::vector<const Isa*> supported;
  std::string names;
  for (const Isa* isa : kBuiltIsas) {
    names += (names.empty() ? "" : ", ") + std::string(isa->name);
    within_cap = within_cap || std::strcmp(isa->name, cap) == 0;
    if (within_cap && isa->supported()) supported.push_back(isa);
  }
  if (!within_cap) {
    throw std::invalid_argument("VLLM_INT8_MOE_ISA=" + std::string(cap) +
                                " is none of " + names);
  }
  return supported;
}

// Four words of kKR values each.
using Words = uint32_t __attribute__((vector_size(16)));

// Reads one Words of each of four rows, and writes four groups of K, kHalf
// words apart. Each group has one word of each row: the 4 x 4 matrix of words
// is transposed.
void transpose_words(const int8_t* const (&rows)[4], int8_t* packed) {
  Words row[4], pair[4], group[4];
  for (int r = 0; r < 4; ++r) std::memcpy(&row[r], rows[r], sizeof(Words));
  pair[0] = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  pair[1] = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  pair[2] = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  pair[3] = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  group[0] = __builtin_shufflevector(pair[0], pair[1], 0, 1, 4, 5);
  group[1] = __builtin_shufflevector(pair[0], pair[1], 2, 3, 6, 7);
  group[2] = __builtin_shufflevector(pair[2], pair[3], 0, 1, 4, 5);
  group[3] = __builtin_shufflevector(pair[2], pair[3], 2, 3, 6, 7);
  for (int g = 0; g < 4; ++g) {
    std::memcpy(packed + g * kKR * kHalf, &group[g], sizeof(Words));
  }
}

// The sum of the int8 values of the cache lines that were added.
class LineSum {
 public:
#if defined(__SSE2__)
  // psadbw sums unsigned bytes: each is a value plus 128.
  void add(const int8_t* line) {
    const __m128i sign = _mm_set1_epi8(-128);
    for (int64_t i = 0; i < kCacheLine; i += 16) {
      const __m128i values =
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(line + i));
      const __m128i partial_sums =
          _mm_sad_epu8(_mm_xor_si128(values, sign), _mm_setzero_si128());
      sums_ = _mm_add_epi64(sums_, partial_sums);
    }
    excess_ += 128 * kCacheLine;
  }
  int32_t value() const {
    const __m128i sum = _mm_add_epi64(sums_, _mm_unpackhi_epi64(sums_, sums_));
    return _mm_cvtsi128_si32(sum) - excess_;
  }

 private:
  __m128i sums_ = _mm_setzero_si128();
  int32_t excess_ = 0;
#else
  void add(const int8_t* line) {
    for (int64_t i = 0; i < kCacheLine; ++i) sum_ += line[i];
  }
  int32_t value() const { return sum_; }

 private:
  int32_t sum_ = 0;
#endif
};

// Copies whole cache lines with streaming stores. Nothing reads them soon, and
// ordinary stores would first read the lines from memory.
void stream_lines(const int8_t* from, int64_t bytes, int8_t* to) {
#if defined(__SSE2__)
  for (int64_t i = 0; i < bytes; i += 16) {
    _mm_stream_si128(
        reinterpret_cast<__m128i*>(to + i),
        _mm_load_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
#else
  std::memcpy(to, from, bytes);
#endif
}

// Orders streaming stores before all later stores.
void fence_streaming_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

struct Packing {
  const int8_t* weight;
  const float *scale, *bias;
  int64_t experts, rows;
  Order order;
  Weight to;
  int threads;

  // The weight's row of a packed column; negative: padding.
  int64_t find_row(int64_t column) const {
    if (order == Order::plain) return column < rows ? column : -1;
    const int64_t is_up = column % kNR / kHalf, gates = rows / 2;
    const int64_t gate = column / kNR * kHalf + column % kHalf;
    if (gate >= gates) return -1;
    return order == Order::halves ? is_up * gates + gate : 2 * gate + is_up;
  }

  // half_rows: the row of each column, null for padding. sums: of each row.
  void pack_half(const int8_t* const (&half_rows)[kHalf], int8_t* packed,
                 int32_t (&sums)[kHalf]) const {
    // One cache line of each row at a time: each line is read once, and the
    // packed weight is written in memory's order.
    constexpr int64_t kPrefetchDistance = 512;
    static constexpr int8_t kZeros[kCacheLine] = {};
    const int64_t k = to.k, k_whole_lines = k / kCacheLine * kCacheLine;
    alignas(kCacheLine) int8_t buffer[kCacheLine * kHalf];
    LineSum line_sums[kHalf];
    for (int64_t i = 0; i < k_whole_lines; i += kCacheLine) {
      for (int j = 0; j < kHalf; j += 4) {
        const int8_t* lines[4];
        for (int r = 0; r < 4; ++r) {
          lines[r] = half_rows[j + r] ? half_rows[j + r] + i : kZeros;
          __builtin_prefetch(lines[r] + kPrefetchDistance);
          line_sums[j + r].add(lines[r]);
        }
        for (int64_t n = 0; n < kCacheLine; n += sizeof(Words)) {
          transpose_words(lines, buffer + n * kHalf + j * kKR);
          for (const int8_t*& line : lines) line += sizeof(Words);
        }
      }
      stream_lines(buffer, kCacheLine * kHalf, packed + i * kHalf);
    }
    std::memset(packed + k_whole_lines * kHalf, 0,
                (to.k_padded() - k_whole_lines) * kHalf);
    for (int j = 0; j < kHalf; ++j) {
      sums[j] = line_sums[j].value();
      for (int64_t i = k_whole_lines; half_rows[j] && i < k; ++i) {
        packed[(i / kKR * kHalf + j) * kKR + i % kKR] = half_rows[j][i];
        sums[j] += half_rows[j][i];
      }
    }
  }

  void pack_block(int64_t expert, int64_t index) const {
    for (int half = 0; half < 2; ++half) {
      const int8_t* half_rows[kHalf];
      int32_t sums[kHalf];
      for (int j = 0; j < kHalf; ++j) {
        const int64_t column = index * kNR + half * kHalf + j;
        const int64_t row_of_expert = find_row(column);
        const bool is_padding = row_of_expert < 0;
        const int64_t row = expert * rows + row_of_expert;
        half_rows[j] = is_padding ? nullptr : weight + row * to.k;
        to.scale(expert)[column] = is_padding ? 0 : scale[row];
        to.bias(expert)[column] = is_padding || bias == nullptr ? 0 : bias[row];
      }
      pack_half(half_rows,
                to.block(expert, index) + half * kHalf * to.k_padded(), sums);
      int32_t* compensation =
          to.compensation(expert) + index * kNR + half * kHalf;
      for (int j = 0; j < kHalf; ++j) compensation[j] = 128 * sums[j];
    }
  }
};

// Asks for large pages, for memory that is not touched yet. A page walk, and
// the reach of the hardware's prefetcher, is then 2 MiB instead of 4 KiB.
void advise_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLargePage = 2 << 20;
  const uintptr_t start =
      (reinterpret_cast<uintptr_t>(data) + kLargePage - 1) & ~(kLargePage - 1);
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kLargePage - 1);
  if (end > start) {
    madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
  }
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace

const std::vector<const Isa*>& isas() {
  static const std::vector<const Isa*> supported = list_supported_isas();
  return supported;
}

void pack(const int8_t* weight, const float* scale, const float* bias,
          int64_t experts, int64_t rows, Order order, const Weight& to,
          const Threads& threads) {
  advise_large_pages(to.packed, experts * to.bytes());
  Packing packing = {weight, scale, bias, experts,
                     rows,   order, to,   threads.count};
  threads.run(
      threads.count,
      [](void* context, int thread) {
        const Packing& p = *static_cast<const Packing*>(context);
        const int64_t expert_blocks = p.to.columns / kNR;
        const int64_t blocks = p.experts * expert_blocks;
        for (int64_t i = thread; i < blocks; i += p.threads) {
          p.pack_block(i / expert_blocks, i % expert_blocks);
        }
        fence_streaming_stores();
      },
      &packing);
}

}  // namespace int8_moe
