// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// The operator, for one instruction set: a translation unit includes this after
// its `struct Dot`, which is built for that instruction set, and everything here
// is local to it. Dot has
//   kOffset   what is added to quantized activations: 128 (unsigned) or 0
//   rows(a, stride, block, k, m, c)
//             a [m, k] times a block of 32 columns -> c [m, 32] int32
//   row(a, half, k, c)
//             one row a [k] times half a block, 16 columns -> c [16] int32
//   kRowsRead of rows it may read, and of c write, a multiple, whatever m is
//   end()     after what a thread computes
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <thread>

#include "int8_moe.h"
#include "lanes.h"

#if defined(__F16C__)
  #include <immintrin.h>
#endif

namespace int8_moe {
namespace {

// ------------------------------------------------------------------ memory

// What of a call's scratch stays for the next call, in bytes.
constexpr size_t kKept = 64 << 20;

// Scratch of one call, its threads' included: of the thread that calls.
class Arena {
 public:
  explicit Arena(size_t bytes) : kept_(last()) {
    if (bytes <= kept_.size) return;
    kept_.give_back();
    // a little more, for a call with a few more tokens, but no more than is kept
    const size_t wanted = std::max(bytes, std::min(kKept, bytes + bytes / 4));
    const size_t size = (wanted + 4095) / 4096 * 4096;
    kept_.data = static_cast<char*>(std::aligned_alloc(4096, size));
    if (kept_.data == nullptr) throw std::bad_alloc();
    kept_.size = size;
  }
  ~Arena() {
    if (kept_.size > kKept) kept_.give_back();
  }
  // Gives back, at its end, what was taken after it.
  struct Mark {
    explicit Mark(Arena& arena) : arena(arena), used(arena.used_) {}
    ~Mark() { arena.used_ = used; }
    Arena& arena;
    size_t used;
  };

  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  template <typename T>
  T* take(int64_t count) {
    char* found = kept_.data + used_;
    used_ += space<T>(count);
    return reinterpret_cast<T*>(found);
  }
  template <typename T>
  static size_t space(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  }

 private:
  struct Kept {
    char* data = nullptr;
    size_t size = 0;

    ~Kept() { give_back(); }
    void give_back() {
      std::free(data);
      data = nullptr;
      size = 0;
    }
  };
  static Kept& last() {
    thread_local Kept kept;
    return kept;
  }

  Kept& kept_;
  size_t used_ = 0;
};

// ----------------------------------------------------------------- threads

template <typename F>
void on_threads(const Threads& threads, const F& body) {
  if (threads.count <= 1) return body(0);
  threads.run(threads.count,
              [](void* f, int thread) { (*static_cast<const F*>(f))(thread); },
              const_cast<void*>(static_cast<const void*>(&body)));
}

// Of a loop that waits: leaves the core to its other thread, and memory alone.
inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The steps of one parallel region. Each thread has a range of a step's items, the
// same from call to call so that what it reads stays in its cache, and helps with the
// others' when it is through; each item writes what no other one writes. A step begins
// when those before it are done. Whoever waits waits for items that others have begun,
// so that threads that run one after the other, as in a nested region, wait for nothing.
class Steps {
 public:
  static size_t space(int steps, int threads) {
    return Arena::space<Range>(steps * threads) + Arena::space<Step>(steps);
  }
  Steps(Arena& arena, int steps, int threads)
      : threads_(threads),
        ranges_(arena.take<Range>(steps * threads)),
        steps_(arena.take<Step>(steps)) {}

  // Thread t's range ends with item end(t).
  template <typename F>
  void share(int which, const F& end) {
    Step* step = new (steps_ + which) Step();
    for (int t = 0; t < threads_; ++t) {
      Range* range = new (ranges_ + which * threads_ + t) Range();
      range->next.store(step->items, std::memory_order_relaxed);
      step->items = range->end = end(t);
    }
  }
  void share_evenly(int which, int64_t items) {
    share(which, [&](int t) { return items * (t + 1) / threads_; });
  }

  template <typename F>
  void run(int which, int thread, int64_t at_once, const F& body) {
    Step& step = steps_[which];
    int64_t finished = 0;
    for (int i = 0; i < threads_; ++i) {
      if (step.begun.load(std::memory_order_relaxed)) break;
      Range& range = ranges_[which * threads_ + (thread + i) % threads_];
      while (range.next.load(std::memory_order_relaxed) < range.end) {
        const int64_t start = range.next.fetch_add(at_once, std::memory_order_relaxed);
        const int64_t end = std::min(range.end, start + at_once);
        for (int64_t item = start; item < end; ++item) body(item);
        finished += std::max<int64_t>(0, end - start);
      }
    }
    // The others need not look for items in every range.
    if (threads_ > 2) step.begun.store(true, std::memory_order_relaxed);
    if (finished > 0) step.done.fetch_add(finished, std::memory_order_acq_rel);
    for (int spins = 0; step.done.load(std::memory_order_acquire) < step.items; ++spins) {
      pause();
      if (spins > 2000) std::this_thread::yield();
    }
  }

 private:
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct alignas(64) Step {
    std::atomic<int64_t> done{0};
    std::atomic<bool> begun{false};  // every item
    int64_t items = 0;
  };
  int threads_;
  Range* ranges_;
  Step* steps_;
};

// ------------------------------------------------------------ numbers

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t rest = h & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // an exponent too high by 2^112, subnormals included
  return from_bits(sign | bits(from_bits(rest << 13) * from_bits(0x77800000)));
}

inline uint16_t float_to_half(float f) {
  const uint32_t sign = bits(f) >> 16 & 0x8000, rest = bits(f) & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7e00;
  if (rest >= 0x477ff000) return sign | 0x7c00;
  if (rest < 0x38800000) {  // subnormal: the addition rounds
    return sign | (bits(from_bits(rest) + 0.5f) - bits(0.5f));
  }
  return sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

inline uint16_t float_to_bfloat(float f) {
  const uint32_t all = bits(f);
  if ((all & 0x7fffffff) > 0x7f800000) return (all >> 16) | 0x40;
  return (all + 0x7fff + (all >> 16 & 1)) >> 16;
}

inline void to_float(const void* from, Dtype dtype, int64_t n, float* to) {
  if (dtype == Dtype::f32) {
    std::memcpy(to, from, n * sizeof(float));
  } else if (dtype == Dtype::bf16) {
    const uint16_t* source = static_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < n; ++i) {
      to[i] = from_bits(static_cast<uint32_t>(source[i]) << 16);
    }
  } else {
    const uint16_t* source = static_cast<const uint16_t*>(from);
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(
                                   reinterpret_cast<const __m128i*>(source + i))));
    }
#endif
    for (; i < n; ++i) to[i] = half_to_float(source[i]);
  }
}

inline void from_float(const float* from, Dtype dtype, int64_t n, void* to) {
  if (dtype == Dtype::f32) {
    std::memcpy(to, from, n * sizeof(float));
  } else if (dtype == Dtype::bf16) {
    uint16_t* target = static_cast<uint16_t*>(to);
    int64_t i = 0;
#if defined(__AVX512F__)
    const __m512i one = _mm512_set1_epi32(1), bias = _mm512_set1_epi32(0x7fff);
    for (; i + 16 <= n; i += 16) {
      const __m512 f = _mm512_loadu_ps(from + i);
      const __m512i all = _mm512_castps_si512(f), high = _mm512_srli_epi32(all, 16);
      const __m512i odd = _mm512_and_si512(high, one);
      __m512i found = _mm512_add_epi32(all, _mm512_add_epi32(bias, odd));
      found = _mm512_mask_or_epi32(_mm512_srli_epi32(found, 16),
                                   _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q), high,
                                   _mm512_set1_epi32(0x40));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i),
                          _mm512_cvtepi32_epi16(found));
    }
#endif
    for (; i < n; ++i) target[i] = float_to_bfloat(from[i]);
  } else {
    uint16_t* target = static_cast<uint16_t*>(to);
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + i),
                                       _MM_FROUND_TO_NEAREST_INT));
    }
#endif
    for (; i < n; ++i) target[i] = float_to_half(from[i]);
  }
}

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// The bits of the largest magnitude: of floats that are not negative, they order as
// the values do, NaN above all.
inline uint32_t largest_magnitude(const float* x, int64_t n) {
  uint32_t largest = 0;
  int64_t i = 0;
#if defined(__AVX512F__)
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();
  for (; i + 16 <= n; i += 16) {
    most = _mm512_max_epu32(most, _mm512_and_si512(mask, _mm512_loadu_si512(x + i)));
  }
  largest = _mm512_reduce_max_epu32(most);
#endif
  for (; i < n; ++i) largest = std::max(largest, bits(x[i]) & 0x7fffffffu);
  return largest;
}

// One row of float32 to INT8, `padded` values written; returns its scale. The
// row's largest magnitude becomes 127, or `fixed` is the scale. A row that has
// no such scale (NaN, infinity) gets NaN for one.
inline float quantize(const float* x, int64_t n, int64_t padded,
                      const float* fixed, uint8_t* q) {
  const uint32_t largest = largest_magnitude(x, n);
  const uint32_t first_bad = fixed == nullptr ? 0x7f800000u : 0x7f800001u;
  float scale = fixed != nullptr ? *fixed : from_bits(largest) / 127.0f;
  if (largest >= first_bad) {
    std::memset(q, Dot::kOffset, padded);
    return std::numeric_limits<float>::quiet_NaN();
  }
  if (fixed == nullptr && largest == 0) scale = 1.0f;
  // a division: the reciprocal may be infinite, and moves ties
  int64_t i = 0;
#if defined(__AVX512F__)
  const __m128i offset = _mm_set1_epi8(static_cast<char>(Dot::kOffset));
  for (; i + 16 <= n; i += 16) {
    const Floats v = at_most(floats(x + i) / scale, 127.0f);
    const __m128i eight = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v.v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), _mm_xor_si128(eight, offset));
  }
#endif
  for (; i < n; ++i) {
    const float v = at_least(at_most(x[i] / scale, 127.0f), -128.0f);
    q[i] = static_cast<uint8_t>(bits(v + kRound) - 0x4B400000u + Dot::kOffset);
  }
  std::memset(q + n, Dot::kOffset, padded - n);
  return scale;
}

// ----------------------------------------------------------------- experts

// Rows are pairs of token and expert, expert after expert.
struct Rows {
  int64_t count;
  int64_t active;       // experts that have rows
  int32_t* expert;      // [active]
  int64_t* start;       // [active + 1]
  int32_t* token;       // [count]
  float* weight;        // [count]
  int32_t* row_of;      // [tokens, top_k], negative: none
};

// Rows whose activations are in memory at once: a range of all rows.
struct Piece {
  int64_t begin, end;
  int64_t first, last;  // of the active experts that have some of them
};

struct Plan {
  Problem p;
  Rows rows;
  int64_t pieces, piece_rows;
  uint8_t* x_q;      // [tokens, row_bytes of w13], where there are more pieces
  float* x_s;        // [tokens]
  uint8_t* piece_q;  // [piece_rows, row_bytes of w13]: rows of x_q
  float* act;        // [piece_rows, act_stride]
  uint8_t* act_q;    // [rows, row_bytes of w2]
  float* act_s;      // [rows]
  int64_t act_stride;

  Piece piece(int64_t i) const {
    Piece found;
    found.begin = rows.count * i / pieces;
    found.end = rows.count * (i + 1) / pieces;
    found.first = found.last = 0;
    if (found.begin == found.end) return found;
    int64_t* const last = rows.start + rows.active;
    found.first = std::upper_bound(rows.start, last, found.begin) - rows.start - 1;
    found.last = std::lower_bound(rows.start, last, found.end) - rows.start;
    return found;
  }
};

// From one quantized row to the next: an odd number of cache lines, so that the same
// place of many rows is not in one set of the cache, as with K = 4096 it would be.
inline int64_t row_bytes(const Weight& w) { return w.k_padded() | kGroup; }

constexpr int64_t kRowChunk = 192;
static_assert(kRowChunk % Dot::kRowsRead == 0);
constexpr int64_t kBlocksAtOnce = 4;
constexpr int64_t kRowsAtOnce = 4;  // that one thread quantizes
constexpr int64_t kTokensAPart = 32;

inline void sort_rows(const Problem& p, Rows& rows, int64_t* counts) {
  const int64_t pairs = p.tokens * p.top_k;
  std::fill(counts, counts + p.experts, 0);
  for (int64_t i = 0; i < pairs; ++i) {
    if (p.experts_of[i] >= 0) ++counts[p.experts_of[i]];
  }
  rows.active = rows.count = 0;
  for (int64_t e = 0; e < p.experts; ++e) {
    const int64_t found = counts[e];
    counts[e] = rows.count;
    if (found == 0) continue;
    rows.expert[rows.active] = static_cast<int32_t>(e);
    rows.start[rows.active++] = rows.count;
    rows.count += found;
  }
  rows.start[rows.active] = rows.count;
  for (int64_t t = 0, i = 0; t < p.tokens; ++t) {
    for (int64_t k = 0; k < p.top_k; ++k, ++i) {
      const int32_t e = p.experts_of[i];
      rows.row_of[i] = -1;
      if (e < 0) continue;
      const int64_t row = counts[e]++;
      rows.row_of[i] = static_cast<int32_t>(row);
      rows.token[row] = static_cast<int32_t>(t);
      rows.weight[row] = p.topk_weights[i];
    }
  }
}

// row: [hidden], scratch
inline void quantize_token(const Plan& plan, int64_t t, float* row) {
  const Problem& p = plan.p;
  const int64_t padded = p.w13.k_padded(), stride = row_bytes(p.w13);
  const int32_t* places = plan.rows.row_of + t * p.top_k;
  const int32_t* last = places + p.top_k;
  const int32_t* first = std::find_if(places, last, [](int32_t r) { return r >= 0; });
  if (first == last) return;
  to_float(static_cast<const char*>(p.x) + t * p.x_stride * size_of(p.dtype), p.dtype,
           p.hidden, row);
  if (p.weight_on_input) {
    // in x's dtype, as PyTorch does it
    float weight = p.topk_weights[t];
    uint16_t buffer[1024];
    if (p.dtype != Dtype::f32) {
      from_float(&weight, p.dtype, 1, buffer);
      to_float(buffer, p.dtype, 1, &weight);
    }
    for (int64_t i = 0; i < p.hidden; ++i) row[i] *= weight;
    for (int64_t i = 0; p.dtype != Dtype::f32 && i < p.hidden; i += 1024) {
      const int64_t n = std::min<int64_t>(1024, p.hidden - i);
      from_float(row + i, p.dtype, n, buffer);
      to_float(buffer, p.dtype, n, row + i);
    }
  }
  const bool whole = plan.pieces == 1;
  uint8_t* q = whole ? plan.piece_q + *first * stride : plan.x_q + t * stride;
  plan.x_s[t] = quantize(row, p.hidden, padded, p.a1_scale, q);
  if (!whole) return;
  for (const int32_t* place = first + 1; place < last; ++place) {
    if (*place >= 0) std::memcpy(plan.piece_q + *place * stride, q, padded);
  }
}

// Brings a row's token to the row's place in its piece.
inline void gather_row(const Plan& plan, const Piece& piece, int64_t row) {
  const int64_t stride = row_bytes(plan.p.w13);
  std::memcpy(plan.piece_q + (row - piece.begin) * stride,
              plan.x_q + plan.rows.token[row] * stride, plan.p.w13.k_padded());
}

// What a block's int32 sums become: (sum - 128 * sum of weights) * scales + bias.
struct Columns {
  const float *scale, *bias;
  const int32_t* sums;

  Columns(const Weight& w, int64_t expert, int64_t block, int64_t first = 0)
      : scale(w.scale(expert) + block * kBlock + first),
        bias(w.bias(expert) + block * kBlock + first),
        sums(Dot::kOffset ? w.sums(expert) + block * kBlock + first : kNone) {}
  // of the columns from j on, kLanes of them
  Floats value(const int32_t* sum, Floats row_scale, int j) const {
    return floats(sum + j, sums + j) * (row_scale * floats(scale + j)) +
           floats(bias + j);
  }

  static constexpr int32_t kNone[kBlock] = {};
};

// Some rows of one expert; act is the first one's.
struct Tile {
  int64_t expert, first_row, last_row;
  float* act;
};

template <Activation kind>
void activate_block(const Plan& plan, const Tile& tile, int64_t block,
                    const int32_t* c) {
  const Columns columns(plan.p.w13, tile.expert, block);
  const float limit = plan.p.limit;
  for (int64_t row = tile.first_row; row < tile.last_row; ++row, c += kBlock) {
    const float s = plan.x_s[plan.rows.token[row]];
    alignas(64) float done[16];
    for (int j = 0; j < 16; j += kLanes) {
      const Floats gate = columns.value(c, s, j), up = columns.value(c, s, 16 + j);
      store(activate<kind>(gate, up, limit), done + j);
    }
    float* to = tile.act + (row - tile.first_row) * plan.act_stride + block * 16;
    std::memcpy(to, done, sizeof(done));
  }
}

using Activate = void (*)(const Plan&, const Tile&, int64_t, const int32_t*);

inline Activate activate_of(Activation kind) {
  switch (kind) {
    case Activation::silu: return activate_block<Activation::silu>;
    case Activation::gelu: return activate_block<Activation::gelu>;
    case Activation::gelu_tanh: return activate_block<Activation::gelu_tanh>;
    case Activation::swigluoai: return activate_block<Activation::swigluoai>;
    case Activation::swiglustep: return activate_block<Activation::swiglustep>;
  }
  return nullptr;
}

inline void quantize_act(const Plan& plan, const Piece& piece, int64_t row) {
  const Problem& p = plan.p;
  plan.act_s[row] =
      quantize(plan.act + (row - piece.begin) * plan.act_stride, p.intermediate, p.w2.k_padded(),
               p.a2_scale, plan.act_q + row * row_bytes(p.w2));
}

// Some blocks of one expert, all of its rows in a piece. c: [kRowChunk, kBlock], scratch
inline void gate_up(const Plan& plan, const Piece& piece, Activate activate, int64_t e,
                    int64_t first, int64_t last, int32_t* c) {
  const Weight& w = plan.p.w13;
  const int64_t stride = row_bytes(w);
  const int64_t begin = std::max(piece.begin, plan.rows.start[e]);
  const int64_t end = std::min(piece.end, plan.rows.start[e + 1]);
  for (int64_t row = begin; row < end; row += kRowChunk) {
    const int64_t in_piece = row - piece.begin;
    const Tile tile = {plan.rows.expert[e], row, std::min(end, row + kRowChunk),
                       plan.act + in_piece * plan.act_stride};
    const int64_t m = tile.last_row - row, room = round_up(m, Dot::kRowsRead);
    // Of few rows the products of some blocks first: what waits for one row's
    // activation then has other rows to go on with.
    const int64_t at_once = kRowChunk / room;
    for (int64_t block = first; block < last; block += at_once) {
      const int64_t n = std::min(at_once, last - block);
      for (int64_t i = 0; i < n; ++i) {
        Dot::rows(plan.piece_q + in_piece * stride, stride,
                  w.block(tile.expert, block + i), w.k_padded(), m,
                  c + i * room * kBlock);
      }
      for (int64_t i = 0; i < n; ++i) {
        activate(plan, tile, block + i, c + i * room * kBlock);
      }
    }
  }
}

// Adds the down product of one row, `columns` of them, to its token's sum.
inline void add_down(const Plan& plan, const Columns& values, int64_t row, int columns,
                     const int32_t* c, float* sum) {
  const float s = plan.act_s[row];
  const float weight = plan.p.weight_on_input ? 1.0f : plan.rows.weight[row];
  for (int j = 0; j < columns; j += kLanes) {
    store(floats(sum + j) + values.value(c, s, j) * weight, sum + j);
  }
}

// Some blocks of all experts, for some tokens, so that one thread sums a token's
// parts, in the order of the experts. c: [kRowChunk, kBlock], sum: [tokens, width],
// scratch
inline void down(const Plan& plan, int64_t first, int64_t last, int64_t first_token,
                 int64_t last_token, int32_t* c, float* sum) {
  const Problem& p = plan.p;
  const Rows& rows = plan.rows;
  const int64_t stride = row_bytes(p.w2), width = (last - first) * kBlock;
  const int64_t tokens = last_token - first_token;
  std::fill(sum, sum + tokens * width, 0.0f);
  for (int64_t e = 0; e < rows.active; ++e) {
    const int64_t expert = rows.expert[e];
    int64_t begin = rows.start[e], end = rows.start[e + 1];
    if (tokens < p.tokens) {
      const auto row_of = [&](int64_t token) {
        return std::lower_bound(rows.token + rows.start[e],
                                rows.token + rows.start[e + 1], token) - rows.token;
      };
      begin = row_of(first_token);
      end = row_of(last_token);
    }
    for (int64_t row = begin; row < end; row += kRowChunk) {
      const int64_t m = std::min(kRowChunk, end - row);
      for (int64_t block = first; block < last; ++block) {
        Dot::rows(plan.act_q + row * stride, stride, p.w2.block(expert, block),
                  p.w2.k_padded(), m, c);
        const Columns values(p.w2, expert, block);
        for (int64_t r = 0; r < m; ++r) {
          float* to = sum + (rows.token[row + r] - first_token) * width +
                      (block - first) * kBlock;
          add_down(plan, values, row + r, kBlock, c + r * kBlock, to);
        }
      }
    }
  }
  const int64_t columns = std::min(p.hidden, last * kBlock) - first * kBlock;
  for (int64_t t = 0; t < tokens; ++t) {
    from_float(sum + t * width, p.dtype, columns,
               static_cast<char*>(p.out) +
                   ((first_token + t) * p.hidden + first * kBlock) * size_of(p.dtype));
  }
}

// Some half blocks of all experts, for one token: blocks are too few to share evenly
// among many threads. c: [16], sum: [last - first, 16], scratch
inline void down_token(const Plan& plan, int64_t first, int64_t last, int32_t* c,
                       float* sum) {
  const Problem& p = plan.p;
  const Rows& rows = plan.rows;
  const int64_t stride = row_bytes(p.w2), k = p.w2.k_padded();
  std::fill(sum, sum + (last - first) * 16, 0.0f);
  for (int64_t e = 0; e < rows.active; ++e) {
    for (int64_t row = rows.start[e]; row < rows.start[e + 1]; ++row) {
      for (int64_t half = first; half < last; ++half) {
        const int64_t right = half % 2 * 16;
        Dot::row(plan.act_q + row * stride,
                 p.w2.block(rows.expert[e], half / 2) + right * k, k, c);
        const Columns values(p.w2, rows.expert[e], half / 2, right);
        add_down(plan, values, row, 16, c, sum + (half - first) * 16);
      }
    }
  }
  const int64_t columns = std::min(p.hidden, last * 16) - first * 16;
  from_float(sum, p.dtype, std::max<int64_t>(0, columns),
             static_cast<char*>(p.out) + first * 16 * size_of(p.dtype));
}

// How many blocks one item has: fewer where there would be too few items to share.
inline int64_t blocks_at_once(int64_t blocks, int64_t times, int threads) {
  int64_t found = kBlocksAtOnce;
  while (found > 1 && times * (blocks / found) < 4 * threads) found /= 2;
  return found;
}

// Into how many parts the tokens go where the blocks are too few to share.
inline int64_t token_parts(int64_t tokens, int64_t items, int threads) {
  const int64_t wanted = (4 * threads + items - 1) / items;
  return std::max<int64_t>(1, std::min(wanted, tokens / kTokensAPart));
}

// How a call is cut into items.
struct Items {
  int64_t blocks, group, groups;              // of the gate and up product
  int64_t out_blocks, out_group, out_groups;  // of the down product
  int64_t parts, some_tokens;                 // of it, by tokens
  size_t own;                                 // bytes of scratch a thread

  Items(const Problem& p, int64_t active, int64_t tokens, int threads) {
    blocks = p.w13.columns / kBlock;
    group = blocks_at_once(blocks, active, threads);
    groups = (blocks + group - 1) / group;
    out_blocks = p.w2.columns / kBlock * (tokens == 1 ? 2 : 1);  // half ones
    out_group = blocks_at_once(out_blocks, 1, threads);
    out_groups = (out_blocks + out_group - 1) / out_group;
    parts = token_parts(tokens, out_groups, threads);
    some_tokens = (tokens + parts - 1) / parts;
    own = std::max(Arena::space<float>(p.hidden),
                   Arena::space<int32_t>(kRowChunk * kBlock) +
                       Arena::space<float>(some_tokens * out_group * kBlock));
  }
};

inline void run(const Plan& plan, Arena& arena, const Threads& threads) {
  const Problem& p = plan.p;
  const Items items(p, plan.rows.active, p.tokens, threads.count);
  const int64_t groups = items.groups;
  const Activate activate = activate_of(p.activation);
  const Rows& rows = plan.rows;
  const int gather = 1, gate_ups = 2, acts = 3, a_piece = 3;  // from a piece's first on
  const int last = 1 + a_piece * static_cast<int>(plan.pieces);
  Arena::Mark mark(arena);
  Steps steps(arena, last + 1, threads.count);
  char* const own = arena.take<char>(items.own * threads.count);
  steps.share_evenly(0, p.tokens);
  for (int64_t i = 0; i < plan.pieces; ++i) {
    const Piece piece = plan.piece(i);
    const int at = a_piece * static_cast<int>(i);
    steps.share_evenly(at + gather, plan.pieces == 1 ? 0 : piece.end - piece.begin);
    if (groups == 1 && plan.pieces == 1) {
      // an expert's thread, whichever others have rows
      steps.share(at + gate_ups, [&](int t) {
        const int64_t next = p.experts * (t + 1) / threads.count;
        return std::lower_bound(rows.expert, rows.expert + rows.active, next) -
               rows.expert;
      });
    } else {
      steps.share_evenly(at + gate_ups, (piece.last - piece.first) * groups);
    }
    steps.share_evenly(at + acts, groups == 1 ? 0 : piece.end - piece.begin);
  }
  steps.share_evenly(last, items.out_groups * items.parts);
  on_threads(threads, [&](int thread) {
    char* const scratch = own + items.own * thread;
    int32_t* const c = reinterpret_cast<int32_t*>(scratch);
    float* const sum =
        reinterpret_cast<float*>(scratch + Arena::space<int32_t>(kRowChunk * kBlock));
    steps.run(0, thread, kRowsAtOnce, [&](int64_t t) {
      quantize_token(plan, t, reinterpret_cast<float*>(scratch));
    });
    for (int64_t i = 0; i < plan.pieces; ++i) {
      const Piece piece = plan.piece(i);
      const int at = a_piece * static_cast<int>(i);
      steps.run(at + gather, thread, kRowsAtOnce,
                [&](int64_t row) { gather_row(plan, piece, piece.begin + row); });
      steps.run(at + gate_ups, thread, 1, [&](int64_t item) {
        const int64_t e = piece.first + item / groups;
        const int64_t first = item % groups * items.group;
        gate_up(plan, piece, activate, e, first,
                std::min(items.blocks, first + items.group), c);
        if (groups > 1) return;
        const int64_t end = std::min(piece.end, rows.start[e + 1]);
        for (int64_t row = std::max(piece.begin, rows.start[e]); row < end; ++row) {
          quantize_act(plan, piece, row);
        }
      });
      steps.run(at + acts, thread, kRowsAtOnce,
                [&](int64_t row) { quantize_act(plan, piece, piece.begin + row); });
    }
    steps.run(last, thread, 1, [&](int64_t item) {
      const int64_t first = item / items.parts * items.out_group;
      const int64_t end = std::min(items.out_blocks, first + items.out_group);
      if (p.tokens == 1) return down_token(plan, first, end, c, sum);
      const int64_t token = item % items.parts * items.some_tokens;
      down(plan, first, end, std::min(p.tokens, token),
           std::min(p.tokens, token + items.some_tokens), c, sum);
    });
    Dot::end();
  });
}

// Most of a call's scratch, in bytes: of what a piece has, and of the rest, by which
// tokens are taken in chunks.
constexpr int64_t kPieceBytes = 24 << 20, kChunkBytes = 96 << 20;

// Products that keep a thread busy for longer than it takes to wake it.
constexpr int64_t kWorthAThread = 1 << 20;

inline void experts(const Problem& whole, const Threads& all) {
  Plan plan;
  const int64_t work = whole.tokens * whole.top_k * 3 * whole.intermediate * whole.hidden;
  const Threads threads = {
      static_cast<int>(std::min<int64_t>(
          all.count, 1 + (work + kWorthAThread / 2) / kWorthAThread)),
      all.run};
  Problem& p = plan.p;
  const int64_t k1 = row_bytes(whole.w13), k2 = row_bytes(whole.w2);
  plan.act_stride = round_up(whole.intermediate, 16);
  const int64_t a_row = k1 + plan.act_stride * sizeof(float);
  const int64_t a_token = k1 + whole.top_k * (k2 + 16) +
                          threads.count * kBlocksAtOnce * kBlock * sizeof(float);
  const int64_t chunks = (whole.tokens * a_token + kChunkBytes - 1) / kChunkBytes;
  const int64_t chunk = (whole.tokens + chunks - 1) / chunks;
  const int64_t most = chunk * whole.top_k;
  plan.piece_rows = std::min(most, kPieceBytes / a_row);
  const bool pieces = plan.piece_rows < most;
  const int64_t most_pieces = (most + plan.piece_rows - 1) / plan.piece_rows;
  // the last one is smaller
  const size_t own = std::max(
      Items(whole, 1, chunk, threads.count).own,
      Items(whole, 1, (whole.tokens - 1) % chunk + 1, threads.count).own);
  // A tile reads past the last row: so many more are there.
  const int64_t past = Dot::kRowsRead - 1;
  Arena arena(Steps::space(2 + 3 * static_cast<int>(most_pieces), threads.count) +
              own * threads.count + Arena::space<int64_t>(whole.experts) +
              Arena::space<int32_t>(whole.experts) +
              Arena::space<int64_t>(whole.experts + 1) +
              2 * Arena::space<int32_t>(most) + 2 * Arena::space<float>(most) +
              Arena::space<float>(chunk) +
              Arena::space<uint8_t>(pieces ? chunk * k1 : 0) +
              Arena::space<uint8_t>((plan.piece_rows + past) * k1) +
              Arena::space<uint8_t>((most + past) * k2) +
              Arena::space<float>(plan.piece_rows * plan.act_stride));
  int64_t* counts = arena.take<int64_t>(whole.experts);
  plan.rows.expert = arena.take<int32_t>(whole.experts);
  plan.rows.start = arena.take<int64_t>(whole.experts + 1);
  plan.rows.token = arena.take<int32_t>(most);
  plan.rows.row_of = arena.take<int32_t>(most);
  plan.rows.weight = arena.take<float>(most);
  plan.x_s = arena.take<float>(chunk);
  plan.act_s = arena.take<float>(most);
  plan.x_q = arena.take<uint8_t>(pieces ? chunk * k1 : 0);
  plan.piece_q = arena.take<uint8_t>((plan.piece_rows + past) * k1);
  plan.act_q = arena.take<uint8_t>((most + past) * k2);
  plan.act = arena.take<float>(plan.piece_rows * plan.act_stride);
  for (int64_t t = 0; t < whole.tokens; t += chunk) {
    p = whole;
    p.tokens = std::min(chunk, whole.tokens - t);
    p.x = static_cast<const char*>(whole.x) + t * whole.x_stride * size_of(p.dtype);
    p.out = static_cast<char*>(whole.out) + t * whole.hidden * size_of(p.dtype);
    p.topk_weights = whole.topk_weights + t * whole.top_k;
    p.experts_of = whole.experts_of + t * whole.top_k;
    sort_rows(p, plan.rows, counts);
    plan.pieces = std::max<int64_t>(
        1, (plan.rows.count + plan.piece_rows - 1) / plan.piece_rows);
    run(plan, arena, threads);
  }
}

// ------------------------------------------------------------------ router

// score, choice: [experts], scratch
inline void route_token(const Router& r, int64_t t, float* score, float* choice) {
  to_float(static_cast<const char*>(r.logits) + t * r.experts * size_of(r.dtype),
           r.dtype, r.experts, score);
  if (r.softmax) {
    float most = score[0], total = 0.0f;
    for (int64_t e = 1; e < r.experts; ++e) most = std::max(most, score[e]);
    for (int64_t e = 0; e < r.experts; ++e) score[e] = exponential(score[e] - most);
    for (int64_t e = 0; e < r.experts; ++e) total += score[e];
    for (int64_t e = 0; e < r.experts; ++e) score[e] /= total;
  } else {
    for (int64_t e = 0; e < r.experts; ++e) score[e] = sigmoid(score[e]);
  }
  for (int64_t e = 0; e < r.experts; ++e) {
    const float v = r.bias == nullptr ? score[e] : score[e] + r.bias[e];
    // NaN first, as torch.topk has it
    choice[e] = v != v ? std::numeric_limits<float>::infinity() : v;
  }
  float* weights = r.weights + t * r.top_k;
  int32_t* ids = r.ids + t * r.top_k;
  int64_t kept = 0;
  for (int64_t e = 0; e < r.experts; ++e) {
    if (kept == r.top_k && !(choice[e] > choice[ids[kept - 1]])) continue;
    int64_t place = kept < r.top_k ? kept++ : kept - 1;
    for (; place > 0 && choice[e] > choice[ids[place - 1]]; --place) {
      ids[place] = ids[place - 1];
    }
    ids[place] = static_cast<int32_t>(e);
  }
  float total = 0.0f;
  for (int64_t k = 0; k < r.top_k; ++k) total += weights[k] = score[ids[k]];
  const float factor = r.renormalize ? r.scale / total : r.scale;
  for (int64_t k = 0; k < r.top_k; ++k) weights[k] *= factor;
}

constexpr int64_t kTokensWorthAThread = 64;

inline void route(const Router& r, const Threads& all) {
  const Threads threads = {static_cast<int>(std::min<int64_t>(
                               all.count, 1 + r.tokens / kTokensWorthAThread)),
                           all.run};
  const int64_t some = Arena::space<float>(r.experts) / sizeof(float);
  Arena arena(Steps::space(1, threads.count) +
              Arena::space<float>(2 * some * threads.count));
  Steps steps(arena, 1, threads.count);
  float* const scores = arena.take<float>(2 * some * threads.count);
  steps.share_evenly(0, r.tokens);
  on_threads(threads, [&](int thread) {
    float* const own = scores + 2 * some * thread;
    steps.run(0, thread, 16, [&](int64_t t) { route_token(r, t, own, own + some); });
  });
}

}  // namespace
}  // namespace int8_moe
