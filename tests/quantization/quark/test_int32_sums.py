# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The fused MoE kernel's int32 sums of int8 products, bit for bit.

Run `pytest tests/quantization/quark/test_int32_sums.py`, without a GPU in Triton's
interpreter: TRITON_INTERPRET=1.
"""

import inspect
import json
import os
from pathlib import Path

import pytest
import torch

from vllm.model_executor.layers.fused_moe import fused_moe

tl = pytest.importorskip("triton.language")

IS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if IS_CUDA else "cpu"
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_SUMS = "sums=int32" in inspect.getsource(fused_moe.get_moe_configs)
pytestmark = pytest.mark.skipif(not HAS_SUMS, reason="without the int32 sums")
runs_kernel = pytest.mark.skipif(
    not (IS_CUDA or IS_INTERPRETED), reason="no GPU, and no TRITON_INTERPRET=1"
)

M, N, E = 16, 64, 4
CONFIG = {
    "BLOCK_SIZE_M": 16,
    "BLOCK_SIZE_N": 32,
    "BLOCK_SIZE_K": 64,
    "GROUP_SIZE_M": 1,
    "num_warps": 4,
    "num_stages": 3,
}
# Both are sums of K products that float32 cannot hold.
LARGE_K = [4096, 131072]


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """Where vLLM has put Triton away, as on CPU, the kernel gets it back."""
    torch.manual_seed(0)
    if not IS_INTERPRETED:
        return
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(fused_moe, "tl", tl)
    monkeypatch.setattr(fused_moe, "triton", triton)
    for name in ("write_zeros_to_output", "fused_moe_kernel"):
        function = getattr(fused_moe, name)
        interpreted = InterpretedFunction(getattr(function, "fn", function))
        monkeypatch.setattr(fused_moe, name, interpreted)


def random_int8(*size: int) -> torch.Tensor:
    """Large values of one sign: sums of 4,096 products pass 2^24."""
    return torch.randint(100, 128, size, dtype=torch.int8)


def multiply(x, weight, x_scale, weight_scale, experts, per_channel=True):
    """The kernel's product, float32 [M, N]; experts: of each row, [M] int32."""
    config = CONFIG | ({} if x.shape[1] <= LARGE_K[0] else {"BLOCK_SIZE_K": 512})
    out = torch.zeros(len(x), 1, weight.shape[1], device=DEVICE)
    args = (t.to(DEVICE) for t in (x, weight))
    scales = (t.to(DEVICE) for t in (x_scale, weight_scale))
    fused_moe.invoke_fused_moe_triton_kernel(
        *args,
        out,
        *scales,
        None,  # topk_weights
        None,  # sorted_token_ids: a block of rows per token
        experts.to(DEVICE),
        torch.tensor([len(x) * CONFIG["BLOCK_SIZE_M"]], dtype=torch.int32).to(DEVICE),
        False,
        1,
        config,
        compute_type=tl.float32,
        use_fp8_w8a8=False,
        use_int8_w8a8=True,
        use_int8_w8a16=False,
        use_int4_w4a16=False,
        per_channel_quant=per_channel,
    )
    return out[:, 0].cpu()


def sum_products(x, weight, experts):
    """Integer sums, int64 [M, N]."""
    return torch.stack([weight[e].long() @ row.long() for row, e in zip(x, experts)])


@runs_kernel
@pytest.mark.parametrize("K", LARGE_K)
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_are_exact(K, sign):
    rows, columns, count = (M, N, E) if K == LARGE_K[0] else (2, 32, 1)
    x, weight = random_int8(rows, K), random_int8(count, columns, K) * sign
    x_scale, weight_scale = torch.rand(rows, 1), torch.rand(count, columns, 1)
    experts = torch.randint(0, count, (rows,), dtype=torch.int32)
    sums = sum_products(x, weight, experts)
    assert (sums.float().long() != sums).any(), "float32 would do"
    expected = sums.float() * x_scale * weight_scale[experts.long(), :, 0]
    out = multiply(x, weight, x_scale, weight_scale, experts)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@runs_kernel
def test_scales_of_another_dtype_do_not_narrow_the_sums():
    x = torch.full((1, LARGE_K[0]), 127, dtype=torch.int8)
    scales = torch.full((1, 1), 1e-3).half(), torch.full((1, 32, 1), 1e-3).half()
    experts = torch.zeros(1, dtype=torch.int32)
    out = multiply(x, x.expand(1, 32, -1), *scales, experts)
    expected = LARGE_K[0] * 127 * 127 * scales[0].item() ** 2
    torch.testing.assert_close(out, torch.full_like(out, expected))


@runs_kernel
def test_the_largest_sum_fits():
    x = torch.full((1, LARGE_K[-1]), 127, dtype=torch.int8)
    ones = torch.ones(1, 1), torch.ones(1, 32, 1)
    out = multiply(x, x.expand(1, 32, -1), *ones, torch.zeros(1, dtype=torch.int32))
    assert out.eq(float(LARGE_K[-1] * 127 * 127)).all()


@runs_kernel
def test_larger_k_is_refused():
    x, weight = (torch.empty(1, LARGE_K[-1] + 8, dtype=torch.int8) for _ in range(2))
    ones = torch.ones(1, 1), torch.ones(1, 1, 1)
    experts = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="K is 131080: .*without this patch"):
        multiply(x, weight[None], *ones, experts)
    # Scales per tensor are summed in float32, for any K.
    x.fill_(1), weight.fill_(1)
    scales = torch.ones(1), torch.ones(1)
    out = multiply(x, weight[None], *scales, experts, per_channel=False)
    assert out.eq(LARGE_K[-1] + 8).all()


@runs_kernel
def test_scales_per_tensor_keep_float32_sums():
    x, weight = random_int8(M, LARGE_K[0]), random_int8(E, N, LARGE_K[0])
    experts = torch.randint(0, E, (M,), dtype=torch.int32)
    sums = torch.zeros(M, N)
    step = CONFIG["BLOCK_SIZE_K"]
    for k in range(0, LARGE_K[0], step):
        part = slice(k, k + step)
        sums += sum_products(x[:, part], weight[:, :, part], experts).float()
    scales = torch.rand(1), torch.rand(E)
    expected = sums * scales[0] * scales[1][experts.long()][:, None]
    out = multiply(x, weight, *scales, experts, per_channel=False)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_their_launch_configs_go_first(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    name = fused_moe.get_config_file_name(E, N, "int8_w8a8")
    of_sums = name.replace(".json", ",sums=int32.json")
    for file, config in ((name, {"BLOCK_SIZE_M": 48}), (of_sums, CONFIG)):
        (Path(os.environ["VLLM_TUNED_CONFIG_FOLDER"]) / file).write_text(
            json.dumps({"1": config})
        )
        fused_moe.get_moe_configs.cache_clear()
        assert fused_moe.get_moe_configs(E, N, "int8_w8a8") == {1: config}
    fused_moe.get_moe_configs.cache_clear()
    assert fused_moe.get_moe_configs(E, N, "fp8_w8a8") is None
