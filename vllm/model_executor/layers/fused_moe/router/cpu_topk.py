# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Top-k routing on CPU: the native operator, or PyTorch."""

import torch

from vllm.model_executor.layers.fused_moe.cpu_int8_native import route_on_cpu


def select_on_cpu(
    gating_output: torch.Tensor,
    bias: torch.Tensor | None,
    topk: int,
    renormalize: bool,
    scoring_func: str,
    indices_type: torch.dtype | None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 weights and ids, both [T, k], of router logits [T, E]: scored in
    float32, the top k of score plus bias kept, renormalized if asked, times
    `scale`.

    Raises ValueError for scoring functions other than softmax and sigmoid.
    """
    args = gating_output, bias, topk, renormalize, scoring_func, indices_type, scale
    if (routed := route_on_cpu(*args)) is not None:
        return routed
    logits = gating_output.float()
    if scoring_func == "softmax":
        scores = logits.softmax(dim=-1)
    elif scoring_func == "sigmoid":
        scores = logits.sigmoid()
    else:
        raise ValueError(f"Unsupported scoring function: {scoring_func}")
    choice = scores if bias is None else scores + bias.float()
    ids = choice.topk(topk, dim=-1).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * scale, ids.to(indices_type or torch.int32)
