# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Random Quark INT8 layers on vLLM's own classes, and float64 emulations of them.

The emulations share nothing with vLLM: they quantize, multiply and scale in
float64 as the checkpoint's numbers say.
"""

import contextlib
import inspect
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.distributed.parallel_state import (
    get_tp_group,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.fused_moe.router import router_factory
from vllm.model_executor.layers.linear import MergedColumnParallelLinear
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig
from vllm.platforms import current_platform
from vllm.v1.worker import workspace

from . import quantization_config

DEVICE = "cuda" if current_platform.is_cuda_alike() else "cpu"
DTYPE = torch.bfloat16
HAS_CPU_ROUTER = hasattr(router_factory, "CPURouter")
layer_ids = itertools.count(500)


@contextlib.contextmanager
def vllm_environment() -> Iterator[VllmConfig]:
    """One-process groups, a default config and default dtype and device."""
    handle, store = tempfile.mkstemp()
    os.close(handle)
    config = VllmConfig()
    old_dtype = torch.get_default_dtype()
    try:
        with set_current_vllm_config(config):
            init_distributed_environment(
                world_size=1,
                rank=0,
                distributed_init_method=f"file://{store}",
                local_rank=0,
                backend="nccl" if DEVICE == "cuda" else "gloo",
            )
            initialize_model_parallel(1, 1)
            torch.set_default_dtype(DTYPE)
            if DEVICE == "cuda":
                # As the worker does: fused MoE kernels take their buffers there.
                workspace.init_workspace_manager(torch.device(DEVICE))
            with torch.device(DEVICE):
                yield config
    finally:
        workspace.reset_workspace_manager()
        torch.set_default_dtype(old_dtype)
        cleanup_dist_env_and_memory()
        with contextlib.suppress(OSError):
            os.unlink(store)


def choose_cpu_product(monkeypatch: Any, module: Any, kind: str) -> None:
    """Have `module` take oneDNN's INT8 product ("onednn") or that of processors where
    oneDNN saturates ("float")."""
    if kind == "onednn" and module.onednn_saturates():
        pytest.skip("oneDNN's INT8 products saturate on this processor")
    monkeypatch.setattr(module, "onednn_saturates", lambda: kind == "float")


@contextlib.contextmanager
def shard(rank: int, size: int) -> Iterator[None]:
    """Build and load layers as tensor-parallel rank `rank` of `size`."""
    group = get_tp_group()
    old_rank = group.rank_in_group, group.world_size
    group.rank_in_group, group.world_size = rank, size
    try:
        yield
    finally:
        group.rank_in_group, group.world_size = old_rank


def quark_config(
    exclude: Iterable[str] = (),
    weight: str = "per_channel",
    dynamic: bool = True,
    packed: dict[str, list[str]] | None = None,
) -> QuarkConfig:
    """The QuarkConfig of a symmetric INT8 W8A8 export."""
    activation = "token_sym" if dynamic else "static_sym"
    config = QuarkConfig.from_config(quantization_config(weight, activation, exclude))
    config.packed_modules_mapping = packed or {}
    return config


needs_dynamic = pytest.mark.skipif(
    hasattr(QuarkConfig, "_is_static_tensor_w8a8")
    and not hasattr(QuarkConfig, "_is_dynamic_per_token_w8a8"),
    reason="this vLLM knows static INT8 activations only",
)


class FusedShards(MergedColumnParallelLinear):
    """Shards of their own names, as models fuse them, on `size` ranks: the first one is
    on every rank, the last one is padding."""

    NAMES = ("index_k", "gate", "padding")

    def __init__(self, columns: int, sizes: list[int], size: int, **kwargs):
        outputs = [sizes[0] * size, *sizes[1:]]
        super().__init__(columns, outputs, bias=False, **kwargs)
        self.weight.data[-sizes[-1] // size :].zero_()

    def weight_loader(self, param, loaded_weight, loaded_shard_id=None):
        ranks = self.tp_rank, getattr(param, "tp_rank", None)
        if loaded_shard_id == "index_k":
            self.tp_rank = 0
            if ranks[1] is not None:
                param.tp_rank = 0
        load = MergedColumnParallelLinear.weight_loader_v2
        load(self, param, loaded_weight, self.NAMES.index(loaded_shard_id))
        self.tp_rank = ranks[0]
        if ranks[1] is not None:
            param.tp_rank = ranks[1]

    weight_loader_v2 = weight_loader


def make_runner(**kwargs: Any) -> torch.nn.Module:
    """A layer of experts with its router, in any release; kwargs: FusedMoE's."""
    make = getattr(fused_moe, "FusedMoEFactory", None) or fused_moe.FusedMoE
    settings: dict[str, Any] = {"params_dtype": DTYPE, "renormalize": True}
    if "prefix" not in kwargs:
        settings["prefix"] = f"model.layers.{next(layer_ids)}.moe.experts"
    return make(**settings | kwargs)


def make_experts(**kwargs: Any) -> torch.nn.Module:
    """The module that holds experts' weights, in any release; kwargs: FusedMoE's."""
    layer = make_runner(**kwargs)
    return getattr(layer, "routed_experts", layer)


def parameter_name(shard_id: str, kind: str) -> str:
    """The experts' parameter that a projection is part of; shard_id: w1, w2 or w3."""
    return f"{'w2' if shard_id == 'w2' else 'w13'}_{kind}"


def make_step3p5(layers: list[torch.nn.Module], experts: int) -> torch.nn.Module:
    """What Step3p5Model.load_weights needs to know of a model of these layers of
    experts (see make_experts)."""
    root = torch.nn.Module()
    root.layers = torch.nn.ModuleList()
    for layer in layers:
        block, moe = torch.nn.Module(), torch.nn.Module()
        moe.experts = layer
        if type(layer).__name__ == "RoutedExperts":
            moe.experts = torch.nn.Module()
            moe.experts.routed_experts = layer
        block.moe = moe
        root.layers.append(block)
    root.config = SimpleNamespace(
        num_attention_groups=2,
        num_hidden_layers=len(layers),
        num_nextn_predict_layers=0,
    )
    root.moe_num_experts = experts
    return root


def apply_experts(
    layer: torch.nn.Module,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
) -> torch.Tensor:
    """[T, K] through the experts of `layer` (see make_experts), in any release."""
    for ensure in ("ensure_moe_quant_config_init", "_ensure_moe_quant_config_init"):
        if hasattr(layer, ensure):
            getattr(layer, ensure)()
    apply = layer.quant_method.apply
    extra_arguments = len(inspect.signature(apply).parameters) - 4
    return apply(layer, x.clone(), weights, ids, *[None] * extra_arguments)


def make_router(
    experts: int,
    top_k: int,
    scoring: str,
    renormalize: bool,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
) -> Any:
    """The router that layers of a release get. bias [E]: of the selection."""
    return router_factory.create_fused_moe_router(
        top_k=top_k,
        global_num_experts=experts,
        renormalize=renormalize,
        scoring_func=scoring,
        e_score_correction_bias=bias,
        routed_scaling_factor=scale,
    )


def assert_routing(
    routed: tuple[torch.Tensor, torch.Tensor],
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    scoring: str,
    renormalize: bool,
    scale: float = 1.0,
    tolerance: float = 1e-5,
) -> None:
    """`routed`, weights and ids [T, k], is float64's top k of score plus bias."""
    weights, ids = routed
    wide = logits.double()
    scores = wide.sigmoid() if scoring == "sigmoid" else wide.softmax(-1)
    choice = scores if bias is None else scores + bias.double()
    best = choice.topk(top_k).values
    chosen = choice.gather(1, ids.long())
    torch.testing.assert_close(
        chosen.sort(-1, descending=True).values, best, atol=1e-6, rtol=1e-5
    )
    assert all(len(set(row)) == top_k for row in ids.tolist())
    expected = scores.gather(1, ids.long())
    if renormalize:
        expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(
        weights.double(), expected * scale, atol=tolerance, rtol=tolerance
    )


def random_weight(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 weight [..., N, K] and its scales [..., N], over two orders of magnitude."""
    weight = torch.randint(-127, 128, shape, dtype=torch.int8)
    exponent = torch.rand(shape[:-1], dtype=torch.float32) * 2 - 4
    return weight, 10**exponent


def random_input(tokens: int, features: int) -> torch.Tensor:
    """[T, K]; tokens and channels differ by orders of magnitude."""
    x = torch.randn(tokens, features, dtype=torch.float32)
    x *= 10 ** (torch.rand(tokens, 1, dtype=torch.float32) * 3 - 2)
    x *= 10 ** (torch.rand(1, features, dtype=torch.float32) * 1.5 - 1)
    return x.to(DTYPE)


def quantized(x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """float64 `x` [T, K] on its INT8 grid: per token, or with a static scale."""
    if scale is None:
        scale = x.abs().amax(dim=-1, keepdim=True) / 127
        scale = torch.where(scale > 0, scale, 1)
    else:
        scale = scale.double()
    return (x / scale).round().clamp(-128, 127) * scale


def emulate_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """float64 W8A8: x [T, K], weight [N, K] int8, scale [N] -> [T, N]."""
    w = weight.double() * scale.double().reshape(-1, 1)
    return quantized(x.double(), input_scale) @ w.t()


def emulate_activation(name: str, gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2I] -> [T, I]; gate first, or interleaved for swigluoai."""
    if name == "swigluoai":
        gate, up = gate_up[:, ::2].clamp(max=7), gate_up[:, 1::2].clamp(-7, 7)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    gate, up = gate_up.chunk(2, dim=-1)
    if name == "silu":
        return F.silu(gate) * up
    if name == "gelu":
        return F.gelu(gate) * up
    assert name == "swiglustep"
    return F.silu(gate).clamp(max=7) * up.clamp(-7, 7)


def emulate_moe(
    x: torch.Tensor,
    w13: torch.Tensor,
    s13: torch.Tensor,
    w2: torch.Tensor,
    s2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str = "silu",
    a1: torch.Tensor | None = None,
    a2: torch.Tensor | None = None,
) -> torch.Tensor:
    """float64 W8A8 experts.

    x [T, K]; w13 [E, 2I, K], w2 [E, K, I] int8; s13 [E, 2I], s2 [E, K];
    topk [T, k]; a1, a2: static input scales (absent: per token) -> [T, K].
    The GPU kernels store the steps between the two products in the model's
    dtype, which the second quantization sees; so does the emulation there.
    """

    def store(h: torch.Tensor) -> torch.Tensor:
        return h.to(DTYPE).double() if DEVICE == "cuda" else h

    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.size(0)):
        for weight, e in zip(topk_weights[t].double(), topk_ids[t].tolist()):
            if e < 0:
                continue
            h = store(emulate_linear(x[t : t + 1], w13[e], s13[e], a1))
            h = store(emulate_activation(activation, h))
            out[t] += weight * emulate_linear(h, w2[e], s2[e], a2)[0]
    return out


def assert_close(out: torch.Tensor, reference: torch.Tensor) -> None:
    """Within 1 % of the norm, the worst token within 3 %."""
    error = out.double() - reference
    assert torch.isfinite(out).all()
    assert error.norm() <= 0.01 * reference.norm(), error.norm() / reference.norm()
    worst = (error.norm(dim=-1) / reference.norm(dim=-1).clamp(min=1e-30)).max()
    assert worst <= 0.03, worst
