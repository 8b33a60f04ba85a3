// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// The operators' schemas, on PyTorch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "int8_moe.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace int8_moe;

// std::invalid_argument is a ValueError in Python.
void check(bool holds, const std::string& otherwise) {
  if (!holds) throw std::invalid_argument(otherwise);
}

const Threads threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int count, void (*body)(void*, int), void* context) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context, static_cast<int>(i));
            });
          }};
}

const Isa& isa_of(const std::string& name) {
  for (size_t i = 0; i < kIsaCount; ++i) {
    if (!name.empty() && name != kIsas[i]->name) continue;
    if (kIsas[i]->supported()) return *kIsas[i];
  }
  throw std::invalid_argument("INT8 experts: this processor or build has no " + name);
}

Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default:
      throw std::invalid_argument(
          std::string(name) + " has to be float32, bfloat16 or float16");
  }
}

template <typename T>
T* data(const Tensor& tensor, ScalarType dtype, std::vector<int64_t> shape,
        const char* name) {
  bool fits = tensor.scalar_type() == dtype && tensor.is_contiguous() &&
              tensor.dim() == static_cast<int64_t>(shape.size()) && tensor.is_cpu();
  std::string wanted;
  for (size_t i = 0; i < shape.size(); ++i) {
    fits = fits && tensor.size(static_cast<int64_t>(i)) == shape[i];
    wanted += (i ? ", " : "") + std::to_string(shape[i]);
  }
  check(fits, std::string(name) + " has to be a contiguous CPU tensor [" + wanted +
                  "] of its dtype");
  return static_cast<T*>(tensor.data_ptr());
}

template <typename T>
T* data(const std::optional<Tensor>& tensor, ScalarType dtype,
        std::vector<int64_t> shape, const char* name) {
  return tensor ? data<T>(*tensor, dtype, std::move(shape), name) : nullptr;
}

std::vector<std::string> isas() {
  std::vector<std::string> found;
  for (size_t i = 0; i < kIsaCount; ++i) {
    if (kIsas[i]->supported()) found.push_back(kIsas[i]->name);
  }
  return found;
}

std::tuple<Tensor, Tensor> pack_weight(const Tensor& weight, const Tensor& order) {
  check(weight.dim() == 3 && weight.scalar_type() == ScalarType::Char &&
            weight.is_contiguous() && weight.is_cpu(),
        "weight has to be a contiguous CPU tensor [E, N, K] int8");
  const int64_t experts = weight.size(0), rows = weight.size(1), k = weight.size(2);
  check(order.dim() == 1 && order.size(0) % kBlock == 0,
        "order has to be [columns], a multiple of 32 of them");
  check(k > 0 && k <= kMaxK, "K has to be between 1 and 65536");
  const int64_t columns = order.size(0);
  const int32_t* rows_of = data<int32_t>(order, ScalarType::Int, {columns}, "order");
  for (int64_t i = 0; i < columns; ++i) {
    check(rows_of[i] < rows, "order names row " + std::to_string(rows_of[i]) +
                                 " of " + std::to_string(rows));
  }
  Tensor packed = torch::stable::new_empty(
      weight, {experts, columns / kBlock, round_up(k, kGroup) / 4, kBlock, 4});
  Tensor sums = torch::stable::new_empty(weight, {experts, columns}, ScalarType::Int);
  pack(static_cast<const int8_t*>(weight.data_ptr()), experts, rows, k, rows_of,
       columns, static_cast<int8_t*>(packed.data_ptr()),
       static_cast<int32_t*>(sums.data_ptr()), threads());
  return {packed, sums};
}

Weight weight_of(const Tensor& packed, const Tensor& sums, const Tensor& scale,
                 const std::optional<Tensor>& bias, int64_t experts, int64_t k,
                 const char* name) {
  check(packed.dim() == 5, std::string(name) + " has to be packed");
  const int64_t columns = packed.size(1) * kBlock;
  Weight w;
  w.packed = data<int8_t>(packed, ScalarType::Char,
                          {experts, columns / kBlock, round_up(k, kGroup) / 4, kBlock, 4},
                          name);
  w.sums = data<int32_t>(sums, ScalarType::Int, {experts, columns}, "sums");
  w.scale = data<float>(scale, ScalarType::Float, {experts, columns}, "scale");
  w.bias = data<float>(bias, ScalarType::Float, {experts, columns}, "bias");
  w.columns = columns;
  w.k = k;
  return w;
}

Tensor experts(const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids,
               const Tensor& w13, const Tensor& w13_sums, const Tensor& w13_scale,
               const std::optional<Tensor>& w13_bias, const Tensor& w2,
               const Tensor& w2_sums, const Tensor& w2_scale,
               const std::optional<Tensor>& w2_bias, int64_t intermediate,
               std::string activation, double limit,
               const std::optional<Tensor>& a1_scale,
               const std::optional<Tensor>& a2_scale,
               const std::optional<Tensor>& expert_map, bool weight_on_input,
               std::string isa) {
  static const std::vector<std::string> kNames = {"silu", "gelu", "gelu_tanh",
                                                  "swigluoai", "swiglustep"};
  Problem p;
  check(x.dim() == 2 && x.is_cpu(), "x has to be a CPU tensor [T, K]");
  p.dtype = dtype_of(x, "x");
  const Tensor rows = x.stride(1) == 1 ? x : torch::stable::contiguous(x);
  p.tokens = x.size(0);
  p.hidden = x.size(1);
  p.x = rows.data_ptr();
  p.x_stride = rows.stride(0);
  check(topk_ids.dim() == 2 && w13.dim() == 5 && intermediate > 0,
        "topk_ids has to be [T, k], w13 packed, intermediate positive");
  p.top_k = topk_ids.size(1);
  p.experts = w13.size(0);
  p.intermediate = intermediate;
  p.topk_weights = data<float>(topk_weights, ScalarType::Float, {p.tokens, p.top_k},
                               "topk_weights");
  p.w13 = weight_of(w13, w13_sums, w13_scale, w13_bias, p.experts, p.hidden, "w13");
  p.w2 = weight_of(w2, w2_sums, w2_scale, w2_bias, p.experts, intermediate, "w2");
  check(p.w13.columns == round_up(intermediate, 16) * 2 &&
            p.w2.columns == round_up(p.hidden, kBlock),
        "w13 and w2 do not fit x and intermediate");
  size_t kind = 0;
  while (kind < kNames.size() && kNames[kind] != activation) ++kind;
  check(kind < kNames.size(), "no activation " + activation);
  p.activation = static_cast<Activation>(kind);
  p.limit = static_cast<float>(limit);
  p.a1_scale = a1_scale ? data<float>(torch::stable::reshape(*a1_scale, {-1}),
                                      ScalarType::Float, {1}, "a1_scale")
                        : nullptr;
  p.a2_scale = a2_scale ? data<float>(torch::stable::reshape(*a2_scale, {-1}),
                                      ScalarType::Float, {1}, "a2_scale")
                        : nullptr;
  p.weight_on_input = weight_on_input;
  check(!weight_on_input || p.top_k == 1,
        "router weights on the input take one expert a token");

  // ids of this rank's experts, checked
  const bool wide = topk_ids.scalar_type() == ScalarType::Long;
  const void* ids =
      wide ? static_cast<void*>(data<int64_t>(topk_ids, ScalarType::Long,
                                              {p.tokens, p.top_k}, "topk_ids"))
           : static_cast<void*>(data<int32_t>(topk_ids, ScalarType::Int,
                                              {p.tokens, p.top_k}, "topk_ids"));
  const int64_t known = expert_map ? expert_map->size(0) : p.experts;
  const int32_t* map = data<int32_t>(expert_map, ScalarType::Int, {known}, "expert_map");
  thread_local std::vector<int32_t> experts_of;
  experts_of.resize(p.tokens * p.top_k);
  for (size_t i = 0; i < experts_of.size(); ++i) {
    const int64_t id = wide ? static_cast<const int64_t*>(ids)[i]
                            : static_cast<const int32_t*>(ids)[i];
    check(id < known, "expert id " + std::to_string(id) + " out of range: " +
                          std::to_string(known) + " experts");
    const int64_t here = id < 0 || map == nullptr ? id : map[id];
    check(here < p.experts, "expert_map has expert " + std::to_string(here) +
                                " out of range: " + std::to_string(p.experts) +
                                " experts");
    experts_of[i] = here < 0 ? -1 : static_cast<int32_t>(here);
  }
  p.experts_of = experts_of.data();

  Tensor out = torch::stable::new_empty(x, {p.tokens, p.hidden});
  p.out = out.data_ptr();
  if (p.tokens > 0) isa_of(isa).experts(p, threads());
  return out;
}

std::tuple<Tensor, Tensor> route(const Tensor& logits,
                                 const std::optional<Tensor>& bias, int64_t top_k,
                                 bool softmax, bool renormalize, double scale,
                                 std::string isa) {
  check(logits.dim() == 2 && logits.is_cpu(), "logits has to be a CPU tensor [T, E]");
  const Tensor all = torch::stable::contiguous(logits);
  Router r;
  r.tokens = all.size(0);
  r.experts = all.size(1);
  r.top_k = top_k;
  check(top_k > 0 && top_k <= r.experts, "top_k has to be between 1 and the experts");
  r.logits = all.data_ptr();
  r.dtype = dtype_of(all, "logits");
  r.bias = data<float>(bias, ScalarType::Float, {r.experts}, "bias");
  r.softmax = softmax;
  r.renormalize = renormalize;
  r.scale = static_cast<float>(scale);
  Tensor weights = torch::stable::new_empty(all, {r.tokens, top_k}, ScalarType::Float);
  Tensor ids = torch::stable::new_empty(all, {r.tokens, top_k}, ScalarType::Int);
  r.weights = static_cast<float*>(weights.data_ptr());
  r.ids = static_cast<int32_t*>(ids.data_ptr());
  if (r.tokens > 0) isa_of(isa).route(r, threads());
  return {weights, ids};
}

}  // namespace

STABLE_TORCH_LIBRARY(_int8_moe_C, m) {
  m.def("isas() -> str[]");
  m.def("pack(Tensor weight, Tensor order) -> (Tensor, Tensor)");
  m.def(
      "experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor w13, "
      "Tensor w13_sums, Tensor w13_scale, Tensor? w13_bias, Tensor w2, "
      "Tensor w2_sums, Tensor w2_scale, Tensor? w2_bias, int intermediate, "
      "str activation, float limit, Tensor? a1_scale, Tensor? a2_scale, "
      "Tensor? expert_map, bool weight_on_input, str isa) -> Tensor");
  m.def(
      "route(Tensor logits, Tensor? bias, int top_k, bool softmax, "
      "bool renormalize, float scale, str isa) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(_int8_moe_C, CompositeExplicitAutograd, m) {
  m.impl("isas", TORCH_BOX(&isas));
}

STABLE_TORCH_LIBRARY_IMPL(_int8_moe_C, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack_weight));
  m.impl("experts", TORCH_BOX(&experts));
  m.impl("route", TORCH_BOX(&route));
}
