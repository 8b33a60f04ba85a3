// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// INT8 W8A8 routed experts on CPU: plain C++, knows nothing of PyTorch.
//
// A packed weight is one run of bytes an expert:
//   [columns / kNR, 2, k_padded / 4, kHalf, 4] int8   the weight
//   [columns] int32                                   compensation
//   [columns] float32                                 scale
//   [columns] float32                                 bias
// Columns (output features) lie in blocks of two halves, four values of K
// side by side: what vpdpbusd, AMX tiles and sdot read, and one stream through
// memory. k_padded is K rounded up to kKAlign; what is padded is zero. The halves of
// w13's blocks are gates and their ups. The compensation is 128 times a column's sum
// over K: what products with activations plus 128 are too large by.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace int8_moe {

constexpr int kNR = 32;             // columns of a block
constexpr int kHalf = kNR / 2;      // columns of half a block
constexpr int64_t kKAlign = 64;      // K is padded to multiples of this
constexpr int64_t kMaxK = 1 << 16;  // 255 * 128 * K has to fit an int32

enum class Dtype { f32, bf16, f16 };
enum class Activation { silu, gelu, gelu_tanh, swigluoai, swiglustep };
// Rows of a weight by the columns of its packed form: as they are, or kHalf gates
// and their ups a block, gates first in the weight or (interleaved) every other row.
enum class Order { plain, halves, interleaved };

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Weight {
  int8_t* packed;
  int64_t columns;  // padded
  int64_t k;        // not padded

  int64_t k_padded() const { return round_up(k, kKAlign); }
  // of an expert
  int64_t bytes() const { return columns * (k_padded() + 12); }
  int8_t* block(int64_t expert, int64_t index) const {
    return packed + expert * bytes() + index * kNR * k_padded();
  }
  int32_t* compensation(int64_t expert) const {
    return reinterpret_cast<int32_t*>(block(expert, columns / kNR));
  }
  float* scale(int64_t expert) const {
    return reinterpret_cast<float*>(compensation(expert) + columns);
  }
  float* bias(int64_t expert) const { return scale(expert) + columns; }
};

// Calls body(context, i) for i of 0 .. threads - 1, each once.
struct Threads {
  int count;
  void (*run)(int count, void (*body)(void* context, int thread), void* context);
};

struct Problem {
  const void* x;  // [tokens, hidden], rows x_stride elements apart
  int64_t x_stride;
  void* out;  // [tokens, hidden], contiguous
  Dtype dtype;
  int64_t tokens, hidden, intermediate, experts, top_k;
  const float* topk_weights;   // [tokens, top_k]
  const int32_t* experts_of;   // [tokens, top_k]: below experts; negative: none
  Weight w13, w2;
  Activation activation;
  float limit;             // of swiglustep and swigluoai
  const float* a1_scale;   // one static input scale, or null: per token
  const float* a2_scale;
  bool weight_on_input;    // top_k is 1: x times its weight, in x's dtype
};

struct Router {
  const void* logits;  // [tokens, experts], contiguous
  Dtype dtype;
  int64_t tokens, experts, top_k;
  const float* bias;  // [experts], added for the choice only; or null
  bool softmax;       // else sigmoid
  bool renormalize;
  float scale;
  float* weights;  // [tokens, top_k]
  int32_t* ids;    // [tokens, top_k]
};

struct Isa {
  const char* name;
  bool (*supported)();
  void (*experts)(const Problem&, const Threads&);
  void (*route)(const Router&, const Threads&);
};

// Those of this build that this processor has, best first; the last one runs
// everywhere. The variable VLLM_INT8_MOE_ISA caps them: those before the one that it
// names are left out. Throws std::invalid_argument where it names none of this build's.
const std::vector<const Isa*>& isas();

// weight [experts, rows, k] int8, scale and bias (or null) [experts, rows], to `to`.
void pack(const int8_t* weight, const float* scale, const float* bias,
          int64_t experts, int64_t rows, Order order, const Weight& to,
          const Threads& threads);

}  // namespace int8_moe
