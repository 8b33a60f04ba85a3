# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Step-3.5's MTP layers: their types, and `exclude` on their fused projections."""

import inspect

import pytest

from vllm.model_executor.layers.quantization.quark.utils import should_ignore_layer
from vllm.model_executor.models import step3p5
from vllm.model_executor.models.step3p5_mtp import Step3p5MTP

try:
    from vllm.transformers_utils.configs.step3p5 import Step3p5Config
except ImportError:
    Step3p5Config = None

ATTENTION = [f"model.layers.45.self_attn.{p}_proj" for p in "qkv"]


def test_fused_layers_are_excluded():
    mapping = getattr(Step3p5MTP, "packed_modules_mapping", {})
    for fused, parts in (
        ("self_attn.qkv_proj", ["q_proj", "k_proj", "v_proj"]),
        ("mlp.gate_up_proj", ["gate_proj", "up_proj"]),
    ):
        module = fused.partition(".")[0]
        exclude = [f"model.layers.45.{module}.{p}" for p in parts]
        name = f"model.layers.45.{fused}"
        assert should_ignore_layer(name, ignore=exclude, fused_mapping=mapping)
        assert not should_ignore_layer(name, ignore=[], fused_mapping=mapping)


@pytest.mark.skipif(Step3p5Config is None, reason="config of Transformers")
def test_types_of_the_mtp_layers_are_kept():
    types = ["full_attention", "sliding_attention"] * 3
    config = Step3p5Config(num_hidden_layers=4, layer_types=types)
    assert config.layer_types == types[:4]
    assert config.mtp_layer_types == types[4:]


def test_decoder_layers_know_the_mtp_layers_types():
    assert "mtp_layer_types" in inspect.getsource(step3p5)
