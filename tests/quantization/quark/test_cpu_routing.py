# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Routing with a score-correction bias on the CPU platform, against float64."""

from inspect import signature

import pytest
import torch

from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import (
    fused_topk_bias,
)
from vllm.platforms import current_platform

from .utils import vllm_environment

pytestmark = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="tests of the CPU platform"
)
E, K, TOP_K = 8, 96, 3


@pytest.fixture(autouse=True)
def environment():
    torch.manual_seed(0)
    with vllm_environment():
        yield


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_biased_routing(scoring, renormalize):
    logits = torch.randn(50, E, dtype=torch.float32)
    bias = torch.randn(E, dtype=torch.float32)
    # Older releases scale elsewhere.
    scales = "routed_scaling_factor" in signature(fused_topk_bias).parameters
    weights, ids = fused_topk_bias(
        hidden_states=torch.randn(50, K),
        gating_output=logits,
        scoring_func=scoring,
        e_score_correction_bias=bias,
        topk=TOP_K,
        renormalize=renormalize,
        **({"routed_scaling_factor": 3.0} if scales else {}),
    )
    wide = logits.double()
    scores = wide.sigmoid() if scoring == "sigmoid" else wide.softmax(-1)
    chosen = (scores + bias.double()).topk(TOP_K).indices
    assert torch.equal(ids.long().sort(-1).values, chosen.sort(-1).values)
    expected = scores.gather(1, ids.long())
    if renormalize:
        expected = expected / expected.sum(-1, keepdim=True)
    if scales:
        expected *= 3.0
    torch.testing.assert_close(weights.double(), expected, atol=1e-6, rtol=1e-5)
