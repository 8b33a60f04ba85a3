// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// The operator, for one instruction set: a translation unit includes this after
// its `struct Dot`, which is built for that instruction set, and everything here
// is local to it. Dot has
//   kOffset   what is added to quantized activations: 128 (unsigned) or 0
//   rows(a, stride, block, k, m, c)
//             a [m, k] times a block of 32 columns -> c [m, 32] int32
//   begin(), end()   around what a thread computes
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#include "int8_moe.h"

#if defined(__F16C__)
  #include <immintrin.h>
#endif

namespace int8_moe {
namespace {

// ------------------------------------------------------------------ memory

// Grows, and is kept for the next call: one a thread.
class Arena {
 public:
  ~Arena() { std::free(data_); }
  void reserve(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    std::free(data_);
    size_ = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    data_ = static_cast<char*>(std::aligned_alloc(4096, size_));
    if (data_ == nullptr) {
      size_ = 0;
      throw std::bad_alloc();
    }
  }
  template <typename T>
  T* take(int64_t count) {
    char* found = data_ + used_;
    used_ += space<T>(count);
    return reinterpret_cast<T*>(found);
  }
  template <typename T>
  static size_t space(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

inline Arena& shared_arena() {
  thread_local Arena arena;
  return arena;
}

inline Arena& own_arena() {
  thread_local Arena arena;
  return arena;
}

// ----------------------------------------------------------------- threads

template <typename F>
void on_threads(const Threads& threads, int64_t items, const F& body) {
  const int count = static_cast<int>(std::min<int64_t>(threads.count, items));
  if (count <= 1) {
    if (items > 0) body(0);
    return;
  }
  threads.run(count,
              [](void* f, int thread) { (*static_cast<const F*>(f))(thread); },
              const_cast<void*>(static_cast<const void*>(&body)));
}

// Items go to whichever thread is free. Each writes what no other one writes.
template <typename Setup, typename F>
void each(const Threads& threads, int64_t items, int64_t at_once,
          const Setup& setup, const F& body) {
  std::atomic<int64_t> next{0};
  on_threads(threads, (items + at_once - 1) / at_once, [&](int) {
    setup();
    Dot::begin();
    while (true) {
      const int64_t start = next.fetch_add(at_once, std::memory_order_relaxed);
      if (start >= items) break;
      for (int64_t i = start; i < std::min(items, start + at_once); ++i) body(i);
    }
    Dot::end();
  });
}

// ------------------------------------------------------------ numbers

inline uint32_t bits(float v) {
  uint32_t found;
  std::memcpy(&found, &v, 4);
  return found;
}

inline float from_bits(uint32_t v) {
  float found;
  std::memcpy(&found, &v, 4);
  return found;
}

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
    for (int64_t i = 0; i < n; ++i) target[i] = float_to_bfloat(from[i]);
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

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds half to even

// Cephes' expf: within 2 ulp; NaN stays NaN.
inline float exponential(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * from_bits((bits(shifted) - 0x4B400000u + 127u) << 23);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Abramowitz and Stegun 7.1.26: within 1.5e-7.
inline float error_function(float x) {
  const float a = std::fabs(x);
  const float t = 1.0f / (1.0f + 0.3275911f * a);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float found = 1.0f - p * t * exponential(-a * a);
  return x < 0.0f ? -found : found;
}

// NaN stays NaN: a comparison with it is false.
inline float at_most(float x, float limit) { return x > limit ? limit : x; }
inline float at_least(float x, float limit) { return x < limit ? limit : x; }

template <Activation kind>
inline float activate(float gate, float up, float limit) {
  if constexpr (kind == Activation::silu) {
    return gate * sigmoid(gate) * up;
  } else if constexpr (kind == Activation::gelu) {
    return 0.5f * gate * (1.0f + error_function(gate * 0.70710678f)) * up;
  } else if constexpr (kind == Activation::gelu_tanh) {
    const float inner = 0.79788456f * (gate + 0.044715f * gate * gate * gate);
    return gate * sigmoid(2.0f * inner) * up;
  } else if constexpr (kind == Activation::swigluoai) {
    gate = at_most(gate, limit);
    up = at_least(at_most(up, limit), -limit);
    return gate * sigmoid(1.702f * gate) * (up + 1.0f);
  } else {
    return at_most(gate * sigmoid(gate), limit) *
           at_least(at_most(up, limit), -limit);
  }
}

// One row of float32 to INT8, `padded` values written; returns its scale. The
// row's largest magnitude becomes 127, or `fixed` is the scale. A row that has
// no such scale (NaN, infinity) gets NaN for one.
inline float quantize(const float* x, int64_t n, int64_t padded,
                      const float* fixed, uint8_t* q) {
  uint32_t largest = 0;  // of non-negative floats, bits order as values do
  for (int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, bits(x[i]) & 0x7fffffffu);
  }
  const uint32_t first_bad = fixed == nullptr ? 0x7f800000u : 0x7f800001u;
  float scale = fixed != nullptr ? *fixed : from_bits(largest) / 127.0f;
  if (largest >= first_bad) {
    std::memset(q, Dot::kOffset, padded);
    return std::numeric_limits<float>::quiet_NaN();
  }
  if (fixed == nullptr && largest == 0) scale = 1.0f;
  for (int64_t i = 0; i < n; ++i) {
    // a division: its reciprocal may be infinite, and moves ties
    float v = x[i] / scale;
    v = at_least(at_most(v, 127.0f), -128.0f);
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

struct Plan {
  Problem p;
  Rows rows;
  uint8_t* x_q;  // [rows, k_padded of w13]
  float* x_s;    // [rows]
  float* act;    // [rows, act_stride]
  uint8_t* act_q;
  float* act_s;
  int64_t act_stride;
};

constexpr int64_t kRowChunk = 192;
constexpr int64_t kBlocksAtOnce = 4;

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
  for (int64_t i = 0; i < pairs; ++i) {
    const int32_t e = p.experts_of[i];
    rows.row_of[i] = -1;
    if (e < 0) continue;
    const int64_t row = counts[e]++;
    rows.row_of[i] = static_cast<int32_t>(row);
    rows.token[row] = static_cast<int32_t>(i / p.top_k);
    rows.weight[row] = p.topk_weights[i];
  }
}

inline void quantize_tokens(const Plan& plan, const Threads& threads) {
  const Problem& p = plan.p;
  const int64_t padded = p.w13.k_padded();
  each(
      threads, p.tokens, 4,
      [&] { own_arena().reserve(Arena::space<float>(p.hidden)); },
      [&](int64_t t) {
        const int32_t* places = plan.rows.row_of + t * p.top_k;
        const int32_t* first = std::find_if(places, places + p.top_k,
                                            [](int32_t row) { return row >= 0; });
        if (first == places + p.top_k) return;
        Arena& arena = own_arena();
        arena.reserve(0);
        float* row = arena.take<float>(p.hidden);
        to_float(static_cast<const char*>(p.x) +
                     t * p.x_stride * size_of(p.dtype),
                 p.dtype, p.hidden, row);
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
        uint8_t* q = plan.x_q + *first * padded;
        const float scale = quantize(row, p.hidden, padded, p.a1_scale, q);
        for (const int32_t* place = first; place < places + p.top_k; ++place) {
          if (*place < 0) continue;
          plan.x_s[*place] = scale;
          if (place != first) std::memcpy(plan.x_q + *place * padded, q, padded);
        }
      });
}

// One work item: some blocks of columns times some rows of one expert.
struct Tile {
  int64_t expert, first_block, last_block, first_row, last_row;
};

template <Activation kind>
void gate_up_block(const Plan& plan, const Tile& tile, int64_t block, int32_t* c) {
  const Problem& p = plan.p;
  const int64_t padded = p.w13.k_padded(), m = tile.last_row - tile.first_row;
  Dot::rows(plan.x_q + tile.first_row * padded, padded,
            p.w13.block(tile.expert, block), padded, m, c);
  const int64_t at = tile.expert * p.w13.columns + block * kBlock;
  const int64_t width = std::min<int64_t>(16, p.intermediate - block * 16);
  alignas(64) float scale[kBlock], bias[kBlock] = {};
  alignas(64) int32_t sums[kBlock] = {};
  std::copy(p.w13.scale + at, p.w13.scale + at + kBlock, scale);
  if (p.w13.bias != nullptr) {
    std::copy(p.w13.bias + at, p.w13.bias + at + kBlock, bias);
  }
  if (Dot::kOffset) std::copy(p.w13.sums + at, p.w13.sums + at + kBlock, sums);
  const float limit = p.limit;
  for (int64_t r = 0; r < m; ++r) {
    const float s = plan.x_s[tile.first_row + r];
    const int32_t* both = c + r * kBlock;
    alignas(64) float done[16];
    for (int j = 0; j < 16; ++j) {
      const float gate =
          static_cast<float>(both[j] - sums[j]) * (s * scale[j]) + bias[j];
      const float up =
          static_cast<float>(both[16 + j] - sums[16 + j]) * (s * scale[16 + j]) +
          bias[16 + j];
      done[j] = activate<kind>(gate, up, limit);
    }
    float* to = plan.act + (tile.first_row + r) * plan.act_stride + block * 16;
    if (width == 16) {
      std::memcpy(to, done, sizeof(done));
    } else {
      std::memcpy(to, done, width * sizeof(float));
    }
  }
}

inline void gate_up(const Plan& plan, const Threads& threads) {
  const Problem& p = plan.p;
  const int64_t blocks = p.w13.columns / kBlock;
  // Fewer blocks an item where there would be too few items to share out.
  int64_t group = kBlocksAtOnce;
  while (group > 1 && plan.rows.active * (blocks / group) < 4 * threads.count) {
    group /= 2;
  }
  const int64_t groups = (blocks + group - 1) / group;
  using Body = void (*)(const Plan&, const Tile&, int64_t, int32_t*);
  Body body = nullptr;
  switch (p.activation) {
    case Activation::silu: body = gate_up_block<Activation::silu>; break;
    case Activation::gelu: body = gate_up_block<Activation::gelu>; break;
    case Activation::gelu_tanh: body = gate_up_block<Activation::gelu_tanh>; break;
    case Activation::swigluoai: body = gate_up_block<Activation::swigluoai>; break;
    case Activation::swiglustep: body = gate_up_block<Activation::swiglustep>; break;
  }
  each(
      threads, plan.rows.active * groups, 1,
      [] { own_arena().reserve(Arena::space<int32_t>(kRowChunk * kBlock)); },
      [&](int64_t item) {
        Arena& arena = own_arena();
        arena.reserve(0);
        int32_t* c = arena.take<int32_t>(kRowChunk * kBlock);
        const int64_t e = item / groups, first = item % groups * group;
        const int64_t end = plan.rows.start[e + 1];
        for (int64_t row = plan.rows.start[e]; row < end; row += kRowChunk) {
          const Tile tile = {plan.rows.expert[e], first,
                             std::min(blocks, first + group), row,
                             std::min(end, row + kRowChunk)};
          for (int64_t b = tile.first_block; b < tile.last_block; ++b) {
            body(plan, tile, b, c);
          }
        }
      });
}

inline void quantize_between(const Plan& plan, const Threads& threads) {
  const Problem& p = plan.p;
  const int64_t padded = p.w2.k_padded();
  each(
      threads, plan.rows.count, 8, [] {},
      [&](int64_t row) {
        plan.act_s[row] =
            quantize(plan.act + row * plan.act_stride, p.intermediate, padded,
                     p.a2_scale, plan.act_q + row * padded);
      });
}

// Each item has all experts' part of its columns, so that tokens are summed in
// the order of the experts by one thread.
inline void down(const Plan& plan, const Threads& threads) {
  const Problem& p = plan.p;
  const Rows& rows = plan.rows;
  const int64_t blocks = p.w2.columns / kBlock, padded = p.w2.k_padded();
  int64_t group = kBlocksAtOnce;
  while (group > 1 && blocks / group < 4 * threads.count) group /= 2;
  const int64_t items = (blocks + group - 1) / group;
  const auto space = [&] {
    own_arena().reserve(Arena::space<int32_t>(kRowChunk * kBlock) +
                        Arena::space<float>(p.tokens * group * kBlock));
  };
  each(threads, items, 1, space, [&](int64_t item) {
    Arena& arena = own_arena();
    arena.reserve(0);
    int32_t* c = arena.take<int32_t>(kRowChunk * kBlock);
    float* sum = arena.take<float>(p.tokens * group * kBlock);
    const int64_t first = item * group, last = std::min(blocks, first + group);
    const int64_t width = group * kBlock;
    std::fill(sum, sum + p.tokens * width, 0.0f);
    for (int64_t e = 0; e < rows.active; ++e) {
      const int64_t expert = rows.expert[e], end = rows.start[e + 1];
      for (int64_t row = rows.start[e]; row < end; row += kRowChunk) {
        const int64_t m = std::min(kRowChunk, end - row);
        for (int64_t b = first; b < last; ++b) {
          Dot::rows(plan.act_q + row * padded, padded, p.w2.block(expert, b),
                    padded, m, c);
          const int64_t at = expert * p.w2.columns + b * kBlock;
          alignas(64) float scale[kBlock], bias[kBlock] = {};
          alignas(64) int32_t sums[kBlock] = {};
          std::copy(p.w2.scale + at, p.w2.scale + at + kBlock, scale);
          if (p.w2.bias != nullptr) {
            std::copy(p.w2.bias + at, p.w2.bias + at + kBlock, bias);
          }
          if (Dot::kOffset) std::copy(p.w2.sums + at, p.w2.sums + at + kBlock, sums);
          for (int64_t r = 0; r < m; ++r) {
            const float s = plan.act_s[row + r];
            const float weight = p.weight_on_input ? 1.0f : rows.weight[row + r];
            const int32_t* from = c + r * kBlock;
            float* to = sum + rows.token[row + r] * width + (b - first) * kBlock;
            for (int64_t j = 0; j < kBlock; ++j) {
              to[j] += weight * (static_cast<float>(from[j] - sums[j]) *
                                     (s * scale[j]) +
                                 bias[j]);
            }
          }
        }
      }
    }
    const int64_t columns = std::min(p.hidden, last * kBlock) - first * kBlock;
    for (int64_t t = 0; t < p.tokens; ++t) {
      from_float(sum + t * width, p.dtype, columns,
                 static_cast<char*>(p.out) +
                     (t * p.hidden + first * kBlock) * size_of(p.dtype));
    }
  });
}

constexpr int64_t kRowsAtOnce = 32768;

inline void experts(const Problem& whole, const Threads& threads) {
  Plan plan;
  Problem& p = plan.p;
  const int64_t chunk =
      std::max<int64_t>(1, std::min(whole.tokens, kRowsAtOnce / whole.top_k));
  const int64_t most = chunk * whole.top_k;
  const int64_t k1 = whole.w13.k_padded(), k2 = whole.w2.k_padded();
  plan.act_stride = round_up(whole.intermediate, 16);
  Arena& arena = shared_arena();
  arena.reserve(Arena::space<int64_t>(whole.experts) +
                Arena::space<int32_t>(whole.experts) +
                Arena::space<int64_t>(whole.experts + 1) +
                2 * Arena::space<int32_t>(most) + 3 * Arena::space<float>(most) +
                Arena::space<uint8_t>(most * k1) + Arena::space<uint8_t>(most * k2) +
                Arena::space<float>(most * plan.act_stride));
  int64_t* counts = arena.take<int64_t>(whole.experts);
  plan.rows.expert = arena.take<int32_t>(whole.experts);
  plan.rows.start = arena.take<int64_t>(whole.experts + 1);
  plan.rows.token = arena.take<int32_t>(most);
  plan.rows.row_of = arena.take<int32_t>(most);
  plan.rows.weight = arena.take<float>(most);
  plan.x_s = arena.take<float>(most);
  plan.act_s = arena.take<float>(most);
  plan.x_q = arena.take<uint8_t>(most * k1);
  plan.act_q = arena.take<uint8_t>(most * k2);
  plan.act = arena.take<float>(most * plan.act_stride);
  for (int64_t t = 0; t < whole.tokens; t += chunk) {
    p = whole;
    p.tokens = std::min(chunk, whole.tokens - t);
    p.x = static_cast<const char*>(whole.x) + t * whole.x_stride * size_of(p.dtype);
    p.out = static_cast<char*>(whole.out) + t * whole.hidden * size_of(p.dtype);
    p.topk_weights = whole.topk_weights + t * whole.top_k;
    p.experts_of = whole.experts_of + t * whole.top_k;
    sort_rows(p, plan.rows, counts);
    quantize_tokens(plan, threads);
    gate_up(plan, threads);
    quantize_between(plan, threads);
    down(plan, threads);
  }
}

// ------------------------------------------------------------------ router

inline void route(const Router& r, const Threads& threads) {
  const auto space = [&] { own_arena().reserve(2 * Arena::space<float>(r.experts)); };
  each(threads, r.tokens, 16, space, [&](int64_t t) {
    Arena& arena = own_arena();
    arena.reserve(0);
    float* score = arena.take<float>(r.experts);
    float* choice = arena.take<float>(r.experts);
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
  });
}

}  // namespace
}  // namespace int8_moe
