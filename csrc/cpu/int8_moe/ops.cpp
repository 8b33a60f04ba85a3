// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// The operators' schemas, on PyTorch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
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

// Python raises std::invalid_argument as ValueError.
void check(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

[[noreturn]] void throw_out_of_range(const char* name, int64_t id,
                                     int64_t experts) {
  throw std::invalid_argument(std::string(name) + " " + std::to_string(id) +
                              " out of range: " + std::to_string(experts) +
                              " experts");
}

// PyTorch's intra-op threads
Threads get_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int count, void (*body)(void*, int), void* context) {
            torch::stable::parallel_for(
                0, count, 1, [&](int64_t begin, int64_t end) {
                  for (int64_t i = begin; i < end; ++i) {
                    body(context, static_cast<int>(i));
                  }
                });
          }};
}

// index: of isas(); negative: the best one.
const Isa& select_isa(int64_t index) {
  const std::vector<const Isa*>& isas = int8_moe::isas();
  check(index < static_cast<int64_t>(isas.size()), "isa is none of isas()");
  return *isas[std::max<int64_t>(0, index)];
}

Dtype get_dtype(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      throw std::invalid_argument(std::string(name) +
                                  " has to be float32, bfloat16 or float16");
  }
}

// new_empty of the stable ABI looks its operator up by name on each call.
Tensor allocate_tensor(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = std::max<int64_t>(1, sizes.begin()[1]);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.begin(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor make_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensor convert(const Tensor& tensor, ScalarType dtype) {
  return make_contiguous(tensor.scalar_type() == dtype
                             ? tensor
                             : torch::stable::to(tensor, dtype));
}

// The data of a contiguous CPU tensor of this dtype and shape. Throws for any
// other tensor.
template <typename T>
T* get_data(const Tensor& tensor, ScalarType dtype,
            std::initializer_list<int64_t> shape, const char* name) {
  const auto sizes = tensor.sizes();
  const bool fits = tensor.scalar_type() == dtype && tensor.is_contiguous() &&
                    tensor.is_cpu() && sizes.size() == shape.size() &&
                    std::equal(shape.begin(), shape.end(), sizes.begin());
  if (!fits) {
    std::string shape_text;
    for (int64_t size : shape) {
      shape_text += (shape_text.empty() ? "" : ", ") + std::to_string(size);
    }
    throw std::invalid_argument(std::string(name) +
                                " has to be a contiguous CPU tensor [" +
                                shape_text + "] of the operator's dtype");
  }
  return static_cast<T*>(tensor.data_ptr());
}

template <typename T>
T* get_data(const std::optional<Tensor>& tensor, ScalarType dtype,
            std::initializer_list<int64_t> shape, const char* name) {
  return tensor ? get_data<T>(*tensor, dtype, shape, name) : nullptr;
}

// In the order of Activation.
const std::vector<std::string> kActivations = {"silu", "gelu", "gelu_tanh",
                                               "swigluoai", "swiglustep"};

std::vector<std::string> list_activations() { return kActivations; }

std::vector<std::string> list_isa_names() {
  std::vector<std::string> names;
  for (const Isa* isa : int8_moe::isas()) names.push_back(isa->name);
  return names;
}

// The start of a packed layer. The weights of w13 and of w2 follow. All lies in
// one tensor: to take an argument from Python costs the operator as much time
// as a small product.
struct Header {
  char name[8];
  int64_t experts, hidden, intermediate;
  Activation activation;
  float limit, a1_scale, a2_scale;
  uint8_t a1_static, a2_static;  // 0 or 1
  char reserved[14];

  // May be called on arbitrary bytes.
  bool is_valid() const {
    const auto activation_index = static_cast<size_t>(activation);
    return std::memcmp(name, kName, sizeof(name)) == 0 && experts >= 0 &&
           experts <= kMaxExperts && hidden > 0 && hidden <= kMaxK &&
           intermediate > 0 && intermediate <= kMaxK &&
           activation_index < kActivations.size() && a1_static <= 1 &&
           a2_static <= 1;
  }
  // `data` is that of the packed layer. Sizes need none.
  Weight w13(int8_t* data = nullptr) const {
    int8_t* packed = data == nullptr ? nullptr : data + sizeof(Header);
    return {packed, round_up(intermediate, kHalf) * 2, hidden};
  }
  Weight w2(int8_t* data = nullptr) const {
    int8_t* packed = data == nullptr ? nullptr : data + w2_start();
    return {packed, round_up(hidden, kNR), intermediate};
  }
  int64_t w2_start() const { return sizeof(Header) + experts * w13().bytes(); }
  int64_t bytes() const { return w2_start() + experts * w2().bytes(); }

  static constexpr char kName[9] = "int8moe1";
  static constexpr int64_t kMaxExperts = 1 << 20;
};
static_assert(sizeof(Header) == kCacheLine);

float get_static_scale(const std::optional<Tensor>& scale, const char* name) {
  if (!scale) return 0;
  return *get_data<float>(torch::stable::reshape(*scale, {-1}),
                          ScalarType::Float, {1}, name);
}

Tensor pack_layer(const Tensor& w13, const Tensor& w13_scale,
                  const std::optional<Tensor>& w13_bias, const Tensor& w2,
                  const Tensor& w2_scale, const std::optional<Tensor>& w2_bias,
                  int64_t activation, double limit,
                  const std::optional<Tensor>& a1_scale,
                  const std::optional<Tensor>& a2_scale) {
  check(w2.dim() == 3, "w2 has to be [E, K, I]");
  check(
      activation >= 0 && activation < static_cast<int64_t>(kActivations.size()),
      "activation is none of activations()");
  Header h = {};
  std::memcpy(h.name, Header::kName, sizeof(h.name));
  h.experts = w2.size(0);
  h.hidden = w2.size(1);
  h.intermediate = w2.size(2);
  h.activation = static_cast<Activation>(activation);
  h.limit = static_cast<float>(limit);
  h.a1_static = a1_scale.has_value();
  h.a2_static = a2_scale.has_value();
  h.a1_scale = get_static_scale(a1_scale, "a1_scale");
  h.a2_scale = get_static_scale(a2_scale, "a2_scale");
  check(h.is_valid(),
        "K and I have to be between 1 and 65536, with 2^20 experts at most");
  const int64_t experts = h.experts, rows = 2 * h.intermediate;
  const int8_t* w13_data =
      get_data<int8_t>(w13, ScalarType::Char, {experts, rows, h.hidden}, "w13");
  const int8_t* w2_data = get_data<int8_t>(
      w2, ScalarType::Char, {experts, h.hidden, h.intermediate}, "w2");
  const Tensor packed = allocate_tensor({h.bytes()}, ScalarType::Char);
  int8_t* packed_data = static_cast<int8_t*>(packed.data_ptr());
  std::memcpy(packed_data, &h, sizeof(h));
  const bool interleaved = h.activation == Activation::swigluoai;
  pack(
      w13_data,
      get_data<float>(w13_scale, ScalarType::Float, {experts, rows},
                      "w13_scale"),
      get_data<float>(w13_bias, ScalarType::Float, {experts, rows}, "w13_bias"),
      experts, rows, interleaved ? Order::interleaved : Order::halves,
      h.w13(packed_data), get_threads());
  pack(w2_data,
       get_data<float>(w2_scale, ScalarType::Float, {experts, h.hidden},
                       "w2_scale"),
       get_data<float>(w2_bias, ScalarType::Float, {experts, h.hidden},
                       "w2_bias"),
       experts, h.hidden, Order::plain, h.w2(packed_data), get_threads());
  return packed;
}

// The local expert of each of topk_ids, negative for none. expert_map [global
// experts], or null: ids are local. Throws for an id that is out of range.
std::vector<int32_t> map_experts(const Tensor& topk_ids,
                                 const std::optional<Tensor>& expert_map,
                                 int64_t tokens, int64_t top_k,
                                 int64_t experts) {
  const bool is_int64 = topk_ids.scalar_type() != ScalarType::Int;
  const Tensor ids =
      convert(topk_ids, is_int64 ? ScalarType::Long : ScalarType::Int);
  const void* data =
      is_int64 ? static_cast<void*>(get_data<int64_t>(
                     ids, ScalarType::Long, {tokens, top_k}, "topk_ids"))
               : static_cast<void*>(get_data<int32_t>(
                     ids, ScalarType::Int, {tokens, top_k}, "topk_ids"));
  const int64_t global_experts = expert_map ? expert_map->size(0) : experts;
  const int32_t* map = get_data<int32_t>(expert_map, ScalarType::Int,
                                         {global_experts}, "expert_map");
  std::vector<int32_t> experts_of(tokens * top_k);
  for (size_t i = 0; i < experts_of.size(); ++i) {
    const int64_t id = is_int64 ? static_cast<const int64_t*>(data)[i]
                                : static_cast<const int32_t*>(data)[i];
    if (id >= global_experts) {
      throw_out_of_range("expert id", id, global_experts);
    }
    const int64_t local_id = id < 0 || map == nullptr ? id : map[id];
    if (local_id >= experts) {
      throw_out_of_range("expert_map: local expert", local_id, experts);
    }
    experts_of[i] = local_id < 0 ? -1 : static_cast<int32_t>(local_id);
  }
  return experts_of;
}

Tensor compute_experts(const Tensor& x, const Tensor& topk_weights,
                       const Tensor& topk_ids, const Tensor& packed,
                       const std::optional<Tensor>& expert_map,
                       bool weight_on_input, int64_t isa) {
  Header h = {};
  int8_t* packed_data = static_cast<int8_t*>(packed.data_ptr());
  const int64_t size = packed.dim() == 1 ? packed.size(0) : 0;
  const bool has_header = packed.scalar_type() == ScalarType::Char &&
                          packed.is_cpu() && packed.is_contiguous() &&
                          size >= int64_t{sizeof(h)};
  if (has_header) std::memcpy(&h, packed_data, sizeof(h));
  check(has_header && h.is_valid() && h.bytes() == size,
        "packed has to come from pack");
  Problem p;
  check(x.dim() == 2 && x.is_cpu() && x.size(1) == h.hidden,
        "x has to be a CPU tensor [T, K], K as wide as the experts");
  p.dtype = get_dtype(x, "x");
  const Tensor x_rows = x.stride(1) == 1 ? x : torch::stable::contiguous(x);
  p.tokens = x.size(0);
  p.hidden = h.hidden;
  p.x = x_rows.data_ptr();
  p.x_stride = x_rows.stride(0);
  check(topk_ids.dim() == 2 && topk_ids.size(1) > 0,
        "topk_ids has to be [T, k], k positive");
  p.top_k = topk_ids.size(1);
  p.experts = h.experts;
  p.intermediate = h.intermediate;
  const Tensor weights = convert(topk_weights, ScalarType::Float);
  p.topk_weights = get_data<float>(weights, ScalarType::Float,
                                   {p.tokens, p.top_k}, "topk_weights");
  p.w13 = h.w13(packed_data);
  p.w2 = h.w2(packed_data);
  p.activation = h.activation;
  p.limit = h.limit;
  p.a1_scale = h.a1_static ? &h.a1_scale : nullptr;
  p.a2_scale = h.a2_static ? &h.a2_scale : nullptr;
  p.weight_on_input = weight_on_input;
  check(!weight_on_input || p.top_k == 1,
        "router weights on the input take one expert a token");
  const std::vector<int32_t> experts_of =
      map_experts(topk_ids, expert_map, p.tokens, p.top_k, p.experts);
  p.experts_of = experts_of.data();
  Tensor out = allocate_tensor({p.tokens, p.hidden}, x.scalar_type());
  p.out = out.data_ptr();
  if (p.tokens > 0) select_isa(isa).experts(p, get_threads());
  return out;
}

std::tuple<Tensor, Tensor> route_tokens(const Tensor& logits,
                                        const std::optional<Tensor>& bias,
                                        int64_t top_k, bool softmax,
                                        bool renormalize, double scale,
                                        int64_t isa) {
  check(logits.dim() == 2 && logits.is_cpu(),
        "logits has to be a CPU tensor [T, E]");
  const Tensor contiguous_logits = make_contiguous(logits);
  Router r;
  r.tokens = contiguous_logits.size(0);
  r.experts = contiguous_logits.size(1);
  r.top_k = top_k;
  check(top_k > 0 && top_k <= r.experts,
        "top_k has to be between 1 and the experts");
  r.logits = contiguous_logits.data_ptr();
  r.dtype = get_dtype(contiguous_logits, "logits");
  r.bias = get_data<float>(bias, ScalarType::Float, {r.experts}, "bias");
  r.softmax = softmax;
  r.renormalize = renormalize;
  r.scale = static_cast<float>(scale);
  Tensor weights = allocate_tensor({r.tokens, top_k}, ScalarType::Float);
  Tensor ids = allocate_tensor({r.tokens, top_k}, ScalarType::Int);
  r.weights = static_cast<float*>(weights.data_ptr());
  r.ids = static_cast<int32_t*>(ids.data_ptr());
  if (r.tokens > 0) select_isa(isa).route(r, get_threads());
  return {weights, ids};
}

}  // namespace

STABLE_TORCH_LIBRARY(_int8_moe_C, m) {
  m.def("isas() -> str[]");
  m.def("activations() -> str[]");
  m.def(
      "pack(Tensor w13, Tensor w13_scale, Tensor? w13_bias, Tensor w2, "
      "Tensor w2_scale, Tensor? w2_bias, int activation, float limit, "
      "Tensor? a1_scale=None, Tensor? a2_scale=None) -> Tensor");
  m.def(
      "experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor packed, "
      "Tensor? expert_map=None, bool weight_on_input=False, int isa=-1) -> "
      "Tensor");
  m.def(
      "route(Tensor logits, Tensor? bias, int top_k, bool softmax, "
      "bool renormalize, float scale, int isa=-1) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(_int8_moe_C, CompositeExplicitAutograd, m) {
  m.impl("isas", TORCH_BOX(&list_isa_names));
  m.impl("activations", TORCH_BOX(&list_activations));
}

STABLE_TORCH_LIBRARY_IMPL(_int8_moe_C, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack_layer));
  m.impl("experts", TORCH_BOX(&compute_experts));
  m.impl("route", TORCH_BOX(&route_tokens));
}
