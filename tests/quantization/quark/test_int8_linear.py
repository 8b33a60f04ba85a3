# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Quark INT8 linear layers through vLLM's own loaders and kernels, against
float64. Scales come as Quark writes them, [N], and as converters do, [N, 1]."""

import pytest
import torch

from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.platforms import current_platform

from .utils import (
    assert_close,
    emulate_linear,
    needs_dynamic,
    quark_config,
    random_input,
    random_weight,
    shard,
    vllm_environment,
)

pytestmark = needs_dynamic
K = 128
PACKED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
LAYOUTS = pytest.mark.parametrize("layout", ["N", "Nx1"])
needs_cuda = pytest.mark.skipif(
    not current_platform.is_cuda(), reason="needs a CUDA device"
)
needs_gpu = pytest.mark.skipif(
    not current_platform.is_cuda_alike(), reason="needs a CUDA or ROCm device"
)
CUTLASS = "CutlassInt8ScaledMMLinearKernel"
TRITON = "TritonInt8ScaledMMLinearKernel"
KERNELS = [
    "default",
    pytest.param(CUTLASS, marks=needs_cuda),
    pytest.param(TRITON, marks=needs_gpu),
]


@pytest.fixture(autouse=True, params=KERNELS)
def environment(request, monkeypatch):
    if request.param == TRITON:
        monkeypatch.setenv("VLLM_DISABLED_KERNELS", CUTLASS)
    torch.manual_seed(0)
    with vllm_environment():
        yield request.param


def stored(scale: torch.Tensor, layout: str) -> torch.Tensor:
    return scale.unsqueeze(-1) if layout == "Nx1" else scale


def finish(layer, kernel: str) -> None:
    if kernel != "default":
        assert type(layer.scheme.kernel).__name__ == kernel
    layer.quant_method.process_weights_after_loading(layer)


@LAYOUTS
@pytest.mark.parametrize("tp", [1, 2])
def test_plain(layout, tp, environment):
    weight, scale = random_weight(192, K)
    x = random_input(33, K)
    outs = []
    for rank in range(tp):
        with shard(rank, tp):
            layer = ColumnParallelLinear(
                K, 192, bias=False, quant_config=quark_config(), prefix="up_proj"
            )
        layer.weight.weight_loader(layer.weight, weight)
        layer.weight_scale.weight_loader(layer.weight_scale, stored(scale, layout))
        finish(layer, environment)
        outs.append(layer(x)[0])
    assert_close(torch.cat(outs, dim=-1), emulate_linear(x, weight, scale))


@LAYOUTS
@pytest.mark.parametrize("tp", [1, 2])
def test_row_parallel(layout, tp, environment):
    weight, scale = random_weight(64, K)
    x = random_input(33, K)
    total, reference = 0, 0
    for rank, part in enumerate(x.chunk(tp, dim=-1)):
        with shard(rank, tp):
            layer = RowParallelLinear(
                K,
                64,
                bias=False,
                reduce_results=False,
                quant_config=quark_config(),
                prefix="o_proj",
            )
        layer.weight.weight_loader(layer.weight, weight)
        layer.weight_scale.weight_loader(layer.weight_scale, stored(scale, layout))
        finish(layer, environment)
        part = part.contiguous()
        total = total + layer(part)[0].double()
        # Every rank quantizes its own part of a token.
        reference = reference + emulate_linear(
            part, weight.chunk(tp, dim=1)[rank], scale
        )
    assert_close(total, reference)


@LAYOUTS
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", ["qkv", "gate_up"])
def test_fused(layout, tp, kind, environment):
    sizes = [128, 64, 64] if kind == "qkv" else [96, 96]
    ids = ["q", "k", "v"] if kind == "qkv" else [0, 1]
    shards = [random_weight(n, K) for n in sizes]
    x = random_input(33, K)
    for rank in range(tp):
        with shard(rank, tp):
            config = quark_config(packed=PACKED)
            if kind == "qkv":
                layer = QKVParallelLinear(
                    K, 32, 4, 2, bias=False, quant_config=config, prefix="qkv_proj"
                )
            else:
                layer = MergedColumnParallelLinear(
                    K, sizes, bias=False, quant_config=config, prefix="gate_up_proj"
                )
        for i, (weight, scale) in zip(ids, shards):
            layer.weight.weight_loader(layer.weight, weight, i)
            layer.weight_scale.weight_loader(
                layer.weight_scale, stored(scale, layout), i
            )
        finish(layer, environment)
        reference = [
            emulate_linear(x, w.chunk(tp)[rank], s.chunk(tp)[rank]) for w, s in shards
        ]
        assert_close(layer(x)[0], torch.cat(reference, dim=-1))


@LAYOUTS
def test_zero_points_load(layout):
    layer = ColumnParallelLinear(
        K, 64, bias=False, quant_config=quark_config(), prefix="up_proj"
    )
    zero_point = torch.zeros(64, dtype=torch.int8)
    param = layer.weight_zero_point
    param.data.fill_(7)
    param.weight_loader(param, stored(zero_point, layout))
    assert param.shape == (64, 1)
    assert torch.equal(param.flatten(), zero_point)


def test_scales_keep_the_compressed_tensors_layout(environment):
    layer = ColumnParallelLinear(
        K, 64, bias=False, quant_config=quark_config(), prefix="up_proj"
    )
    assert layer.weight_scale.shape == (64, 1)


def test_per_tensor_weights_and_static_input_stay(environment):
    shards = [random_weight(n, K) for n in (96, 96)]
    scales = [torch.tensor(0.01), torch.tensor(0.002)]
    x = torch.randn(17, K)
    input_scale = x.abs().max().float() / 127
    config = quark_config(packed=PACKED, weight="per_tensor", dynamic=False)
    layer = MergedColumnParallelLinear(
        K, [96, 96], bias=False, quant_config=config, prefix="gate_up_proj"
    )
    for i, ((weight, _), scale) in enumerate(zip(shards, scales)):
        layer.weight.weight_loader(layer.weight, weight, i)
        layer.weight_scale.weight_loader(layer.weight_scale, scale.float(), i)
        layer.input_scale.weight_loader(layer.input_scale, input_scale, i)
    finish(layer, environment)
    reference = [
        emulate_linear(x, w, s.expand(96), input_scale)
        for (w, _), s in zip(shards, scales)
    ]
    assert_close(layer(x)[0], torch.cat(reference, dim=-1))
