// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// Routed experts on a Microkernel, the struct of one instruction set:
//   kZeroPoint       of quantized activations: 128 (unsigned) or 0 (signed)
//   kMAlign          gemm may read rows of a, and write rows of c, up to the
//                    next multiple of it
//   gemm(a, a_stride, block, k, m, next_block, c)
//                    a [m, k] times a block, to c [m, kNR] int32. It may
//                    prefetch next_block, which is most likely the next call's
//                    block. null: that one is in the cache, or not known.
//   gemv(a, half, k, c)
//                    a [k] times half a block, to c [kHalf] int32
//   finish_thread()  called by each thread after its last product
//
// The steps that threads share are: quantization of x, gate and up product,
// activation, its quantization, down product and weighted sum over the experts.
// A call is cut up as follows:
//   chunk   tokens, so many that the call's scratch is bounded
//   piece   rows of a chunk, so many that the activations between both products
//           are bounded; a piece may begin and end within an expert
//   item    what one thread takes of a step at a time
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

// M blocking: the rows of one expert whose int32 sums are in memory at once.
constexpr int64_t kMC = 192;
constexpr int64_t kMaxBlocksPerItem = 4;
constexpr int64_t kRowsPerItem = 4;  // of quantization
constexpr int64_t kMinTokensPerPart = 32;
// A down weight of all experts that stays in a core's cache, in bytes.
constexpr int64_t kMaxCachedDownBytes = 256 << 10;
// Where the weights of all experts stay in a core's cache, each thread serves a
// share of the tokens alone: with at least so many threads, tokens, and tokens
// of a share that is faster than steps that all threads share.
constexpr int64_t kMaxCachedBytes = 512 << 10;
constexpr int kMinThreadsForShares = 4;
constexpr int64_t kMinTokensForShares = 64, kMinTokensPerShare = 8;
// Fewer products do not keep a thread busy for as long as it takes to wake it.
constexpr int64_t kMinProductsPerThread = 1 << 20;
// Limits of a call's scratch, in bytes: of a piece's rows, and of a chunk.
constexpr int64_t kMaxPieceBytes = 24 << 20, kMaxChunkBytes = 96 << 20;

// A row is a pair of a token and one of its experts. Rows are sorted by expert,
// and by token within an expert.
struct Rows {
  int64_t count;
  int64_t active_experts;  // those that have rows
  int32_t* expert;         // [active_experts]
  int64_t* start;          // [active_experts + 1], first row of each
  int32_t* token;          // [count]
  float* weight;           // [count]
  int32_t* row_of;         // [tokens, top_k], negative: no expert
};

// The rows from begin to end, and the active experts that they belong to.
struct Piece {
  int64_t begin, end;
  int64_t first_expert, end_expert;
};

// A chunk's problem and scratch.
struct Plan {
  Problem problem;
  Rows rows;
  bool is_share;  // the problem is one thread's share of the tokens
  int64_t pieces, piece_rows;
  uint8_t* x_q;        // [tokens, row_bytes(w13)], if there are several pieces
  float* x_scale;      // [tokens]
  uint8_t* piece_x_q;  // [piece_rows, row_bytes(w13)], x_q by row
  float* act;          // [piece_rows, act_stride]
  uint8_t* act_q;      // [rows, row_bytes(w2)]
  float* act_scale;    // [rows]
  int64_t act_stride;

  Piece piece(int64_t index) const {
    Piece piece;
    piece.begin = rows.count * index / pieces;
    piece.end = rows.count * (index + 1) / pieces;
    piece.first_expert = piece.end_expert = 0;
    if (piece.begin == piece.end) return piece;
    int64_t* const end = rows.start + rows.active_experts;
    piece.first_expert =
        std::upper_bound(rows.start, end, piece.begin) - rows.start - 1;
    piece.end_expert =
        std::lower_bound(rows.start, end, piece.end) - rows.start;
    return piece;
  }
};

// The stride of quantized rows, an odd number of cache lines. With a multiple
// of 4096, as K often is one, the same column of many rows would lie in one set
// of the cache.
inline int64_t row_bytes(const Weight& w) { return w.k_padded() | kKAlign; }

// counts: [experts], scratch
inline void sort_rows(const Problem& p, Rows& rows, int64_t* counts) {
  const int64_t pairs = p.tokens * p.top_k;
  std::fill(counts, counts + p.experts, 0);
  for (int64_t i = 0; i < pairs; ++i) {
    if (p.experts_of[i] >= 0) ++counts[p.experts_of[i]];
  }
  int64_t* const next_row = counts;  // of each expert, from here on
  rows.active_experts = rows.count = 0;
  for (int64_t e = 0; e < p.experts; ++e) {
    const int64_t count = counts[e];
    next_row[e] = rows.count;
    if (count == 0) continue;
    rows.expert[rows.active_experts] = static_cast<int32_t>(e);
    rows.start[rows.active_experts++] = rows.count;
    rows.count += count;
  }
  rows.start[rows.active_experts] = rows.count;
  for (int64_t t = 0, i = 0; t < p.tokens; ++t) {
    for (int64_t k = 0; k < p.top_k; ++k, ++i) {
      const int32_t expert = p.experts_of[i];
      rows.row_of[i] = -1;
      if (expert < 0) continue;
      const int64_t row = next_row[expert]++;
      rows.row_of[i] = static_cast<int32_t>(row);
      rows.token[row] = static_cast<int32_t>(t);
      rows.weight[row] = p.topk_weights[i];
    }
  }
}

// x: [hidden]. The product is rounded to the dtype of the input, as in PyTorch.
inline void multiply_by_weight(const Problem& p, int64_t token, float* x) {
  float weight = p.topk_weights[token];
  uint16_t buffer[1024];
  if (p.dtype != Dtype::f32) {
    convert_from_float(&weight, p.dtype, 1, buffer);
    convert_to_float(buffer, p.dtype, 1, &weight);
  }
  for (int64_t i = 0; i < p.hidden; ++i) x[i] *= weight;
  for (int64_t i = 0; p.dtype != Dtype::f32 && i < p.hidden; i += 1024) {
    const int64_t n = std::min<int64_t>(1024, p.hidden - i);
    convert_from_float(x + i, p.dtype, n, buffer);
    convert_to_float(buffer, p.dtype, n, x + i);
  }
}

// Quantizes a token's x: to each of its rows where there is one piece, or else
// to x_q, from which gather_row copies it. x: [hidden], scratch
template <class Microkernel>
inline void quantize_token(const Plan& plan, int64_t token, float* x) {
  const Problem& p = plan.problem;
  const int64_t k_padded = p.w13.k_padded(), stride = row_bytes(p.w13);
  const int32_t* rows = plan.rows.row_of + token * p.top_k;
  const int32_t* end = rows + p.top_k;
  const int32_t* first =
      std::find_if(rows, end, [](int32_t row) { return row >= 0; });
  if (first == end) return;
  convert_to_float(static_cast<const char*>(p.x) +
                       token * p.x_stride * element_size(p.dtype),
                   p.dtype, p.hidden, x);
  if (p.weight_on_input) multiply_by_weight(p, token, x);
  const bool one_piece = plan.pieces == 1;
  uint8_t* q =
      one_piece ? plan.piece_x_q + *first * stride : plan.x_q + token * stride;
  plan.x_scale[token] = quantize_row<Microkernel::kZeroPoint>(
      x, p.hidden, k_padded, p.a1_scale, q);
  if (!one_piece) return;
  for (const int32_t* row = first + 1; row < end; ++row) {
    if (*row >= 0) std::memcpy(plan.piece_x_q + *row * stride, q, k_padded);
  }
}

// Copies the quantized x of a row's token to the row's place in its piece.
inline void gather_row(const Plan& plan, const Piece& piece, int64_t row) {
  const Weight& w = plan.problem.w13;
  const int64_t stride = row_bytes(w);
  std::memcpy(plan.piece_x_q + (row - piece.begin) * stride,
              plan.x_q + plan.rows.token[row] * stride, w.k_padded());
}

// Dequantizes the int32 sums of a block's columns from first_column on:
// (sum - compensation) * row_scale * scale + bias.
template <class Microkernel>
struct Dequantizer {
  const float *scale, *bias;
  const int32_t* compensation;

  Dequantizer(const Weight& w, int64_t expert, int64_t block,
              int64_t first_column = 0)
      : scale(w.scale(expert) + block * kNR + first_column),
        bias(w.bias(expert) + block * kNR + first_column),
        compensation(Microkernel::kZeroPoint
                         ? w.compensation(expert) + block * kNR + first_column
                         : kNoCompensation) {}
  // kLanes columns from j on.
  Floats dequantize(const int32_t* sums, Floats row_scale, int j) const {
    return load_difference(sums + j, compensation + j) *
               (row_scale * load_floats(scale + j)) +
           load_floats(bias + j);
  }

  static constexpr int32_t kNoCompensation[kNR] = {};
};

// Rows of one expert. act is that of the row `begin`.
struct ExpertRows {
  int64_t expert, begin, end;
  float* act;
};

// sums: [rows, kNR]
template <class Microkernel, Activation kActivation>
void activate_block(const Plan& plan, const ExpertRows& rows, int64_t block,
                    const int32_t* sums) {
  const Problem& p = plan.problem;
  const Dequantizer<Microkernel> columns(p.w13, rows.expert, block);
  const float limit = p.limit;
  for (int64_t row = rows.begin; row < rows.end; ++row, sums += kNR) {
    const float x_scale = plan.x_scale[plan.rows.token[row]];
    alignas(kCacheLine) float act[kHalf];
    for (int j = 0; j < kHalf; j += kLanes) {
      const Floats gate = columns.dequantize(sums, x_scale, j);
      const Floats up = columns.dequantize(sums, x_scale, kHalf + j);
      store_floats(activate<kActivation>(gate, up, limit), act + j);
    }
    std::memcpy(rows.act + (row - rows.begin) * plan.act_stride + block * kHalf,
                act, sizeof(act));
  }
}

using ActivateBlock = void (*)(const Plan&, const ExpertRows&, int64_t,
                               const int32_t*);

template <class Microkernel>
inline ActivateBlock select_activate_block(Activation activation) {
  using A = Activation;
  switch (activation) {
    case A::silu:
      return activate_block<Microkernel, A::silu>;
    case A::gelu:
      return activate_block<Microkernel, A::gelu>;
    case A::gelu_tanh:
      return activate_block<Microkernel, A::gelu_tanh>;
    case A::swigluoai:
      return activate_block<Microkernel, A::swigluoai>;
    case A::swiglustep:
      return activate_block<Microkernel, A::swiglustep>;
  }
  return nullptr;
}

template <class Microkernel>
inline void quantize_act(const Plan& plan, const Piece& piece, int64_t row) {
  const Problem& p = plan.problem;
  plan.act_scale[row] = quantize_row<Microkernel::kZeroPoint>(
      plan.act + (row - piece.begin) * plan.act_stride, p.intermediate,
      p.w2.k_padded(), p.a2_scale, plan.act_q + row * row_bytes(p.w2));
}

// The gate and up product and the activation: the blocks from first_block to
// end_block of the active expert e, for all of its rows in a piece.
// sums: [kMC, kNR], scratch
template <class Microkernel>
inline void compute_gate_up(const Plan& plan, const Piece& piece,
                            ActivateBlock activate_block, int64_t e,
                            int64_t first_block, int64_t end_block,
                            int32_t* sums) {
  const Weight& w = plan.problem.w13;
  const int64_t stride = row_bytes(w);
  const int64_t begin = std::max(piece.begin, plan.rows.start[e]);
  const int64_t end = std::min(piece.end, plan.rows.start[e + 1]);
  for (int64_t row = begin; row < end; row += kMC) {
    const int64_t row_in_piece = row - piece.begin;
    const ExpertRows rows = {plan.rows.expert[e], row, std::min(end, row + kMC),
                             plan.act + row_in_piece * plan.act_stride};
    const int64_t m = rows.end - row;
    const int64_t m_aligned = round_up(m, Microkernel::kMAlign);
    // Where rows are few, the products of several blocks come first, and then
    // the activations of all of them: there the processor overlaps the
    // latencies of independent rows.
    const int64_t batch = kMC / m_aligned;
    for (int64_t block = first_block; block < end_block; block += batch) {
      const int64_t n = std::min(batch, end_block - block);
      for (int64_t i = 0; i < n; ++i) {
        // The expert's first rows bring its blocks into the cache, where later
        // rows find them. Its last rows' last block is most often followed by
        // the next item's first block, which lies behind it.
        const bool prefetch_next =
            block + i + 1 < end_block ? row == begin : rows.end == end;
        Microkernel::gemm(
            plan.piece_x_q + row_in_piece * stride, stride,
            w.block(rows.expert, block + i), w.k_padded(), m,
            prefetch_next ? w.block(rows.expert, block + i + 1) : nullptr,
            sums + i * m_aligned * kNR);
      }
      for (int64_t i = 0; i < n; ++i) {
        activate_block(plan, rows, block + i, sums + i * m_aligned * kNR);
      }
    }
  }
}

// Adds `count` columns of a row's weighted down product to its token's output.
template <class Microkernel>
inline void add_weighted(const Plan& plan,
                         const Dequantizer<Microkernel>& columns, int64_t row,
                         int count, const int32_t* sums, float* out) {
  const float act_scale = plan.act_scale[row];
  const float weight =
      plan.problem.weight_on_input ? 1.0f : plan.rows.weight[row];
  for (int j = 0; j < count; j += kLanes) {
    store_floats(
        load_floats(out + j) + columns.dequantize(sums, act_scale, j) * weight,
        out + j);
  }
}

// The down product and its weighted sum: the blocks from first_block to
// end_block of all experts, for the tokens from first_token to end_token. One
// thread sums a token's columns, in the order of the experts. So the result
// does not depend on the number of threads.
// sums: [kMC, kNR], out: [tokens, width], scratch
template <class Microkernel>
inline void compute_down(const Plan& plan, int64_t first_block,
                         int64_t end_block, int64_t first_token,
                         int64_t end_token, int32_t* sums, float* out) {
  const Problem& p = plan.problem;
  const Weight& w = p.w2;
  const Rows& rows = plan.rows;
  const int64_t stride = row_bytes(w), width = (end_block - first_block) * kNR;
  const int64_t tokens = end_token - first_token;
  std::fill(out, out + tokens * width, 0.0f);
  for (int64_t e = 0; e < rows.active_experts; ++e) {
    const int64_t expert = rows.expert[e];
    int64_t begin = rows.start[e], end = rows.start[e + 1];
    if (tokens < p.tokens) {
      const auto find_row = [&](int64_t token) {
        return std::lower_bound(rows.token + rows.start[e],
                                rows.token + rows.start[e + 1], token) -
               rows.token;
      };
      begin = find_row(first_token);
      end = find_row(end_token);
    }
    for (int64_t row = begin; row < end; row += kMC) {
      const int64_t m = std::min(kMC, end - row);
      const int64_t next_expert =
          row + kMC < end || e + 1 == rows.active_experts ? expert
                                                          : rows.expert[e + 1];
      for (int64_t block = first_block; block < end_block; ++block) {
        Microkernel::gemm(plan.act_q + row * stride, stride,
                          w.block(expert, block), w.k_padded(), m,
                          block + 1 < end_block
                              ? w.block(expert, block + 1)
                              : w.block(next_expert, first_block),
                          sums);
        const Dequantizer<Microkernel> columns(w, expert, block);
        for (int64_t r = 0; r < m; ++r) {
          float* out_row = out + (rows.token[row + r] - first_token) * width +
                           (block - first_block) * kNR;
          add_weighted(plan, columns, row + r, kNR, sums + r * kNR, out_row);
        }
      }
    }
  }
  const int64_t columns =
      std::min(p.hidden, end_block * kNR) - first_block * kNR;
  for (int64_t t = 0; t < tokens; ++t) {
    convert_from_float(out + t * width, p.dtype, columns,
                       static_cast<char*>(p.out) +
                           ((first_token + t) * p.hidden + first_block * kNR) *
                               element_size(p.dtype));
  }
}

// compute_down for a single token, by halves of blocks: whole blocks are too
// few to share evenly among many threads.
// sums: [kHalf], out: [end_half - first_half, kHalf], scratch
template <class Microkernel>
inline void compute_down_of_one_token(const Plan& plan, int64_t first_half,
                                      int64_t end_half, int32_t* sums,
                                      float* out) {
  const Problem& p = plan.problem;
  const Weight& w = p.w2;
  const Rows& rows = plan.rows;
  const int64_t stride = row_bytes(w), k = w.k_padded();
  std::fill(out, out + (end_half - first_half) * kHalf, 0.0f);
  for (int64_t e = 0; e < rows.active_experts; ++e) {
    const int64_t expert = rows.expert[e];
    for (int64_t row = rows.start[e]; row < rows.start[e + 1]; ++row) {
      for (int64_t half = first_half; half < end_half; ++half) {
        const int64_t block = half / 2, first_column = half % 2 * kHalf;
        Microkernel::gemv(plan.act_q + row * stride,
                          w.block(expert, block) + first_column * k, k, sums);
        const Dequantizer<Microkernel> columns(w, expert, block, first_column);
        add_weighted(plan, columns, row, kHalf, sums,
                     out + (half - first_half) * kHalf);
      }
    }
  }
  // The last half may be padding only: then no column is left.
  const int64_t columns =
      std::min(p.hidden, end_half * kHalf) - first_half * kHalf;
  convert_from_float(
      out, p.dtype, std::max<int64_t>(0, columns),
      static_cast<char*>(p.out) + first_half * kHalf * element_size(p.dtype));
}

// The blocks of an item: fewer where there would be too few items to share.
inline int64_t choose_blocks_per_item(int64_t blocks, int64_t experts,
                                      int threads) {
  int64_t per_item = kMaxBlocksPerItem;
  while (per_item > 1 && experts * (blocks / per_item) < 4 * threads) {
    per_item /= 2;
  }
  return per_item;
}

// The parts that tokens are cut into, where blocks alone are too few to share.
inline int64_t choose_token_parts(int64_t tokens, int64_t block_groups,
                                  int threads) {
  const int64_t parts = (4 * threads + block_groups - 1) / block_groups;
  return std::max<int64_t>(1, std::min(parts, tokens / kMinTokensPerPart));
}

// How both products are cut into items.
struct Items {
  // An item of the gate and up product is a group of blocks of one expert.
  int64_t blocks, blocks_per_item, groups;
  // An item of the down product is a group of blocks for a part of the tokens.
  // For a single token the blocks are halves.
  int64_t down_blocks, down_blocks_per_item, down_groups;
  int64_t parts, tokens_per_part;
  size_t scratch_bytes;  // per thread

  // is_share: of the tokens that one thread serves alone.
  Items(const Problem& p, int64_t active_experts, int64_t tokens, int threads,
        bool is_share) {
    blocks = p.w13.columns / kNR;
    blocks_per_item = choose_blocks_per_item(blocks, active_experts, threads);
    groups = (blocks + blocks_per_item - 1) / blocks_per_item;
    down_blocks = p.w2.columns / kNR * (tokens == 1 ? 2 : 1);
    down_blocks_per_item = choose_blocks_per_item(down_blocks, 1, threads);
    // Parts of the tokens share a weight in the cache at no cost. So there the
    // blocks of an item are many, and each row is looked up fewer times.
    if (!is_share && p.experts * p.w2.bytes() <= kMaxCachedDownBytes &&
        tokens >= kMinTokensPerPart * threads) {
      down_blocks_per_item = kMaxBlocksPerItem;
    }
    down_groups =
        (down_blocks + down_blocks_per_item - 1) / down_blocks_per_item;
    parts = choose_token_parts(tokens, down_groups, threads);
    tokens_per_part = (tokens + parts - 1) / parts;
    // A thread needs quantize_token's x, and later sums and outputs.
    scratch_bytes =
        std::max(Arena::padded_bytes<float>(p.hidden),
                 Arena::padded_bytes<int32_t>(kMC * kNR) +
                     Arena::padded_bytes<float>(tokens_per_part *
                                                down_blocks_per_item * kNR));
  }
};

// The indices of a plan's steps: quantization of x, then three steps per piece,
// then the down product.
constexpr int kStepsPerPiece = 3;
constexpr int count_steps(int64_t pieces) {
  return 2 + kStepsPerPiece * static_cast<int>(pieces);
}
struct PieceSteps {
  int gather, gate_up, quantize;

  explicit PieceSteps(int64_t piece) {
    gather = 1 + kStepsPerPiece * static_cast<int>(piece);
    gate_up = gather + 1;
    quantize = gather + 2;
  }
};

template <class Microkernel>
inline void run_plan(const Plan& plan, Arena& arena, const Threads& threads) {
  const Problem& p = plan.problem;
  const Items items(p, plan.rows.active_experts, p.tokens, threads.count,
                    plan.is_share);
  const int64_t groups = items.groups;
  const ActivateBlock activate_block =
      select_activate_block<Microkernel>(p.activation);
  const Rows& rows = plan.rows;
  const int quantize_x = 0, down = count_steps(plan.pieces) - 1;
  Arena::Scope scope(arena);
  Steps steps(arena, count_steps(plan.pieces), threads.count);
  char* const scratch =
      arena.allocate<char>(items.scratch_bytes * threads.count);
  steps.assign_evenly(quantize_x, p.tokens);
  for (int64_t i = 0; i < plan.pieces; ++i) {
    const Piece piece = plan.piece(i);
    const int64_t piece_rows = piece.end - piece.begin;
    const PieceSteps step(i);
    steps.assign_evenly(step.gather, plan.pieces == 1 ? 0 : piece_rows);
    if (groups == 1 && plan.pieces == 1) {
      // An expert's thread does not depend on which other experts have rows.
      steps.assign(step.gate_up, [&](int t) {
        const int64_t end_expert = p.experts * (t + 1) / threads.count;
        return std::lower_bound(rows.expert, rows.expert + rows.active_experts,
                                end_expert) -
               rows.expert;
      });
    } else {
      steps.assign_evenly(step.gate_up,
                          (piece.end_expert - piece.first_expert) * groups);
    }
    steps.assign_evenly(step.quantize, groups == 1 ? 0 : piece_rows);
  }
  steps.assign_evenly(down, items.down_groups * items.parts);
  run_on_threads(threads, [&](int thread) {
    char* const thread_scratch = scratch + items.scratch_bytes * thread;
    int32_t* const sums = reinterpret_cast<int32_t*>(thread_scratch);
    float* const out = reinterpret_cast<float*>(
        thread_scratch + Arena::padded_bytes<int32_t>(kMC * kNR));
    steps.run(quantize_x, thread, kRowsPerItem, [&](int64_t token) {
      quantize_token<Microkernel>(plan, token,
                                  reinterpret_cast<float*>(thread_scratch));
    });
    for (int64_t i = 0; i < plan.pieces; ++i) {
      const Piece piece = plan.piece(i);
      const PieceSteps step(i);
      steps.run(step.gather, thread, kRowsPerItem, [&](int64_t row) {
        gather_row(plan, piece, piece.begin + row);
      });
      steps.run(step.gate_up, thread, 1, [&](int64_t item) {
        const int64_t e = piece.first_expert + item / groups;
        const int64_t first_block = item % groups * items.blocks_per_item;
        compute_gate_up<Microkernel>(
            plan, piece, activate_block, e, first_block,
            std::min(items.blocks, first_block + items.blocks_per_item), sums);
        if (groups > 1) return;
        // The item computed whole rows. The step that quantizes them is empty.
        const int64_t end = std::min(piece.end, rows.start[e + 1]);
        for (int64_t row = std::max(piece.begin, rows.start[e]); row < end;
             ++row) {
          quantize_act<Microkernel>(plan, piece, row);
        }
      });
      steps.run(step.quantize, thread, kRowsPerItem, [&](int64_t row) {
        quantize_act<Microkernel>(plan, piece, piece.begin + row);
      });
    }
    steps.run(down, thread, 1, [&](int64_t item) {
      const int64_t first_block =
          item / items.parts * items.down_blocks_per_item;
      const int64_t end_block =
          std::min(items.down_blocks, first_block + items.down_blocks_per_item);
      if (p.tokens == 1) {
        return compute_down_of_one_token<Microkernel>(plan, first_block,
                                                      end_block, sums, out);
      }
      const int64_t token = item % items.parts * items.tokens_per_part;
      compute_down<Microkernel>(
          plan, first_block, end_block, std::min(p.tokens, token),
          std::min(p.tokens, token + items.tokens_per_part), sums, out);
    });
    Microkernel::finish_thread();
  });
}

// How a problem is cut into chunks and pieces, and the scratch that it needs.
struct Chunks {
  int64_t tokens, piece_rows;
  int64_t x_q_bytes, piece_x_q_bytes, act_q_bytes, act_floats;
  int64_t act_stride;
  bool is_share;
  size_t bytes;

  // extra_rows: gemm reads rows up to the next multiple of kMAlign. So the
  // arrays of rows have kMAlign - 1 more, and no read is outside of them. The
  // bytes there are arbitrary: a row of the product depends on its own row
  // only, and nothing reads the products of rows past the last one.
  // shares: the problems that have to stay within the limits together.
  Chunks(const Problem& p, int threads, int64_t extra_rows, int64_t shares) {
    const int64_t x_row_bytes = row_bytes(p.w13);
    const int64_t act_row_bytes = row_bytes(p.w2);
    act_stride = round_up(p.intermediate, kHalf);
    is_share = shares > 1;
    const int64_t piece_row_bytes = x_row_bytes + act_stride * sizeof(float);
    // A row's int32 are its token and row_of, its floats weight and act_scale.
    const int64_t bytes_per_token =
        x_row_bytes +
        p.top_k *
            (act_row_bytes + int64_t{2 * sizeof(int32_t) + 2 * sizeof(float)}) +
        threads * kMaxBlocksPerItem * kNR * sizeof(float);
    const int64_t max_chunk_bytes = kMaxChunkBytes / shares;
    const int64_t chunks =
        (p.tokens * bytes_per_token + max_chunk_bytes - 1) / max_chunk_bytes;
    tokens = (p.tokens + chunks - 1) / chunks;
    const int64_t max_rows = tokens * p.top_k;
    piece_rows = std::clamp<int64_t>(kMaxPieceBytes / shares / piece_row_bytes,
                                     1, max_rows);
    const bool several_pieces = piece_rows < max_rows;
    const int64_t max_pieces = (max_rows + piece_rows - 1) / piece_rows;
    // The last chunk is smaller, and may be cut into larger items.
    const int64_t last_chunk_tokens = (p.tokens - 1) % tokens + 1;
    const size_t thread_bytes = std::max(
        Items(p, 1, tokens, threads, is_share).scratch_bytes,
        Items(p, 1, last_chunk_tokens, threads, is_share).scratch_bytes);
    x_q_bytes = several_pieces ? tokens * x_row_bytes : 0;
    piece_x_q_bytes = (piece_rows + extra_rows) * x_row_bytes;
    act_q_bytes = (max_rows + extra_rows) * act_row_bytes;
    act_floats = piece_rows * act_stride;
    bytes = Steps::scratch_bytes(count_steps(max_pieces), threads) +
            thread_bytes * threads + Arena::padded_bytes<int64_t>(p.experts) +
            Arena::padded_bytes<int32_t>(p.experts) +
            Arena::padded_bytes<int64_t>(p.experts + 1) +
            2 * Arena::padded_bytes<int32_t>(max_rows) +
            2 * Arena::padded_bytes<float>(max_rows) +
            Arena::padded_bytes<float>(tokens) +
            Arena::padded_bytes<uint8_t>(x_q_bytes) +
            Arena::padded_bytes<uint8_t>(piece_x_q_bytes) +
            Arena::padded_bytes<uint8_t>(act_q_bytes) +
            Arena::padded_bytes<float>(act_floats);
  }
};

// The tokens from begin to end of a problem.
inline Problem select_tokens(const Problem& problem, int64_t begin,
                             int64_t end) {
  Problem p = problem;
  p.tokens = end - begin;
  p.x = static_cast<const char*>(problem.x) +
        begin * problem.x_stride * element_size(p.dtype);
  p.out = static_cast<char*>(problem.out) +
          begin * problem.hidden * element_size(p.dtype);
  p.topk_weights = problem.topk_weights + begin * problem.top_k;
  p.experts_of = problem.experts_of + begin * problem.top_k;
  return p;
}

template <class Microkernel>
inline void run_chunks(const Problem& problem, const Chunks& chunks,
                       Arena& arena, const Threads& threads) {
  const int64_t max_rows = chunks.tokens * problem.top_k;
  Plan plan;
  plan.is_share = chunks.is_share;
  plan.piece_rows = chunks.piece_rows;
  plan.act_stride = chunks.act_stride;
  int64_t* counts = arena.allocate<int64_t>(problem.experts);
  plan.rows.expert = arena.allocate<int32_t>(problem.experts);
  plan.rows.start = arena.allocate<int64_t>(problem.experts + 1);
  plan.rows.token = arena.allocate<int32_t>(max_rows);
  plan.rows.row_of = arena.allocate<int32_t>(max_rows);
  plan.rows.weight = arena.allocate<float>(max_rows);
  plan.x_scale = arena.allocate<float>(chunks.tokens);
  plan.act_scale = arena.allocate<float>(max_rows);
  plan.x_q = arena.allocate<uint8_t>(chunks.x_q_bytes);
  plan.piece_x_q = arena.allocate<uint8_t>(chunks.piece_x_q_bytes);
  plan.act_q = arena.allocate<uint8_t>(chunks.act_q_bytes);
  plan.act = arena.allocate<float>(chunks.act_floats);
  for (int64_t token = 0; token < problem.tokens; token += chunks.tokens) {
    plan.problem = select_tokens(
        problem, token, std::min(problem.tokens, token + chunks.tokens));
    sort_rows(plan.problem, plan.rows, counts);
    plan.pieces = std::max<int64_t>(
        1, (plan.rows.count + plan.piece_rows - 1) / plan.piece_rows);
    run_plan<Microkernel>(plan, arena, threads);
  }
}

template <class Microkernel>
inline void run_experts(const Problem& problem, const Threads& all_threads) {
  // Products of up to kMC rows are rounded up to kMAlign rows, and stay within
  // the scratch [kMC, kNR].
  static_assert(kMC % Microkernel::kMAlign == 0);
  constexpr int64_t kExtraRows = Microkernel::kMAlign - 1;
  const int64_t products = problem.tokens * problem.top_k * 3 *
                           problem.intermediate * problem.hidden;
  const Threads threads = {
      static_cast<int>(std::min<int64_t>(
          all_threads.count,
          1 + (products + kMinProductsPerThread / 2) / kMinProductsPerThread)),
      all_threads.run};
  const bool by_shares =
      threads.count >= kMinThreadsForShares &&
      problem.tokens >= kMinTokensForShares &&
      problem.experts * (problem.w13.bytes() + problem.w2.bytes()) <=
          kMaxCachedBytes;
  const int64_t shares =
      by_shares ? std::min<int64_t>(threads.count,
                                    problem.tokens / kMinTokensPerShare)
                : 1;
  if (shares <= 1) {
    const Chunks chunks(problem, threads.count, kExtraRows, 1);
    Arena arena(chunks.bytes);
    return run_chunks<Microkernel>(problem, chunks, arena, threads);
  }
  const int64_t share_tokens = (problem.tokens + shares - 1) / shares;
  const int64_t last_begin = (problem.tokens - 1) / share_tokens * share_tokens;
  const auto select_chunks = [&](int64_t begin) {
    return Chunks(select_tokens(problem, begin,
                                std::min(problem.tokens, begin + share_tokens)),
                  1, kExtraRows, shares);
  };
  const Chunks chunks = select_chunks(0),
               last_chunks = select_chunks(last_begin);
  const size_t share_bytes = std::max(chunks.bytes, last_chunks.bytes);
  Arena arena(share_bytes * shares);
  char* const scratch = arena.allocate<char>(share_bytes * shares);
  run_on_threads({static_cast<int>(shares), threads.run}, [&](int thread) {
    const int64_t begin = thread * share_tokens;
    if (begin > last_begin) return;
    Arena share(scratch + thread * share_bytes);
    run_chunks<Microkernel>(
        select_tokens(problem, begin,
                      std::min(problem.tokens, begin + share_tokens)),
        begin == last_begin ? last_chunks : chunks, share, {1, nullptr});
  });
}

}  // namespace
}  // namespace int8_moe
