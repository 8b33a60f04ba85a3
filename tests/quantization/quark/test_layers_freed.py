# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Layers go with their model: what vLLM records for reloading outlives no model only
as long as nothing recorded, a parameter's loader above all, refers to a layer.

Run `pytest tests/quantization/quark/test_layers_freed.py`.
"""

import gc
import weakref

import pytest
import torch

from vllm.config import get_current_vllm_config

from . import checkpoints as ck
from .utils import DEVICE, needs_dynamic

layerwise = pytest.importorskip("vllm.model_executor.model_loader.reload.layerwise")


@pytest.fixture(autouse=True)
def environment(layer_environment):
    return layer_environment


def _has_kernel(kind: str) -> bool:
    try:
        ck.needs_kernel(kind)
    except pytest.skip.Exception:
        return False
    return True


def live_and_die(case: ck.Case) -> list[weakref.ref]:
    """References to all modules of a model of one layer, built, recorded, loaded,
    processed and run, and gone."""
    generator = torch.Generator().manual_seed(0)
    x = ck.inputs_for(case, 9, generator)
    checkpoint = ck.draw_checkpoint(case, x, generator)
    config = ck.quark_config(checkpoint)
    get_current_vllm_config().quant_config = config
    model = torch.nn.Module()
    routes = ck.routing(9, generator)
    torch.set_default_dtype(case.dtype)
    with torch.device(DEVICE):
        try:
            model.layer = layer = ck.build(checkpoint, config)
        except (NotImplementedError, ValueError):
            # From 0.27 on experts choose their kernel when they are built.
            ck.needs_kernel(case.kind)
            raise
        layerwise.record_metadata_for_reloading(model)
        ck.load(layer, checkpoint.tensors.items())
        if _has_kernel(case.kind):
            ck.finish(layer)
            ck.run(layer, x, routes)
    ck.forget(checkpoint.prefix)
    return [weakref.ref(module) for module in model.modules()]


@pytest.mark.parametrize(
    "activation", ["static_sym", pytest.param("token_sym", marks=needs_dynamic)]
)
@pytest.mark.parametrize("weight", ck.WEIGHTS)
@pytest.mark.parametrize("kind", ck.LINEAR + ck.EXPERTS)
def test_no_layer_outlives_its_model(kind, weight, activation):
    gc.collect()
    before = len(layerwise.LAYERWISE_INFO)
    modules = live_and_die(ck.Case(kind, weight, activation))
    gc.collect()
    alive = [type(m()).__name__ for m in modules if m() is not None]
    assert not alive
    assert len(layerwise.LAYERWISE_INFO) == before
