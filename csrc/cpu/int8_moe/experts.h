// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// Routed experts on a Microkernel, one instruction set's:
//   kOffset     what is added to quantized activations: 128 (unsigned) or 0
//   kReadsRows  rows that are read, and sums written, come in multiples of it
//   gemm(a, stride, block, k, m, next, c)
//               a [m, k] times a block -> c [m, kNR] int32; `next`, most likely the
//               block of the call after it, may be prefetched; null: at hand, or not known
//   gemv(a, half, k, c)
//               a [k] times half a block -> c [kHalf] int32
//   end()                            after what a thread computes
// In steps that threads share: quantization, gate and up product, activation,
// quantization, down product and its weighted sum.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "arena.h"
#include "float16.h"
#include "int8_moe.h"
#include "lanes.h"
#include "quantize.h"
#include "scheduler.h"

namespace int8_moe {
namespace {

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
inline int64_t row_bytes(const Weight& w) { return w.k_padded() | kKAlign; }

constexpr int64_t kMC = 192;         // rows whose products are in memory at once
constexpr int64_t kMostBlocks = 4;   // of an item
constexpr int64_t kRowsAtOnce = 4;   // that one thread quantizes
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
template <class Microkernel>
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
  plan.x_s[t] = quantize<Microkernel::kOffset>(row, p.hidden, padded, p.a1_scale, q);
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

// What a block's int32 sums become: (sum - compensation) * scales + bias.
template <class Microkernel>
struct Columns {
  const float *scale, *bias;
  const int32_t* compensation;

  Columns(const Weight& w, int64_t expert, int64_t block, int64_t first = 0)
      : scale(w.scale(expert) + block * kNR + first),
        bias(w.bias(expert) + block * kNR + first),
        compensation(Microkernel::kOffset
                         ? w.compensation(expert) + block * kNR + first
                         : kNone) {}
  // of the columns from j on, kLanes of them
  Floats value(const int32_t* sum, Floats row_scale, int j) const {
    return floats(sum + j, compensation + j) * (row_scale * floats(scale + j)) +
           floats(bias + j);
  }

  static constexpr int32_t kNone[kNR] = {};
};

// Some rows of one expert; act is the first one's.
struct Tile {
  int64_t expert, first_row, last_row;
  float* act;
};

template <class Microkernel, Activation kind>
void activate_block(const Plan& plan, const Tile& tile, int64_t block,
                    const int32_t* c) {
  const Columns<Microkernel> columns(plan.p.w13, tile.expert, block);
  const float limit = plan.p.limit;
  for (int64_t row = tile.first_row; row < tile.last_row; ++row, c += kNR) {
    const float s = plan.x_s[plan.rows.token[row]];
    alignas(64) float done[kHalf];
    for (int j = 0; j < kHalf; j += kLanes) {
      const Floats gate = columns.value(c, s, j), up = columns.value(c, s, kHalf + j);
      store(activate<kind>(gate, up, limit), done + j);
    }
    float* to = tile.act + (row - tile.first_row) * plan.act_stride + block * kHalf;
    std::memcpy(to, done, sizeof(done));
  }
}

using Activate = void (*)(const Plan&, const Tile&, int64_t, const int32_t*);

template <class Microkernel>
inline Activate activate_of(Activation kind) {
  using A = Activation;
  switch (kind) {
    case A::silu: return activate_block<Microkernel, A::silu>;
    case A::gelu: return activate_block<Microkernel, A::gelu>;
    case A::gelu_tanh: return activate_block<Microkernel, A::gelu_tanh>;
    case A::swigluoai: return activate_block<Microkernel, A::swigluoai>;
    case A::swiglustep: return activate_block<Microkernel, A::swiglustep>;
  }
  return nullptr;
}

template <class Microkernel>
inline void quantize_act(const Plan& plan, const Piece& piece, int64_t row) {
  const Problem& p = plan.p;
  plan.act_s[row] =
      quantize<Microkernel::kOffset>(
          plan.act + (row - piece.begin) * plan.act_stride, p.intermediate,
          p.w2.k_padded(), p.a2_scale, plan.act_q + row * row_bytes(p.w2));
}

// Some blocks of one expert, all of its rows in a piece. c: [kMC, kNR], scratch
template <class Microkernel>
inline void gate_up(const Plan& plan, const Piece& piece, Activate activate, int64_t e,
                    int64_t first, int64_t last, int32_t* c) {
  const Weight& w = plan.p.w13;
  const int64_t stride = row_bytes(w);
  const int64_t begin = std::max(piece.begin, plan.rows.start[e]);
  const int64_t end = std::min(piece.end, plan.rows.start[e + 1]);
  for (int64_t row = begin; row < end; row += kMC) {
    const int64_t in_piece = row - piece.begin;
    const Tile tile = {plan.rows.expert[e], row, std::min(end, row + kMC),
                       plan.act + in_piece * plan.act_stride};
    const int64_t m = tile.last_row - row, room = round_up(m, Microkernel::kReadsRows);
    // Of few rows the products of some blocks first: what waits for one row's
    // activation then has other rows to go on with.
    const int64_t at_once = kMC / room;
    for (int64_t block = first; block < last; block += at_once) {
      const int64_t n = std::min(at_once, last - block);
      for (int64_t i = 0; i < n; ++i) {
        // The last rows' last block is followed by the next item's, most often the one
        // after it. Other rows find the blocks at hand.
        const bool comes = block + i + 1 < last ? row == begin : tile.last_row == end;
        Microkernel::gemm(plan.piece_q + in_piece * stride, stride,
                  w.block(tile.expert, block + i), w.k_padded(), m,
                  comes ? w.block(tile.expert, block + i + 1) : nullptr,
                  c + i * room * kNR);
      }
      for (int64_t i = 0; i < n; ++i) {
        activate(plan, tile, block + i, c + i * room * kNR);
      }
    }
  }
}

// Adds the down product of one row, `columns` of them, to its token's sum.
template <class Microkernel>
inline void add_down(const Plan& plan, const Columns<Microkernel>& values, int64_t row,
                     int columns, const int32_t* c, float* sum) {
  const float s = plan.act_s[row];
  const float weight = plan.p.weight_on_input ? 1.0f : plan.rows.weight[row];
  for (int j = 0; j < columns; j += kLanes) {
    store(floats(sum + j) + values.value(c, s, j) * weight, sum + j);
  }
}

// Some blocks of all experts, for some tokens, so that one thread sums a token's
// parts, in the order of the experts. c: [kMC, kNR], sum: [tokens, width],
// scratch
template <class Microkernel>
inline void down(const Plan& plan, int64_t first, int64_t last, int64_t first_token,
                 int64_t last_token, int32_t* c, float* sum) {
  const Problem& p = plan.p;
  const Rows& rows = plan.rows;
  const int64_t stride = row_bytes(p.w2), width = (last - first) * kNR;
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
    for (int64_t row = begin; row < end; row += kMC) {
      const int64_t m = std::min(kMC, end - row);
      const int64_t next = row + kMC < end || e + 1 == rows.active
                               ? expert : rows.expert[e + 1];
      for (int64_t block = first; block < last; ++block) {
        Microkernel::gemm(plan.act_q + row * stride, stride, p.w2.block(expert, block),
                  p.w2.k_padded(), m,
                  block + 1 < last ? p.w2.block(expert, block + 1)
                                   : p.w2.block(next, first), c);
        const Columns<Microkernel> values(p.w2, expert, block);
        for (int64_t r = 0; r < m; ++r) {
          float* to = sum + (rows.token[row + r] - first_token) * width +
                      (block - first) * kNR;
          add_down(plan, values, row + r, kNR, c + r * kNR, to);
        }
      }
    }
  }
  const int64_t columns = std::min(p.hidden, last * kNR) - first * kNR;
  for (int64_t t = 0; t < tokens; ++t) {
    from_float(sum + t * width, p.dtype, columns,
               static_cast<char*>(p.out) +
                   ((first_token + t) * p.hidden + first * kNR) * size_of(p.dtype));
  }
}

// Some half blocks of all experts, for one token: blocks are too few to share evenly
// among many threads. c: [kHalf], sum: [last - first, kHalf], scratch
template <class Microkernel>
inline void down_token(const Plan& plan, int64_t first, int64_t last, int32_t* c,
                       float* sum) {
  const Problem& p = plan.p;
  const Rows& rows = plan.rows;
  const int64_t stride = row_bytes(p.w2), k = p.w2.k_padded();
  std::fill(sum, sum + (last - first) * kHalf, 0.0f);
  for (int64_t e = 0; e < rows.active; ++e) {
    for (int64_t row = rows.start[e]; row < rows.start[e + 1]; ++row) {
      for (int64_t half = first; half < last; ++half) {
        const int64_t right = half % 2 * kHalf;
        Microkernel::gemv(plan.act_q + row * stride,
                 p.w2.block(rows.expert[e], half / 2) + right * k, k, c);
        const Columns<Microkernel> values(p.w2, rows.expert[e], half / 2, right);
        add_down(plan, values, row, kHalf, c, sum + (half - first) * kHalf);
      }
    }
  }
  const int64_t columns = std::min(p.hidden, last * kHalf) - first * kHalf;
  from_float(sum, p.dtype, std::max<int64_t>(0, columns),
             static_cast<char*>(p.out) + first * kHalf * size_of(p.dtype));
}

// How many blocks one item has: fewer where there would be too few items to share.
inline int64_t blocks_at_once(int64_t blocks, int64_t times, int threads) {
  int64_t found = kMostBlocks;
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
    blocks = p.w13.columns / kNR;
    group = blocks_at_once(blocks, active, threads);
    groups = (blocks + group - 1) / group;
    out_blocks = p.w2.columns / kNR * (tokens == 1 ? 2 : 1);  // half ones
    out_group = blocks_at_once(out_blocks, 1, threads);
    out_groups = (out_blocks + out_group - 1) / out_group;
    parts = token_parts(tokens, out_groups, threads);
    some_tokens = (tokens + parts - 1) / parts;
    own = std::max(Arena::space<float>(p.hidden),
                   Arena::space<int32_t>(kMC * kNR) +
                       Arena::space<float>(some_tokens * out_group * kNR));
  }
};

template <class Microkernel>
inline void run(const Plan& plan, Arena& arena, const Threads& threads) {
  const Problem& p = plan.p;
  const Items items(p, plan.rows.active, p.tokens, threads.count);
  const int64_t groups = items.groups;
  const Activate activate = activate_of<Microkernel>(p.activation);
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
        reinterpret_cast<float*>(scratch + Arena::space<int32_t>(kMC * kNR));
    steps.run(0, thread, kRowsAtOnce, [&](int64_t t) {
      quantize_token<Microkernel>(plan, t, reinterpret_cast<float*>(scratch));
    });
    for (int64_t i = 0; i < plan.pieces; ++i) {
      const Piece piece = plan.piece(i);
      const int at = a_piece * static_cast<int>(i);
      steps.run(at + gather, thread, kRowsAtOnce,
                [&](int64_t row) { gather_row(plan, piece, piece.begin + row); });
      steps.run(at + gate_ups, thread, 1, [&](int64_t item) {
        const int64_t e = piece.first + item / groups;
        const int64_t first = item % groups * items.group;
        gate_up<Microkernel>(plan, piece, activate, e, first,
                std::min(items.blocks, first + items.group), c);
        if (groups > 1) return;
        const int64_t end = std::min(piece.end, rows.start[e + 1]);
        for (int64_t row = std::max(piece.begin, rows.start[e]); row < end; ++row) {
          quantize_act<Microkernel>(plan, piece, row);
        }
      });
      steps.run(at + acts, thread, kRowsAtOnce,
                [&](int64_t row) {
                  quantize_act<Microkernel>(plan, piece, piece.begin + row);
                });
    }
    steps.run(last, thread, 1, [&](int64_t item) {
      const int64_t first = item / items.parts * items.out_group;
      const int64_t end = std::min(items.out_blocks, first + items.out_group);
      if (p.tokens == 1) return down_token<Microkernel>(plan, first, end, c, sum);
      const int64_t token = item % items.parts * items.some_tokens;
      down<Microkernel>(plan, first, end, std::min(p.tokens, token),
           std::min(p.tokens, token + items.some_tokens), c, sum);
    });
    Microkernel::end();
  });
}

// Most of a call's scratch, in bytes: of what a piece has, and of the rest, by which
// tokens are taken in chunks.
constexpr int64_t kPieceBytes = 24 << 20, kChunkBytes = 96 << 20;

// Products that keep a thread busy for longer than it takes to wake it.
constexpr int64_t kWorthAThread = 1 << 20;

template <class Microkernel>
inline void run_experts(const Problem& whole, const Threads& all) {
  static_assert(kMC % Microkernel::kReadsRows == 0);
  Plan plan;
  const int64_t work = whole.tokens * whole.top_k * 3 * whole.intermediate * whole.hidden;
  const Threads threads = {
      static_cast<int>(std::min<int64_t>(
          all.count, 1 + (work + kWorthAThread / 2) / kWorthAThread)),
      all.run};
  Problem& p = plan.p;
  const int64_t k1 = row_bytes(whole.w13), k2 = row_bytes(whole.w2);
  plan.act_stride = round_up(whole.intermediate, kHalf);
  const int64_t a_row = k1 + plan.act_stride * sizeof(float);
  const int64_t a_token = k1 + whole.top_k * (k2 + 16) +
                          threads.count * kMostBlocks * kNR * sizeof(float);
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
  // A microkernel reads kReadsRows rows or a multiple. Those past the last one are
  // here, whatever their bytes are: of what it makes of them nothing is read.
  const int64_t past = Microkernel::kReadsRows - 1;
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
    run<Microkernel>(plan, arena, threads);
  }
}

}  // namespace
}  // namespace int8_moe
