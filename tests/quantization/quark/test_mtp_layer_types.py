# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The layer types of Step-3.5's MTP layers, which follow the model's own."""

import pytest

try:
    from vllm.transformers_utils.configs.step3p5 import Step3p5Config
except ImportError:
    pytest.skip("this vLLM takes Transformers' config", allow_module_level=True)


def test_types_of_the_mtp_layers_are_kept():
    types = ["full_attention", "sliding_attention"] * 3
    config = Step3p5Config(num_hidden_layers=4, layer_types=types)
    assert config.layer_types == types[:4]
    assert config.mtp_layer_types == types[4:]


def test_configs_without_mtp_layers():
    types = ["full_attention", "sliding_attention"]
    config = Step3p5Config(num_hidden_layers=2, layer_types=types)
    assert config.layer_types == types
    assert Step3p5Config(num_hidden_layers=2).layer_types is None
