// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// The operators' schemas, on PyTorch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
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
void check(bool holds, const char* otherwise) {
  if (!holds) throw std::invalid_argument(otherwise);
}

[[noreturn]] void out_of_range(const char* what, int64_t id, int64_t experts) {
  throw std::invalid_argument(std::string(what) + " " + std::to_string(id) +
                              " out of range: " + std::to_string(experts) + " experts");
}

Threads threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int count, void (*body)(void*, int), void* context) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context, static_cast<int>(i));
            });
          }};
}

// index: of isas(); negative: the best one.
const Isa& isa_of(int64_t index) {
  for (size_t i = 0; i < kIsaCount; ++i) {
    if (kIsas[i]->supported() && index-- <= 0) return *kIsas[i];
  }
  throw std::invalid_argument("isa is none of isas()");
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

// Without the dispatcher's search for an operator by name, which new_empty is.
Tensor empty(int64_t rows, int64_t columns, ScalarType dtype) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns > 0 ? columns : 1, 1};
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      2, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

template <typename T>
T* data(const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape,
        const char* name) {
  const auto sizes = tensor.sizes();
  const bool fits = tensor.scalar_type() == dtype && tensor.is_contiguous() &&
                    tensor.is_cpu() && sizes.size() == shape.size() &&
                    std::equal(shape.begin(), shape.end(), sizes.begin());
  if (!fits) {
    std::string wanted;
    for (int64_t size : shape) {
      wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
    }
    throw std::invalid_argument(std::string(name) + " has to be a contiguous CPU " +
                                "tensor [" + wanted + "] of the operator's dtype");
  }
  return static_cast<T*>(tensor.data_ptr());
}

template <typename T>
T* data(const std::optional<Tensor>& tensor, ScalarType dtype,
        std::initializer_list<int64_t> shape, const char* name) {
  return tensor ? data<T>(*tensor, dtype, shape, name) : nullptr;
}

const std::vector<std::string> kActivations = {"silu", "gelu", "gelu_tanh", "swigluoai",
                                               "swiglustep"};

std::vector<std::string> activations() { return kActivations; }

std::vector<std::string> isas() {
  std::vector<std::string> found;
  for (size_t i = 0; i < kIsaCount; ++i) {
    if (kIsas[i]->supported()) found.push_back(kIsas[i]->name);
  }
  return found;
}

Tensor pack_weight(const Tensor& weight, const Tensor& scale,
                   const std::optional<Tensor>& bias, const Tensor& order) {
  check(weight.dim() == 3 && weight.scalar_type() == ScalarType::Char &&
            weight.is_contiguous() && weight.is_cpu(),
        "weight has to be a contiguous CPU tensor [E, N, K] int8");
  const int64_t experts = weight.size(0), rows = weight.size(1), k = weight.size(2);
  check(order.dim() == 1 && order.size(0) % kBlock == 0,
        "order has to be [columns], a multiple of 32 of them");
  check(k > 0 && k <= kMaxK, "K has to be between 1 and 65536");
  Weight to = {nullptr, order.size(0), k};
  const int32_t* rows_of = data<int32_t>(order, ScalarType::Int, {to.columns}, "order");
  for (int64_t i = 0; i < to.columns; ++i) {
    check(rows_of[i] < rows, "order names a row that weight does not have");
  }
  const Tensor packed = empty(experts, to.bytes(), ScalarType::Char);
  to.packed = static_cast<int8_t*>(packed.data_ptr());
  pack(static_cast<const int8_t*>(weight.data_ptr()),
       data<float>(scale, ScalarType::Float, {experts, rows}, "scale"),
       data<float>(bias, ScalarType::Float, {experts, rows}, "bias"), experts, rows,
       rows_of, to, threads());
  return packed;
}

Weight weight_of(const Tensor& packed, int64_t experts, int64_t columns, int64_t k,
                 const char* name) {
  Weight w = {nullptr, columns, k};
  w.packed = data<int8_t>(packed, ScalarType::Char, {experts, w.bytes()}, name);
  return w;
}

Tensor experts(const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids,
               const Tensor& w13, const Tensor& w2, int64_t hidden,
               int64_t intermediate, int64_t activation, double limit,
               const std::optional<Tensor>& a1_scale,
               const std::optional<Tensor>& a2_scale,
               const std::optional<Tensor>& expert_map, bool weight_on_input,
               int64_t isa) {
  Problem p;
  check(x.dim() == 2 && x.is_cpu() && x.size(1) == hidden,
        "x has to be a CPU tensor [T, K], K as wide as the experts");
  p.dtype = dtype_of(x, "x");
  const Tensor rows = x.stride(1) == 1 ? x : torch::stable::contiguous(x);
  p.tokens = x.size(0);
  p.hidden = x.size(1);
  p.x = rows.data_ptr();
  p.x_stride = rows.stride(0);
  check(topk_ids.dim() == 2 && topk_ids.size(1) > 0 && w13.dim() == 2 && intermediate > 0,
        "topk_ids has to be [T, k], w13 packed, k and intermediate positive");
  p.top_k = topk_ids.size(1);
  p.experts = w13.size(0);
  p.intermediate = intermediate;
  const Tensor picked = topk_weights.scalar_type() == ScalarType::Float
                            ? dense(topk_weights)
                            : torch::stable::to(topk_weights, ScalarType::Float);
  const Tensor chosen = dense(topk_ids);
  p.topk_weights = data<float>(picked, ScalarType::Float, {p.tokens, p.top_k},
                               "topk_weights");
  p.w13 = weight_of(w13, p.experts, round_up(intermediate, 16) * 2, p.hidden, "w13");
  p.w2 = weight_of(w2, p.experts, round_up(p.hidden, kBlock), intermediate, "w2");
  check(activation >= 0 && activation < static_cast<int64_t>(kActivations.size()),
        "activation is none of activations()");
  p.activation = static_cast<Activation>(activation);
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
      wide ? static_cast<void*>(data<int64_t>(chosen, ScalarType::Long,
                                              {p.tokens, p.top_k}, "topk_ids"))
           : static_cast<void*>(data<int32_t>(chosen, ScalarType::Int,
                                              {p.tokens, p.top_k}, "topk_ids"));
  const int64_t known = expert_map ? expert_map->size(0) : p.experts;
  const int32_t* map = data<int32_t>(expert_map, ScalarType::Int, {known}, "expert_map");
  thread_local std::vector<int32_t> experts_of;
  experts_of.resize(p.tokens * p.top_k);
  for (size_t i = 0; i < experts_of.size(); ++i) {
    const int64_t id = wide ? static_cast<const int64_t*>(ids)[i]
                            : static_cast<const int32_t*>(ids)[i];
    if (id >= known) out_of_range("expert id", id, known);
    const int64_t here = id < 0 || map == nullptr ? id : map[id];
    if (here >= p.experts) out_of_range("expert_map: local expert", here, p.experts);
    experts_of[i] = here < 0 ? -1 : static_cast<int32_t>(here);
  }
  p.experts_of = experts_of.data();

  Tensor out = empty(p.tokens, p.hidden, x.scalar_type());
  p.out = out.data_ptr();
  if (p.tokens > 0) isa_of(isa).experts(p, threads());
  return out;
}

std::tuple<Tensor, Tensor> route(const Tensor& logits,
                                 const std::optional<Tensor>& bias, int64_t top_k,
                                 bool softmax, bool renormalize, double scale,
                                 int64_t isa) {
  check(logits.dim() == 2 && logits.is_cpu(), "logits has to be a CPU tensor [T, E]");
  const Tensor all = dense(logits);
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
  Tensor weights = empty(r.tokens, top_k, ScalarType::Float);
  Tensor ids = empty(r.tokens, top_k, ScalarType::Int);
  r.weights = static_cast<float*>(weights.data_ptr());
  r.ids = static_cast<int32_t*>(ids.data_ptr());
  if (r.tokens > 0) isa_of(isa).route(r, threads());
  return {weights, ids};
}

}  // namespace

STABLE_TORCH_LIBRARY(_int8_moe_C, m) {
  m.def("isas() -> str[]");
  m.def("activations() -> str[]");
  m.def("pack(Tensor weight, Tensor scale, Tensor? bias, Tensor order) -> Tensor");
  m.def(
      "experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor w13, "
      "Tensor w2, int hidden, int intermediate, int activation, float limit, "
      "Tensor? a1_scale, Tensor? a2_scale, Tensor? expert_map, "
      "bool weight_on_input, int isa=-1) -> Tensor");
  m.def(
      "route(Tensor logits, Tensor? bias, int top_k, bool softmax, "
      "bool renormalize, float scale, int isa=-1) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(_int8_moe_C, CompositeExplicitAutograd, m) {
  m.impl("isas", TORCH_BOX(&isas));
  m.impl("activations", TORCH_BOX(&activations));
}

STABLE_TORCH_LIBRARY_IMPL(_int8_moe_C, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack_weight));
  m.impl("experts", TORCH_BOX(&experts));
  m.impl("route", TORCH_BOX(&route));
}
