# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Step3p5Model loads stacked experts with one copy per tensor, bit for bit the same.

Run `pytest tests/quantization/quark/test_stacked_loading.py`.
"""

from functools import wraps

import pytest
import torch

from tests.quantization.quark.utils import (
    DTYPE,
    make_experts,
    make_step3p5,
    parameter_name,
    quark_config,
    random_weight,
    shard,
    vllm_environment,
)
from vllm.model_executor.models.step3p5 import Step3p5Model

E, TOP_K, K, I = 6, 2, 64, 32  # noqa: E741
SHARDS = {"gate": ("w1", (I, K)), "up": ("w3", (I, K)), "down": ("w2", (K, I))}


@pytest.fixture(autouse=True, scope="module")
def environment():
    with vllm_environment():
        yield


@pytest.fixture
def counted(monkeypatch):
    """Weight loader calls, by parameter name."""
    calls: list[str] = []
    probe = make(quantized=False)
    kind = type(probe)
    loader = kind.weight_loader

    @wraps(loader, assigned=("__qualname__",), updated=())
    def count(self, param, tensor, name, shard_id, expert_id, return_success=False):
        calls.append(name)
        return loader(self, param, tensor, name, shard_id, expert_id, return_success)

    del count.__wrapped__
    monkeypatch.setattr(kind, "weight_loader", count)
    return calls


def make(quantized: bool, experts: int = E) -> torch.nn.Module:
    return make_experts(
        num_experts=experts,
        top_k=TOP_K,
        hidden_size=K,
        intermediate_size=I,
        quant_config=quark_config() if quantized else None,
    )


def model(layer: torch.nn.Module, experts: int = E) -> torch.nn.Module:
    return make_step3p5([layer], experts)


def tensors(quantized: bool, layout: str = "N", experts: int = E):
    """Stacked tensors of the layer by name, as a checkpoint has them."""
    checkpoint = {}
    for proj, (_, shape) in SHARDS.items():
        name = f"layers.0.moe.{proj}_proj.weight"
        weight, scale = random_weight(experts, *shape)
        checkpoint[name] = (
            weight if quantized else torch.randn(experts, *shape).to(DTYPE)
        )
        if quantized:
            checkpoint[f"{name}_scale"] = (
                scale if layout == "N" else scale.unsqueeze(-1)
            )
    return checkpoint


def one_by_one(layer: torch.nn.Module, checkpoint: dict[str, torch.Tensor]) -> None:
    """By vLLM's own loader."""
    for name, tensor in checkpoint.items():
        shard_id, (rows, _) = SHARDS[name.split(".")[3].removesuffix("_proj")]
        kind = parameter_name(shard_id, name.rpartition(".")[2])
        param = getattr(layer, kind)
        for e, part in enumerate(tensor):
            part = part.flatten().expand(rows) if "scale" in kind else part
            layer.weight_loader(param, part, kind, shard_id=shard_id, expert_id=e)


def parameters(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    names = ("w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale")
    attributes = {n: getattr(layer, n, None) for n in names}
    return {n: p.data.clone() for n, p in attributes.items() if p is not None}


def place(layer: torch.nn.Module, expert_map: torch.Tensor) -> None:
    """Make `layer` an expert-parallel rank's."""
    layer._expert_map = expert_map
    layer._map_global_expert_id_to_local_expert_id = lambda e: int(expert_map[e])


def same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    left, right = parameters(one), parameters(other)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("layout", ["N", "Nx1"])
@pytest.mark.parametrize("chunk", [None, 5 * I * K])
def test_one_copy_a_tensor(counted, monkeypatch, layout, tp, chunk):
    """Halves of a parameter are filled some experts at a time."""
    if chunk:
        module = "vllm.model_executor.layers.quantization.quark.int8.weights"
        monkeypatch.setattr(f"{module}._CHUNK_BYTES", chunk)
    checkpoint = tensors(True, layout)
    for rank in range(tp):
        with shard(rank, tp):
            fast, slow = make(True), make(True)
            loaded = Step3p5Model.load_weights(model(fast), checkpoint.items())
            assert not counted, "an expert was loaded by itself"
            one_by_one(slow, checkpoint)
        counted.clear()
        same(fast, slow)
        assert {n.rpartition(".")[2] for n in loaded} >= {"w13_weight", "w2_weight"}


@pytest.mark.parametrize("first, step", [(0, 1), (3, 1), (1, 2)])
def test_experts_of_an_expert_parallel_rank(counted, first, step):
    """Linear and round-robin placement of a third of the experts."""
    checkpoint = tensors(True, experts=3 * E)
    expert_map = torch.full((3 * E,), -1, dtype=torch.int32)
    expert_map[first : first + E * step : step] = torch.arange(E, dtype=torch.int32)
    fast, slow = make(True), make(True)
    for layer in (fast, slow):
        place(layer, expert_map)
    Step3p5Model.load_weights(model(fast, 3 * E), checkpoint.items())
    assert not counted
    one_by_one(slow, checkpoint)
    same(fast, slow)


def test_the_layers_checks_hold(counted):
    """What was loaded at once is known to the layer; what is missing is, too."""
    checkpoint = tensors(True)
    complete = make(True)
    Step3p5Model.load_weights(model(complete), checkpoint.items())
    complete.quant_method.process_weights_after_loading(complete)
    assert not counted
    checkpoint.pop("layers.0.moe.up_proj.weight")
    incomplete = make(True)
    Step3p5Model.load_weights(model(incomplete), checkpoint.items())
    with pytest.raises(ValueError, match=r"expert 0: up_proj .*not in the checkpoint"):
        incomplete.quant_method.process_weights_after_loading(incomplete)


@pytest.mark.parametrize(
    "case", ["unquantized", "placement", "scalar scale", "meta", "meta placement"]
)
def test_other_layouts_go_expert_by_expert(counted, case):
    """Experts that are not INT8, too: they load as without the patch."""
    quantized = case != "unquantized"
    checkpoint = tensors(quantized)
    fast, slow = make(quantized), make(quantized)
    if case == "scalar scale":
        checkpoint = {n: t[:, :1] if "scale" in n else t for n, t in checkpoint.items()}
    elif case == "placement":
        expert_map = torch.tensor([2, 1, 0, 3, 4, 5], dtype=torch.int32)
        for layer in (fast, slow):
            place(layer, expert_map)
    elif case.startswith("meta"):
        # As a reload's first pass, which counts what comes.
        for layer in (fast, slow):
            if case == "meta placement":
                place(layer, torch.arange(E, dtype=torch.int32))
                layer._expert_map = layer._expert_map.to("meta")
            for name, param in list(layer.named_parameters()):
                meta = torch.nn.Parameter(param.data.to("meta"), requires_grad=False)
                meta.__dict__.update(param.__dict__)
                layer.register_parameter(name, meta)
    Step3p5Model.load_weights(model(fast), checkpoint.items())
    # Where all experts are here, only vLLM's own layers need its loader.
    assert len(counted) == {"scalar scale": 0, "unquantized": 3}.get(case, 6) * E
    if not case.startswith("meta"):
        one_by_one(slow, checkpoint)
        same(fast, slow)
