# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""FusedTopKBiasRouter on CPU."""

from typing import Any

import torch

from vllm.model_executor.layers.fused_moe.router.cpu_topk import select_on_cpu
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import (
    FusedTopKBiasRouter,
)


class CPUTopKBiasRouter(FusedTopKBiasRouter):
    """FusedTopKBiasRouter on CPU, which has not its kernels."""

    def _compute_routing(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.scoring_func not in ("softmax", "sigmoid"):
            return super()._compute_routing(
                hidden_states, router_logits, indices_type, **kwargs
            )
        return select_on_cpu(
            router_logits,
            self.e_score_correction_bias,
            self.top_k,
            self.renormalize,
            self.scoring_func,
            indices_type,
            self.routed_scaling_factor,
        )
