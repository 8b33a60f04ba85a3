# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Quark INT8 experts through FusedMoE's loaders and kernels, against float64.

Scales come per expert as [N] or [N, 1]; a stacked checkpoint's [E, N] or
[E, N, 1] reaches the loader in the same slices.
"""

import importlib.util

import pytest
import torch

from vllm.platforms import current_platform

from .utils import (
    apply_experts,
    assert_close,
    emulate_moe,
    make_experts,
    quark_config,
    random_input,
    random_weight,
    shard,
    vllm_environment,
)

E, I, K, TOP_K = 8, 64, 128, 2  # noqa: E741
CPU_EXPERTS = "vllm.model_executor.layers.fused_moe.cpu_int8_moe"

needs_kernel = pytest.mark.skipif(
    current_platform.is_cpu() and importlib.util.find_spec(CPU_EXPERTS) is None,
    reason="this vLLM has no INT8 experts for CPU",
)
LAYOUTS = pytest.mark.parametrize("layout", ["N", "Nx1"])


@pytest.fixture(autouse=True)
def environment():
    torch.manual_seed(0)
    with vllm_environment():
        yield


@pytest.fixture
def experts():
    """gate, up [E, I, K] and down [E, K, I] with their scales."""
    return {
        "w1": random_weight(E, I, K),
        "w3": random_weight(E, I, K),
        "w2": random_weight(E, K, I),
    }


def make(activation: str = "silu") -> torch.nn.Module:
    return make_experts(
        num_experts=E,
        top_k=TOP_K,
        hidden_size=K,
        intermediate_size=I,
        quant_config=quark_config(),
        activation=activation,
    )


def load(
    experts,
    layout: str,
    stacked: bool = False,
    activation: str = "silu",
):
    layer = make(activation)
    for shard_id, (weight, scale) in experts.items():
        stem = "w2" if shard_id == "w2" else "w13"
        if layout == "Nx1":
            scale = scale.unsqueeze(-1)
        tensors = {"weight": weight, "weight_scale": scale}
        for e in range(E):
            for kind in tensors:
                # A slice of a stacked tensor is a view, a tensor per expert is not.
                part = tensors[kind][e] if stacked else tensors[kind][e].clone()
                param = getattr(layer, f"{stem}_{kind}")
                param.weight_loader(
                    param, part, f"{stem}_{kind}", shard_id=shard_id, expert_id=e
                )
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def routing(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = torch.rand(tokens, E, dtype=torch.float32).topk(TOP_K)
    return weights / weights.sum(-1, keepdim=True), ids.int()


def run(layer, x, weights, ids) -> torch.Tensor:
    return apply_experts(layer, x, weights, ids)


def reference(experts, x, weights, ids, rank: int = 0, tp: int = 1, **kwargs):
    """Emulation of rank `rank`: its part of the experts' width."""
    (w1, s1), (w3, s3), (w2, s2) = (experts[k] for k in ("w1", "w3", "w2"))
    w13 = torch.cat((w1.chunk(tp, 1)[rank], w3.chunk(tp, 1)[rank]), 1)
    s13 = torch.cat((s1.chunk(tp, 1)[rank], s3.chunk(tp, 1)[rank]), 1)
    return emulate_moe(x, w13, s13, w2.chunk(tp, 2)[rank], s2, weights, ids, **kwargs)


@LAYOUTS
@pytest.mark.parametrize("tp", [1, 2])
def test_scales_reach_the_kernels_layout(experts, layout, tp):
    for rank in range(tp):
        with shard(rank, tp):
            layer = load(experts, layout)
        s13 = [experts[k][1].chunk(tp, 1)[rank] for k in ("w1", "w3")]
        assert layer.w13_weight_scale.shape == (E, 2 * I // tp, 1)
        assert layer.w2_weight_scale.shape == (E, K, 1)
        assert torch.equal(layer.w13_weight_scale.squeeze(-1), torch.cat(s13, 1))
        assert torch.equal(layer.w2_weight_scale.squeeze(-1), experts["w2"][1])


def test_config_quantizes_per_token(experts):
    layer = load(experts, "N")
    if current_platform.is_cpu() and hasattr(layer.quant_method, "int8_backend"):
        pytest.skip("the config is for a kernel, and CPU experts take none")
    config = layer.quant_method.get_fused_moe_quant_config(layer)
    assert config.use_int8_w8a8 and config.per_act_token_quant
    assert config.w1_scale.dim() == config.w2_scale.dim() == 3


@needs_kernel
@LAYOUTS
@pytest.mark.parametrize("stacked", [False, True], ids=["per-expert", "stacked"])
@pytest.mark.parametrize("activation", ["silu", "swiglustep"])
def test_experts(experts, layout, stacked, activation):
    layer = load(experts, layout, stacked, activation)
    x = random_input(37, K)
    weights, ids = routing(37)
    assert_close(
        run(layer, x, weights, ids),
        reference(experts, x, weights, ids, activation=activation),
    )


@needs_kernel
@LAYOUTS
def test_tensor_parallel_experts(experts, layout):
    x = random_input(37, K)
    weights, ids = routing(37)
    total, expected = 0, 0
    for rank in range(2):
        with shard(rank, 2):
            layer = load(experts, layout)
        total = total + run(layer, x, weights, ids).double()
        expected = expected + reference(experts, x, weights, ids, rank, 2)
    assert_close(total, expected)
