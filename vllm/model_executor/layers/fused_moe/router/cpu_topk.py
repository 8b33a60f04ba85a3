# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Top-k routing on CPU: the native operator, or PyTorch."""

import torch

from vllm.model_executor.layers.fused_moe.cpu_int8_native import route_on_cpu


def topk_on_cpu(
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    indices_type: torch.dtype | None,
    scoring_func: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float32 weights [T, k], ids [T, k], and k-major row indices [T, k], of
    router logits [T, E]: scored, the top k kept, renormalized if asked.

    Raises ValueError for scoring functions other than softmax and sigmoid.
    """
    tokens = gating_output.size(0)
    rows = torch.arange(tokens * topk, dtype=torch.int32).view(topk, tokens).t()
    args = gating_output, None, topk, renormalize, scoring_func, indices_type
    if (routed := route_on_cpu(*args)) is not None:
        return *routed, rows
    logits = gating_output.float()
    if scoring_func == "softmax":
        scores = logits.softmax(dim=-1)
    elif scoring_func == "sigmoid":
        scores = logits.sigmoid()
    else:
        raise ValueError(f"Unsupported scoring function: {scoring_func}")
    weights, ids = scores.topk(topk, dim=-1)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, ids.to(indices_type or torch.int32), rows
