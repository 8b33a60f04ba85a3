# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Layers that AMD Quark left in BF16 stay so when Step-3.5 fuses them."""

import pytest
import torch

from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.quark.quark import (
    QuarkConfig,
    QuarkLinearMethod,
)
from vllm.model_executor.model_loader.utils import configure_quant_config
from vllm.model_executor.models.step3p5 import Step3p5ForCausalLM

from .utils import DEVICE, DTYPE, needs_dynamic, quark_config, vllm_environment

ATTENTION = [f"model.layers.3.self_attn.{p}_proj" for p in "qkv"]
SHARED_GATE_UP = "model.layers.3.moe.share_expert.gate_up_proj"
SHARED = [f"model.layers.3.share_expert.{p}_proj" for p in ("gate", "up")]


@pytest.fixture(autouse=True)
def environment():
    with vllm_environment():
        yield


def step3p5_config(exclude: list[str]) -> QuarkConfig:
    config = quark_config(exclude)
    configure_quant_config(config, Step3p5ForCausalLM)
    return config


def make(config: QuarkConfig, prefix: str):
    if prefix.endswith("qkv_proj"):
        return QKVParallelLinear(
            64, 16, 4, 2, bias=False, quant_config=config, prefix=prefix
        )
    return MergedColumnParallelLinear(
        64, [48, 48], bias=False, quant_config=config, prefix=prefix
    )


def test_the_model_says_what_it_fuses():
    """LoRA and other quantizations read it, too."""
    mapping = getattr(Step3p5ForCausalLM, "packed_modules_mapping", {})
    assert mapping.get("qkv_proj") == ["q_proj", "k_proj", "v_proj"]
    assert mapping.get("gate_up_proj") == ["gate_proj", "up_proj"]


@pytest.mark.parametrize(
    "prefix", ["model.layers.3.self_attn.qkv_proj", SHARED_GATE_UP]
)
def test_excluded_shards_keep_the_fused_layer_unquantized(prefix):
    layer = make(step3p5_config(ATTENTION + SHARED), prefix)
    assert isinstance(layer.quant_method, UnquantizedLinearMethod)

    shards = "qkv" if prefix.endswith("qkv_proj") else (0, 1)
    sizes = layer.output_sizes
    weights = [torch.randn(n, 64, dtype=DTYPE) for n in sizes]
    for shard, weight in zip(shards, weights):
        layer.weight.weight_loader(layer.weight, weight, shard)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(5, 64, dtype=DTYPE, device=DEVICE)
    reference = x.double() @ torch.cat(weights).double().t()
    out = layer(x)[0]
    assert (out.double() - reference).norm() <= 0.01 * reference.norm()


@needs_dynamic
@pytest.mark.parametrize(
    "prefix", ["model.layers.0.mlp.gate_up_proj", "model.layers.4.self_attn.qkv_proj"]
)
def test_other_layers_are_quantized(prefix):
    layer = make(step3p5_config(ATTENTION + SHARED), prefix)
    assert isinstance(layer.quant_method, QuarkLinearMethod)


def test_half_excluded_layer_is_refused():
    with pytest.raises(ValueError, match="qkv_proj"):
        make(step3p5_config(ATTENTION[:1]), "model.layers.3.self_attn.qkv_proj")
