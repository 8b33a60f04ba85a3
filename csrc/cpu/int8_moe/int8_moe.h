// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// INT8 W8A8 routed experts on CPU, in plain C++ without PyTorch.
//
// A packed weight holds, for each expert in turn:
//   [columns / kNR, 2, k_padded / kKR, kHalf, kKR] int8   weights
//   [columns] int32                                       compensation
//   [columns] float32                                     scale
//   [columns] float32                                     bias
// Columns are output features. A block has kNR of them, in two halves of kHalf.
// kKR values of K lie side by side, as vpdpbusd, AMX tiles and sdot read them.
// A half of a block is contiguous, so a kernel streams it from memory.
// k_padded is K rounded up to kKAlign. Padded weights, scales and biases are 0.
// In w13 the left half of a block holds gates, the right half their ups.
// The compensation is 128 times a column's sum over K. Kernels that store
// activations unsigned, with a zero point of 128, subtract it from their sums.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace int8_moe {

constexpr int kNR = 32;             // columns of a block
constexpr int kHalf = kNR / 2;      // columns of half a block
constexpr int kKR = 4;              // values of K that lie side by side
constexpr int64_t kKAlign = 64;     // K is padded to multiples of it
constexpr int64_t kMaxK = 1 << 16;  // 255 * 128 * K has to fit an int32
constexpr int64_t kCacheLine = 64;  // bytes

enum class Dtype { f32, bf16, f16 };
enum class Activation { silu, gelu, gelu_tanh, swigluoai, swiglustep };
// The order of a weight's rows: plain keeps it. A gated weight has all gates
// before all ups (halves), or each gate before its up (interleaved).
enum class Order { plain, halves, interleaved };

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

struct Weight {
  int8_t* packed;
  int64_t columns;  // a multiple of kNR
  int64_t k;        // not padded

  int64_t k_padded() const { return round_up(k, kKAlign); }
  // Of one expert. It is a multiple of kCacheLine, as columns is one of kNR:
  // where `packed` is aligned to a line, so is every block.
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

// run calls body(context, i) once for each i of 0 .. count - 1.
struct Threads {
  int count;
  void (*run)(int count, void (*body)(void* context, int thread),
              void* context);
};

struct Problem {
  const void* x;  // [tokens, hidden], rows x_stride elements apart
  int64_t x_stride;
  void* out;  // [tokens, hidden], contiguous
  Dtype dtype;
  int64_t tokens, hidden, intermediate, experts, top_k;
  const float* topk_weights;  // [tokens, top_k]
  const int32_t* experts_of;  // [tokens, top_k], < experts; negative: no expert
  Weight w13, w2;
  Activation activation;
  float limit;            // of swiglustep and swigluoai
  const float* a1_scale;  // static scale of x; null: dynamic, per token
  const float* a2_scale;  // static scale of the activation; null: dynamic
  bool weight_on_input;   // top_k is 1: x is multiplied by its weight, in dtype
};

struct Router {
  const void* logits;  // [tokens, experts], contiguous
  Dtype dtype;
  int64_t tokens, experts, top_k;
  const float* bias;  // [experts], added for the selection only; or null
  bool softmax;       // false: sigmoid
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

// The instruction sets that this build and this processor have, best first. The
// last one runs everywhere. The variable VLLM_INT8_MOE_ISA caps the list: it
// then begins with the one that the variable names. Throws
// std::invalid_argument where the variable names none of this build's.
const std::vector<const Isa*>& isas();

// Packs weight [experts, rows, k] int8 with scale and bias [experts, rows] to
// `to`. bias may be null.
void pack(const int8_t* weight, const float* scale, const float* bias,
          int64_t experts, int64_t rows, Order order, const Weight& to,
          const Threads& threads);

}  // namespace int8_moe
