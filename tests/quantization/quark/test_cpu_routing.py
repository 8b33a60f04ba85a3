# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Routing with a score-correction bias on CPU, against float64."""

import pytest
import torch

from vllm.platforms import current_platform

from .utils import HAS_CPU_ROUTER, assert_routing, make_router

pytestmark = [
    pytest.mark.skipif(
        not current_platform.is_cpu(), reason="tests of the CPU platform"
    ),
    pytest.mark.skipif(HAS_CPU_ROUTER, reason="CPU has its own: test_cpu_router.py"),
]
E, K, TOP_K = 8, 96, 3


@pytest.fixture(params=["sigmoid", "softmax"])
def scoring(request):
    return request.param


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32], ids=str)
def logits(request):
    """Scored in float32 whatever their dtype."""
    torch.manual_seed(0)
    return torch.randn(50, E).to(request.param)


@pytest.mark.parametrize("renormalize", [True, False])
def test_biased_routing(logits, scoring, renormalize):
    bias = torch.randn(E)
    router = make_router(E, TOP_K, scoring, renormalize, bias, 3.0)
    routed = router.select_experts(torch.zeros(50, K), logits)
    assert_routing(routed, logits, bias, TOP_K, scoring, renormalize, 3.0)
