# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""INT8 experts on CPU that the oracle picks, through the quant method, against
float64."""

from types import SimpleNamespace

import pytest
import torch

from vllm.model_executor.layers.quantization.quark import quark_moe
from vllm.platforms import current_platform

from .utils import (
    DTYPE,
    apply_experts,
    assert_close,
    choose_cpu_product,
    emulate_moe,
    make_experts,
    parameter_name,
    quark_config,
    random_input,
    random_weight,
)

pytestmark = [
    pytest.mark.skipif(
        not current_platform.is_cpu(), reason="tests of the CPU platform"
    ),
    pytest.mark.skipif(
        not hasattr(quark_moe, "select_int8_moe_backend"),
        reason="this vLLM has no oracle for INT8 experts",
    ),
]
OURS = "PortableCPUExpertsInt8"
E, I, K, TOP_K = 8, 64, 128, 2  # noqa: E741
SIGMOID = {"scoring_func": "sigmoid", "e_score_correction_bias": torch.zeros(E)}


@pytest.fixture(autouse=True)
def environment(layer_environment):
    torch.manual_seed(0)


@pytest.fixture(params=["native", "onednn", "float"])
def path(request, monkeypatch):
    from vllm.model_executor.layers.fused_moe import cpu_int8_moe

    if request.param != "native":
        choose_cpu_product(monkeypatch, cpu_int8_moe, request.param)
        monkeypatch.setattr(cpu_int8_moe, "native_experts", lambda: None)
    elif cpu_int8_moe.native_experts() is None:
        pytest.skip("csrc/cpu/int8_moe is not built here")
    return request.param


class Experts:
    """A layer with random experts, loaded and processed."""

    def __init__(self, activation: str = "silu", width: int = I, **kwargs):
        self.activation = activation
        self.layer = make_experts(
            num_experts=E,
            top_k=TOP_K,
            hidden_size=K,
            intermediate_size=width,
            quant_config=quark_config(),
            activation=activation,
            **kwargs,
        )
        parts = {
            shard: random_weight(E, *shape)
            for shard, shape in {
                "w1": (width, K),
                "w3": (width, K),
                "w2": (K, width),
            }.items()
        }
        for shard, tensors in parts.items():
            for kind, tensor in zip(("weight", "weight_scale"), tensors):
                name = parameter_name(shard, kind)
                param = getattr(self.layer, name)
                for e in range(E):
                    args = param, tensor[e].clone(), name
                    param.weight_loader(*args, shard_id=shard, expert_id=e)
        self.layer.quant_method.process_weights_after_loading(self.layer)
        w13, s13 = (torch.cat(t, 1) for t in zip(parts["w1"], parts["w3"]))
        self.reference = (w13, s13, *parts["w2"])

    @property
    def cls(self) -> str:
        return self.layer.quant_method.experts_cls.__name__

    def __call__(self, x, weights, ids):
        return apply_experts(self.layer, x, weights, ids)

    def emulate(self, x, weights, ids):
        return emulate_moe(x, *self.reference, weights, ids, self.activation)


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weights, ids = torch.rand(tokens, E, dtype=torch.float32).topk(TOP_K)
    return random_input(tokens, K), weights, ids.int()


@pytest.mark.parametrize("activation", ["silu", "gelu", "swigluoai", "swiglustep"])
@pytest.mark.parametrize("tokens", [1, 33])
def test_experts_with_a_sigmoid_router(path, activation, tokens):
    """Which no class of upstream's takes."""
    experts = Experts(activation, **SIGMOID)
    assert experts.cls == OURS
    args = inputs(tokens)
    out = experts(*args)
    assert out.dtype == DTYPE and out.shape == args[0].shape
    assert_close(out, experts.emulate(*args))


@pytest.mark.parametrize("width", [I, 48])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_experts_with_a_softmax_router(path, activation, width, monkeypatch):
    """By the first class of the oracle's that supports them; ours is its last, and
    goes before AMX's where the native operator runs."""
    from vllm.model_executor.layers.fused_moe import cpu_int8_modular
    from vllm.model_executor.layers.fused_moe.oracle import int8

    is_native = path == "native"
    if not is_native:
        monkeypatch.setattr(cpu_int8_modular, "native_experts", lambda: None)

    experts = Experts(activation, width)
    method = experts.layer.quant_method
    classes = int8.backend_to_kernel_cls(int8.Int8MoeBackend.CPU)
    assert classes[-1].__name__ == OURS
    keys = int8.kInt8StaticChannelSym, int8.kInt8DynamicTokenSym
    supporting = [
        c
        for c in classes
        if c.is_supported_config(c, method.moe, *keys, c.activation_format())[0]
    ]
    first = supporting[0]
    is_slower = is_native and first.__name__ == "CPUExpertsInt8"
    assert experts.cls == (
        OURS if first.is_monolithic() or is_slower else first.__name__
    )
    args = inputs(33)
    assert_close(experts(*args), experts.emulate(*args))


def test_no_tokens(path):
    experts = Experts(**SIGMOID)
    x, weights, ids = inputs(1)
    assert experts(x[:0], weights[:0], ids[:0]).shape == (0, K)


def test_experts_own_their_scales(path):
    """A reload frees the layer's before it replaces the experts."""
    experts = Experts(**SIGMOID)
    args = inputs(9)
    first = experts(*args)
    for name in ("w13_weight_scale", "w2_weight_scale"):
        getattr(experts.layer, name).data.fill_(float("nan"))
    assert torch.equal(experts(*args), first)
    assert_close(first, experts.emulate(*args))


def test_router_weight_on_input(path):
    experts = Experts(apply_router_weight_on_input=True, **SIGMOID)
    x = random_input(9, K)
    ids = torch.randint(0, E, (9, 1), dtype=torch.int32)
    weights = torch.rand(9, 1, dtype=torch.float32).to(DTYPE).float()
    scaled = x * weights.to(DTYPE)
    expected = experts.emulate(scaled, torch.ones(9, 1), ids)
    assert_close(experts(x, weights, ids), expected)


def test_experts_of_other_ranks_are_skipped(path):
    experts = Experts(**SIGMOID)
    x, weights, ids = inputs(21)
    expert_map = torch.full((16,), -1, dtype=torch.int32)
    expert_map[4:12] = torch.arange(E, dtype=torch.int32)
    ids = torch.randint(0, 16, ids.shape, dtype=torch.int32)
    method = experts.layer.quant_method
    out = method.moe_kernel.apply(
        hidden_states=x,
        w1=experts.layer.w13_weight,
        w2=experts.layer.w2_weight,
        topk_weights=weights,
        topk_ids=ids,
        activation=experts.layer.activation,
        global_num_experts=16,
        expert_map=expert_map,
        apply_router_weight_on_input=False,
    )
    local = expert_map[ids.long()]
    is_local = (local >= 0).any(-1)
    assert 0 < is_local.sum() < len(is_local)
    assert torch.equal(out[~is_local], torch.zeros_like(out[~is_local]))
    assert_close(out[is_local], experts.emulate(x, weights, local)[is_local])


@pytest.mark.parametrize("use_ep", [False, True])
def test_experts_for_amx_do_not_part_experts(use_ep, monkeypatch):
    """Upstream's take a global id for a local expert's, and say that they do not."""
    from vllm.model_executor.layers.fused_moe import cpu_int8_modular

    class CPUExpertsInt8:
        is_monolithic = staticmethod(lambda: False)

    monkeypatch.setattr(cpu_int8_modular, "native_experts", lambda: None)
    parallel = SimpleNamespace(use_ep=use_ep)
    chosen = cpu_int8_modular.choose_experts(
        CPUExpertsInt8, SimpleNamespace(moe_parallel_config=parallel)
    )
    assert chosen.__name__ == (OURS if use_ep else "CPUExpertsInt8")


def test_torch_compile_traces_through(path):
    experts = Experts(**SIGMOID)

    def run(x, weights, ids):
        return experts(x * 2, weights, ids) + 1

    compiled = torch.compile(run, backend="eager", fullgraph=True, dynamic=True)
    for tokens in (5, 3):
        args = inputs(tokens)
        torch.testing.assert_close(compiled(*args), run(*args))
