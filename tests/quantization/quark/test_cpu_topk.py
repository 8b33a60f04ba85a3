# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Top-k routing on CPU against float64."""

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


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_topk_routing(scoring, renormalize, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, E, generator=generator).to(dtype)
    router = make_router(E, TOP_K, scoring, renormalize)
    routed = router.select_experts(torch.zeros(50, K), logits)
    assert_routing(routed, logits, None, TOP_K, scoring, renormalize)
