# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Step3p5MTP builds the MTP layers that draft, and loads only those."""

from types import SimpleNamespace

import pytest
import torch

from vllm.model_executor.models import step3p5_mtp


class _Layer(torch.nn.Module):
    """Stands for a whole MTP layer; knows its name."""

    def __init__(self, vllm_config, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix


@pytest.fixture
def model(monkeypatch):
    def make(drafted: int) -> step3p5_mtp.Step3p5MTP:
        monkeypatch.setattr(step3p5_mtp, "Step3p5AMultiTokenPredictorLayer", _Layer)
        for name in ("VocabParallelEmbedding", "LogitsProcessor"):
            monkeypatch.setattr(
                step3p5_mtp, name, lambda *args, **kw: torch.nn.Identity()
            )
        config = SimpleNamespace(
            vocab_size=8,
            hidden_size=8,
            num_hidden_layers=45,
            num_nextn_predict_layers=3,
        )
        vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(hf_config=config),
            speculative_config=SimpleNamespace(num_speculative_tokens=drafted),
        )
        mtp = step3p5_mtp.Step3p5MTP.__new__(step3p5_mtp.Step3p5MTP)
        torch.nn.Module.__init__(mtp)
        mtp.config = config
        mtp.model = step3p5_mtp.Step3p5AMultiTokenPredictor(
            vllm_config=vllm_config, prefix="model"
        )
        return mtp

    return make


@pytest.mark.parametrize("drafted,built", [(1, 1), (2, 2), (3, 3), (6, 3)])
def test_layers_built(drafted, built, model):
    layers = model(drafted).model.layers
    assert list(layers) == [str(45 + i) for i in range(built)]


def test_tensors_of_other_layers_are_passed_over(model):
    weights = [
        ("model.layers.3.mlp.up_proj.weight", torch.ones(8, 8)),
        ("model.layers.46.mlp.up_proj.weight", torch.ones(8, 8)),
        ("model.layers.47.shared_head.norm.weight", torch.ones(8)),
    ]
    assert model(1).load_weights(weights) == set()
