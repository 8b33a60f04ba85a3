# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Compile the launch configs of INT8 experts before the first request."""

import inspect
import time
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch

from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import override_config
from vllm.model_executor.layers.fused_moe.fused_moe import try_get_optimal_moe_config
from vllm.triton_utils import HAS_TRITON
from vllm.utils.math_utils import cdiv

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker

logger = init_logger(__name__)

# Triton compiles apart what 16 divides: the routed rows, and the rows with padding.
_DIVISOR = 16


def int8_moe_warmup(worker: "Worker") -> None:
    """Launch the fused MoE kernel of INT8 experts with each config that a batch of up
    to max_num_batched_tokens tokens takes.

    Layers for which the kernel is compiled alike are launched once. No other rank takes
    part. Left out are layers whose tokens come from other ranks (data and sequence
    parallel), weights that stay in host memory, models with LoRA, and other kernels
    than Triton's.
    """
    config = worker.vllm_config
    if (
        worker.model_config.enforce_eager
        or config.lora_config is not None
        or not getattr(config.kernel_config, "enable_jit_warmup", True)
    ):
        return
    start = time.perf_counter()
    launched: dict[Hashable, int] = {}
    with torch.inference_mode():
        for layer in worker.get_model().modules():
            if not _is_launched_here(layer, worker.device):
                continue
            kind = _compiled_as(layer)
            if kind not in launched:
                launched[kind] = _launch_configs(
                    layer,
                    worker.model_config.dtype,
                    worker.scheduler_config.max_num_batched_tokens,
                )
    if launched:
        logger.info(
            "Warmed up %d launch configs of INT8 experts in %.2f s.",
            sum(launched.values()),
            time.perf_counter() - start,
        )


def _is_launched_here(layer: torch.nn.Module, device: torch.device) -> bool:
    """Whether this rank alone launches Triton's kernel with INT8 weights of `layer`."""
    method = getattr(layer, "quant_method", None)
    quant_config = getattr(method, "moe_quant_config", None)
    if quant_config is None or not quant_config.use_int8_w8a8:
        return False
    if any(param.device.type != device.type for param in layer.parameters()):
        return False
    parallel = method.moe.moe_parallel_config
    if parallel.dp_size > 1 or parallel.use_all2all_kernels:
        return False
    experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
    if experts is None:  # the method calls fused_experts
        return True
    if not HAS_TRITON:
        return False
    from vllm.model_executor.layers.fused_moe import TritonExperts

    return isinstance(experts, TritonExperts)


def _compiled_as(layer: torch.nn.Module) -> Hashable:
    """What the compiled kernels of `layer` depend on, beside the batch."""
    quant_config = layer.quant_method.moe_quant_config
    return (
        layer.w13_weight.shape,
        layer.w2_weight.shape,
        layer.top_k,
        layer.global_num_experts,
        layer.expert_map is None,
        layer.apply_router_weight_on_input,
        quant_config.per_act_token_quant,
        quant_config.a1_scale is None,
        quant_config.w1_bias is None,
    )


def _launch_configs(layer: torch.nn.Module, dtype: torch.dtype, most: int) -> int:
    """Launch each config that `layer` takes for up to `most` tokens; their number."""
    method = layer.quant_method
    quant_config = method.moe_quant_config
    # From here on there are as many routed rows as experts, and the kernel's integers
    # change only in what divides them.
    steady = cdiv(layer.global_num_experts, layer.top_k)
    counts: dict[tuple[tuple[str, Any], ...], set[int]] = {}
    for tokens in range(1, most + 1):
        config = try_get_optimal_moe_config(
            layer.w13_weight.shape,
            layer.w2_weight.shape,
            layer.top_k,
            quant_config.config_name(dtype),
            tokens,
            block_shape=quant_config.block_shape,
        )
        # Triton tells launches apart by the order of their options, too.
        launches = counts.setdefault(tuple(config.items()), set())
        if tokens < steady:
            launches.add(tokens)
        else:
            launches.update(range(steady, steady + _DIVISOR))
    hidden_size, device = layer.w2_weight.shape[1], layer.w2_weight.device
    ids = torch.arange(layer.top_k, dtype=torch.int32, device=device)
    # Methods differ in the arguments after the router's: none is needed.
    rest = len(inspect.signature(method.apply).parameters) - 4
    for items, launches in counts.items():
        with override_config(dict(items)):
            for tokens in sorted(launches):
                x = torch.zeros(tokens, hidden_size, dtype=dtype, device=device)
                topk_ids = ids.repeat(tokens, 1)
                topk_weights = torch.ones_like(topk_ids, dtype=torch.float32)
                method.apply(layer, x, topk_weights, topk_ids, *[None] * rest)
    return len(counts)
