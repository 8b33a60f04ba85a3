# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`exclude` on the fused projections of Step-3.5's MTP layers."""

from vllm.model_executor.layers.quantization.quark.utils import should_ignore_layer
from vllm.model_executor.models.step3p5_mtp import Step3p5MTP


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
