# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""CPURouter: every score, with and without bias, eager and compiled."""

import pytest
import torch

from vllm.platforms import current_platform

from .utils import HAS_CPU_ROUTER, assert_routing, make_router

pytestmark = [
    pytest.mark.skipif(
        not current_platform.is_cpu(), reason="tests of the CPU platform"
    ),
    pytest.mark.skipif(not HAS_CPU_ROUTER, reason="this vLLM has no router for CPU"),
]
E, K, TOP_K = 32, 16, 4


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    from vllm.model_executor.layers.fused_moe import cpu_int8_native

    if request.param == "torch":
        monkeypatch.setattr(cpu_int8_native, "native", lambda: None)
    elif cpu_int8_native.native() is None:
        pytest.skip("csrc/cpu/int8_moe is not built here")
    return request.param


def make(scoring: str, renormalize: bool, bias: torch.Tensor | None):
    router = make_router(E, TOP_K, scoring, renormalize, bias, 3.0)
    assert type(router).__name__ == "CPURouter"
    return router


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_routing(path, scoring, renormalize, biased, dtype):
    """Without a bias nothing is scaled: so on GPUs."""
    torch.manual_seed(0)
    logits = (torch.randn(50, E) * 3).to(dtype)
    bias = torch.randn(E) if biased else None
    router = make(scoring, renormalize, bias)
    routed = router.select_experts(torch.zeros(50, K), logits)
    if not biased and scoring == "softmax":
        logits = logits.float()
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    else:
        tolerance = 1e-5
    args = logits, bias, TOP_K, scoring, renormalize, 3.0 if biased else 1.0
    assert_routing(routed, *args, tolerance=tolerance)


def test_the_operator_routes(path, monkeypatch):
    called = []
    route = torch.ops._int8_moe_C.route if path == "native" else None

    def noted(*args):
        called.append(args)
        return route(*args)

    if route:
        monkeypatch.setattr(torch.ops._int8_moe_C, "route", noted)
    make("sigmoid", True, torch.zeros(E)).select_experts(
        torch.zeros(5, K), torch.randn(5, E)
    )
    assert len(called) == (path == "native")


def test_torch_compile_traces_through(path):
    router = make("sigmoid", True, torch.rand(E))

    def route(x, logits):
        weights, ids = router.select_experts(x, logits * 2)
        return weights + 1, ids

    compiled = torch.compile(route, backend="eager", fullgraph=True, dynamic=True)
    for tokens in (5, 3):
        args = torch.zeros(tokens, K), torch.randn(tokens, E)
        for out, expected in zip(compiled(*args), route(*args)):
            torch.testing.assert_close(out, expected)
