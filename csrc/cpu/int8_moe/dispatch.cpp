// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
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

using Words = uint32_t __attribute__((vector_size(16)));

// 16 values of each of four rows, to four columns of four values side by side: the
// transposed 4 x 4 matrix of words, its rows kHalf words apart.
void transpose(const int8_t* const (&from)[4], int8_t* to) {
  Words row[4], pair[4], column[4];
  for (int j = 0; j < 4; ++j) std::memcpy(&row[j], from[j], sizeof(Words));
  pair[0] = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  pair[1] = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  pair[2] = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  pair[3] = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  column[0] = __builtin_shufflevector(pair[0], pair[1], 0, 1, 4, 5);
  column[1] = __builtin_shufflevector(pair[0], pair[1], 2, 3, 6, 7);
  column[2] = __builtin_shufflevector(pair[2], pair[3], 0, 1, 4, 5);
  column[3] = __builtin_shufflevector(pair[2], pair[3], 2, 3, 6, 7);
  for (int i = 0; i < 4; ++i) std::memcpy(to + i * 4 * kHalf, &column[i], sizeof(Words));
}

constexpr int64_t kLine = 64;  // bytes of a cache line

// The sum of the values of the lines that were added.
class LineSum {
 public:
#if defined(__SSE2__)
  // psadbw sums bytes without sign: of values plus 128
  void add(const int8_t* line) {
    const __m128i sign = _mm_set1_epi8(-128);
    for (int64_t i = 0; i < kLine; i += 16) {
      const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(line + i));
      const __m128i part = _mm_sad_epu8(_mm_xor_si128(values, sign), _mm_setzero_si128());
      sums_ = _mm_add_epi64(sums_, part);
    }
    above_ += 128 * kLine;
  }
  int32_t value() const {
    const __m128i sum = _mm_add_epi64(sums_, _mm_unpackhi_epi64(sums_, sums_));
    return _mm_cvtsi128_si32(sum) - above_;
  }

 private:
  __m128i sums_ = _mm_setzero_si128();
  int32_t above_ = 0;
#else
  void add(const int8_t* line) {
    for (int64_t i = 0; i < kLine; ++i) sum_ += line[i];
  }
  int32_t value() const { return sum_; }

 private:
  int32_t sum_ = 0;
#endif
};

// Whole lines, past the caches: nobody reads them soon, and lines that are written
// there would be read from memory before.
void write_lines(const int8_t* from, int64_t bytes, int8_t* to) {
#if defined(__SSE2__)
  for (int64_t i = 0; i < bytes; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm_load_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
#else
  std::memcpy(to, from, bytes);
#endif
}

// Orders streaming stores before all later stores.
void order_writes() {
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
  int count;

  // of a column; negative: none, a column of zeros
  int64_t row_of(int64_t column) const {
    if (order == Order::plain) return column < rows ? column : -1;
    const int64_t part = column % kNR / kHalf, half = rows / 2;
    const int64_t i = column / kNR * kHalf + column % kHalf;
    if (i >= half) return -1;
    return order == Order::halves ? part * half + i : 2 * i + part;
  }

  // from: a row for each column, null for none. sums: of each row.
  void half(const int8_t* const (&from)[kHalf], int8_t* packed,
            int32_t (&sums)[kHalf]) const {
    // A line of each row at a time: read whole, once, and its part of the packed
    // weight is written in order.
    constexpr int64_t kAhead = 512;
    static constexpr int8_t kNone[kLine] = {};
    const int64_t k = to.k, whole = k / kLine * kLine;
    alignas(kLine) int8_t part[kLine * kHalf];
    LineSum line_sums[kHalf];
    for (int64_t begin = 0; begin < whole; begin += kLine) {
      for (int j = 0; j < kHalf; j += 4) {
        const int8_t* four[4];
        for (int n = 0; n < 4; ++n) {
          four[n] = from[j + n] ? from[j + n] + begin : kNone;
          __builtin_prefetch(four[n] + kAhead);
          line_sums[j + n].add(four[n]);
        }
        for (int64_t i = 0; i < kLine; i += sizeof(Words)) {
          transpose(four, part + i * kHalf + j * 4);
          for (const int8_t*& values : four) values += sizeof(Words);
        }
      }
      write_lines(part, kLine * kHalf, packed + begin * kHalf);
    }
    std::memset(packed + whole * kHalf, 0, (to.k_padded() - whole) * kHalf);
    for (int j = 0; j < kHalf; ++j) {
      sums[j] = line_sums[j].value();
      for (int64_t i = whole; from[j] && i < k; ++i) {
        packed[(i / 4 * kHalf + j) * 4 + i % 4] = from[j][i];
        sums[j] += from[j][i];
      }
    }
  }

  void block(int64_t expert, int64_t index) const {
    for (int part = 0; part < 2; ++part) {
      const int8_t* from[kHalf];
      int32_t sums[kHalf];
      for (int j = 0; j < kHalf; ++j) {
        const int64_t column = index * kNR + part * kHalf + j, found = row_of(column);
        const int64_t row = expert * rows + found;
        from[j] = found < 0 ? nullptr : weight + row * to.k;
        to.scale(expert)[column] = found < 0 ? 0 : scale[row];
        to.bias(expert)[column] = found < 0 || bias == nullptr ? 0 : bias[row];
      }
      half(from, to.block(expert, index) + part * kHalf * to.k_padded(), sums);
      int32_t* compensation = to.compensation(expert) + index * kNR + part * kHalf;
      for (int j = 0; j < kHalf; ++j) compensation[j] = 128 * sums[j];
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
        order_writes();
      },
      &packing);
}

}  // namespace int8_moe
