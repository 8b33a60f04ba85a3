# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""FusedTopKRouter on CPU."""

from typing import Any

import torch

from vllm.model_executor.layers.fused_moe.router.cpu_topk import select_on_cpu
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import (
    FusedTopKRouter,
)


class CPUTopKRouter(FusedTopKRouter):
    """FusedTopKRouter on CPU, which has not its kernels."""

    def _compute_routing(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return select_on_cpu(
            router_logits,
            None,
            self.top_k,
            self.renormalize,
            self.scoring_func,
            indices_type,
        )
