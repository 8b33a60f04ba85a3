# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""INT8 W8A8 experts on any CPU, as experts of the modular kernels."""

from typing import Any

import torch

import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
)
from vllm.model_executor.layers.fused_moe.cpu_int8_moe import (
    ACTIVATIONS,
    CPUInt8Experts,
    native_experts,
)
from vllm.model_executor.layers.fused_moe.cpu_int8_native import native
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
    TopKWeightAndReduceNoOP,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    QuantKey,
    kInt8DynamicTensorSym,
    kInt8DynamicTokenSym,
    kInt8StaticChannelSym,
    kInt8StaticTensorSym,
)
from vllm.platforms import current_platform


class PortableCPUExpertsInt8(mk.FusedMoEExpertsModular):
    """`CPUInt8Experts`: per-channel or per-tensor weights, activations quantized
    per token (which is at least as fine as per tensor)."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.experts: CPUInt8Experts | None = None

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def is_supported_config(
        cls: type[mk.FusedMoEExperts], moe_config: FusedMoEConfig, *keys, **named
    ) -> tuple[bool, str | None]:
        if moe_config.swiglu_limit is not None:
            return False, "kernel does not support a swiglu_limit"
        return mk.FusedMoEExperts.is_supported_config(cls, moe_config, *keys, **named)

    @staticmethod
    def _supports_current_device() -> bool:
        has_onednn = hasattr(torch.ops._C, "onednn_scaled_mm")
        return current_platform.is_cpu() and (has_onednn or native() is not None)

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation.value in ACTIVATIONS

    @staticmethod
    def _supports_quant_scheme(
        weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> bool:
        return weight_key in (
            kInt8StaticChannelSym,
            kInt8StaticTensorSym,
        ) and activation_key in (kInt8DynamicTokenSym, kInt8DynamicTensorSym)

    @staticmethod
    def _supports_parallel_config(
        moe_parallel_config: FusedMoEParallelConfig,
    ) -> bool:
        return True

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        assert self.w1_scale is not None and self.w2_scale is not None
        self.experts = CPUInt8Experts(
            layer,
            (self.w1_scale, self.w2_scale),
            (self.w1_bias, self.w2_bias),
        )

    def moe_problem_size(  # type: ignore[override]
        self, a1: torch.Tensor, w1, w2, topk_ids: torch.Tensor
    ) -> tuple[int, ...]:
        # The weights are packed: their shapes say nothing.
        width = 2 * self.moe_config.intermediate_size_per_partition
        experts = self.moe_config.num_local_experts
        return experts, a1.size(0), width, a1.size(1), topk_ids.size(1)

    def workspace_shapes(  # type: ignore[override]
        self, M: int, N: int, K: int, *args: Any, **kwargs: Any
    ) -> tuple[tuple[int, ...], ...]:
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def apply(  # type: ignore[override]
        self,
        *,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        **kwargs: Any,
    ) -> None:
        """`output` [T, K] of `hidden_states` [T, K], weighted and reduced."""
        assert self.experts is not None
        if apply_router_weight_on_input:
            # `prepare` has multiplied.
            topk_weights = torch.ones_like(topk_weights)
        output.copy_(
            self.experts(hidden_states, topk_weights, topk_ids, w1, expert_map)
        )


def choose_experts(
    chosen: type[mk.FusedMoEExperts], moe_config: FusedMoEConfig
) -> type[mk.FusedMoEExperts]:
    """The class that Quark's method builds where the oracle chose `chosen`."""
    is_ours = chosen.is_monolithic()
    if chosen.__name__ == "CPUExpertsInt8":
        # It takes each id for a local expert's.
        is_parallel = moe_config.moe_parallel_config.use_ep
        is_ours = is_parallel or native_experts() is not None
    return PortableCPUExpertsInt8 if is_ours else chosen
