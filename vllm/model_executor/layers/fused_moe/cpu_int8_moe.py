# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""INT8 W8A8 routed experts on CPU: a native operator, or oneDNN's scaled matmul."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from vllm import _custom_ops as ops
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.cpu_int8_native import find_native
from vllm.model_executor.layers.quantization.utils.cpu_int8_product import (
    check_int8_operators,
    multiply_int8,
    onednn_saturates,
)
from vllm.model_executor.utils import replace_parameter
from vllm.utils.torch_utils import direct_register_custom_op

logger = init_logger(__name__)

# of swiglustep and swigluoai, where a layer gives none
LIMIT = 7.0


def _gated(
    activate: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor], torch.Tensor]:
    def gated(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return activate(gate) * up

    return gated


def _swiglustep(gate_up: torch.Tensor, limit: float = LIMIT) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)


def _swigluoai(
    gate_up: torch.Tensor, limit: float = LIMIT, alpha: float = 1.702
) -> torch.Tensor:
    """gpt-oss's: gates and ups take turns."""
    gate = gate_up[..., ::2].clamp(max=limit)
    up = gate_up[..., 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


# by the value of MoEActivation, whose members differ between releases
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": _gated(F.silu),
    "gelu": _gated(F.gelu),
    "gelu_tanh": _gated(partial(F.gelu, approximate="tanh")),
    "swigluoai": _swigluoai,
    "swiglustep": _swiglustep,
}


def _grouped_mm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    counts: list[int],
    out_size: int,
) -> torch.Tensor:
    """Rows of `x` [R, K] int8, grouped by expert, times each expert's weight.
    weights: [E, N, K] int8, or without scales [E], oneDNN's handlers."""
    out = torch.empty((x.size(0), out_size), dtype=torch.float32)
    per_token = x_scale.numel() > 1
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        rows = slice(start, start + count)
        x_scale_of_rows = x_scale[rows] if per_token else x_scale
        bias_of_expert = bias[expert] if bias is not None else None
        if scales is None:
            torch.ops._C.onednn_scaled_mm(
                out[rows],
                x[rows],
                x_scale_of_rows,
                None,
                None,
                bias_of_expert,
                weights[expert],
            )
        else:
            out[rows] = multiply_int8(x[rows], weights[expert])
            out[rows] *= x_scale_of_rows * scales[expert]
            if bias_of_expert is not None:
                out[rows] += bias_of_expert
        start += count
    return out


def cpu_int8_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_scale: torch.Tensor | None,
    w2_scale: torch.Tensor | None,
    w13_out_size: int,
    activation: str,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    a1_scale: torch.Tensor | None,
    a2_scale: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    apply_router_weight_on_input: bool,
) -> torch.Tensor:
    num_experts = w13.size(0)
    if apply_router_weight_on_input:
        x = x * topk_weights.to(x.dtype)
    ids = topk_ids.flatten().long()
    if expert_map is not None:
        ids = expert_map[ids].long()
    local = ids[ids >= 0]
    result = torch.zeros(x.shape, dtype=torch.float32)
    if local.numel() == 0:
        return result.to(x.dtype)
    counts = torch.bincount(local, minlength=num_experts).tolist()
    if len(counts) > num_experts:
        raise ValueError(
            f"expert id {len(counts) - 1} out of range: {num_experts} experts"
        )
    # Experts of other ranks map to -1 and sort first.
    order = ids.argsort(stable=True)[ids.numel() - local.numel() :]
    tokens = order // topk_ids.size(1)

    # float32 between the products: BF16 there would move values across INT8 steps.
    x_q, x_s, _ = ops.onednn_scaled_int8_quant(x.contiguous(), a1_scale)
    gate_up = _grouped_mm(
        x_q[tokens],
        x_s[tokens] if a1_scale is None else x_s,
        w13,
        w13_scale,
        w13_bias,
        counts,
        w13_out_size,
    )
    act = ACTIVATIONS[activation](gate_up)
    act_q, act_s, _ = ops.onednn_scaled_int8_quant(act.contiguous(), a2_scale)
    out = _grouped_mm(act_q, act_s, w2, w2_scale, w2_bias, counts, x.size(1))
    if not apply_router_weight_on_input:
        out *= topk_weights.flatten()[order].float().unsqueeze(-1)
    return result.index_add_(0, tokens, out).to(x.dtype)


def cpu_int8_experts_fake(x: torch.Tensor, *args) -> torch.Tensor:
    return torch.empty_like(x)


direct_register_custom_op(
    op_name="cpu_int8_experts",
    op_func=cpu_int8_experts,
    fake_impl=cpu_int8_experts_fake,
)


# Instruction sets whose kernels oneDNN's are faster than from some tokens on.
BEHIND_ONEDNN = ("avx512", "portable")


def native_experts() -> Any | None:
    """The native operators, or None where oneDNN or float32 serves the experts. Says
    once, in the log, which of them it is.

    Raises ValueError where VLLM_INT8_MOE_ISA names no instruction set.
    """
    namespace, why = find_native()
    if namespace is None:
        logger.warning_once(
            "INT8 experts on CPU run %s, expert by expert, which is slower: %s",
            "in float32" if onednn_saturates() else "on oneDNN",
            why,
        )
        return None
    isa = namespace.isas()[0]
    has_onednn = hasattr(torch.ops._C, "onednn_scaled_mm")
    if isa in BEHIND_ONEDNN and has_onednn and not onednn_saturates():
        logger.info_once(
            "INT8 experts on CPU run on oneDNN, which is faster than %s with %s",
            why,
            isa,
        )
        return None
    logger.info_once("INT8 experts on CPU run on %s, %s", why, isa)
    return namespace


class CPUInt8Experts:
    """Routed INT8 experts of one layer, packed for the native operator where it
    is built (csrc/cpu/int8_moe), else for oneDNN, or kept where that saturates.

    Takes over `layer.w13_weight` [E, 2I, K] and `layer.w2_weight` [E, K, I],
    both int8. `scales` are theirs, float32, per channel ([E, N] or [E, N, 1]) or
    per tensor ([E]); `biases` [E, N]. Activations are quantized per token, or with
    `input_scales`, one value each.

    Raises NotImplementedError, naming the layer, for activations that have no
    CPU implementation, and where neither the native operator nor vLLM's own INT8
    operators are there for the processor.
    """

    def __init__(
        self,
        layer: torch.nn.Module,
        scales: tuple[torch.Tensor, torch.Tensor],
        biases: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
        input_scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    ) -> None:
        activation = layer.activation.value
        if getattr(layer, "swiglu_limit", None) is not None:
            activation += " with a limit"
        if activation not in ACTIVATIONS:
            raise NotImplementedError(
                f"{layer.layer_name}: INT8 experts on CPU know no "
                f"{activation} activation"
            )
        self.activation = activation
        self.operators = native_experts()
        if self.operators is None:
            check_int8_operators(layer.layer_name)
        # oneDNN takes the bias in the output's dtype.
        self.biases = [b if b is None else b.float().contiguous() for b in biases]
        self.input_scales = input_scales
        weights = (layer.w13_weight.data, layer.w2_weight.data)
        self.w13_out_size = weights[0].size(1)
        self.scales: tuple[torch.Tensor | None, ...] = (None, None)
        # A parameter: a reload copies it to where it lay before.
        if self.operators is not None:
            packed = self._pack_native(weights, scales)
        elif onednn_saturates():
            packed = self._keep_int8(weights, scales)
        else:
            packed = self._pack_onednn(weights, scales)
        replace_parameter(layer, "w13_weight", packed)
        replace_parameter(layer, "w2_weight", packed.new_empty(0))

    def _pack_native(self, weights, scales) -> torch.Tensor:
        tensors = []
        for weight, scale, bias in zip(weights, scales, self.biases):
            scale = scale.data.float().reshape(len(scale), -1)
            scale = scale.expand(-1, weight.size(1))
            tensors += [weight.contiguous(), scale.contiguous(), bias]
        self.run = self.operators.experts.default
        kind = self.operators.activations().index(self.activation)
        return self.operators.pack(*tensors, kind, LIMIT, *self.input_scales)

    def _keep_int8(self, weights, scales) -> torch.Tensor:
        self.w13, self.w2 = weights
        # The experts' own: a reload frees the layer's.
        own = (scale.data.clone().float() for scale in scales)
        self.scales = tuple(scale.reshape(len(scale), -1) for scale in own)
        return weights[0].new_empty(0)

    def _pack_onednn(self, weights, scales) -> torch.Tensor:
        dynamic = self.input_scales[0] is None
        # oneDNN reads the scales in place: these are the experts' own.
        self._scales = [scale.data.clone() for scale in scales]
        self._handlers = [
            [
                ops.create_onednn_scaled_mm(
                    w.t(), s.reshape(-1), torch.float32, dynamic, False, 32
                )
                for w, s in zip(weight, scale)
            ]
            for weight, scale in zip(weights, self._scales)
        ]
        self.w13, self.w2 = (
            torch.stack([h.handler_tensor for h in handlers])
            for handlers in self._handlers
        )
        return weights[0].new_empty(0)

    def __call__(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        w13_weight: torch.Tensor,
        expert_map: torch.Tensor | None = None,
        apply_router_weight_on_input: bool = False,
    ) -> torch.Tensor:
        """[T, K] through the experts; w13_weight: the layer's."""
        if self.operators is not None:
            # Each argument counts, see csrc/cpu/int8_moe/ops.cpp.
            args = x, topk_weights, topk_ids, w13_weight
            if expert_map is None and not apply_router_weight_on_input:
                return self.run(*args)
            return self.run(*args, expert_map, apply_router_weight_on_input)
        return torch.ops.vllm.cpu_int8_experts(
            x,
            topk_weights,
            topk_ids,
            self.w13,
            self.w2,
            *self.scales,
            self.w13_out_size,
            self.activation,
            *self.biases,
            *self.input_scales,
            expert_map,
            apply_router_weight_on_input,
        )
