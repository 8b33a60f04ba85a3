# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Top-k routing on CPU against float64."""

import pytest
import torch

from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk
from vllm.platforms import current_platform

pytestmark = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="tests of the CPU platform"
)
E, K, TOP_K = 8, 96, 3


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_topk_routing(scoring, renormalize, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, E, generator=generator).to(dtype)
    weights, ids, rows = fused_topk(
        torch.zeros(50, K), logits, TOP_K, renormalize, scoring_func=scoring
    )
    wide = logits.double()
    scores = wide.sigmoid() if scoring == "sigmoid" else wide.softmax(-1)
    expected, _ = scores.topk(TOP_K)
    if renormalize:
        expected = expected / expected.sum(-1, keepdim=True)
    assert ids.dtype == torch.int32 and rows.shape == ids.shape
    torch.testing.assert_close(weights.double(), expected, atol=1e-6, rtol=1e-5)
    chosen = scores.gather(1, ids.long())
    torch.testing.assert_close(chosen, scores.topk(TOP_K).values)
