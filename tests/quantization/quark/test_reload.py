# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Weights reloaded in place, layer by layer through vLLM's own functions: the layer
is, bit for bit, the one that a fresh load gives, in the storage that it had.

Run `pytest tests/quantization/quark/test_reload.py`.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace

import pytest
import regex as re
import torch

from vllm.config import (
    LoadConfig,
    get_current_vllm_config,
    set_current_vllm_config,
)
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.platforms import current_platform

from . import checkpoints as ck
from .utils import (
    DEVICE,
    DTYPE,
    FusedShards,
    choose_cpu_product,
    needs_dynamic,
    parameter_name,
    shard,
)

reload = pytest.importorskip("vllm.model_executor.model_loader.reload")
Tensors = dict[str, torch.Tensor]
TOKENS = 33
# How the layer is loaded: as every model does, or stacked experts with one copy.
LOADED = [(kind, "") for kind in ck.LINEAR + ck.EXPERTS] + [("moe_stacked", "at_once")]
ON_CPU = current_platform.is_cpu()
# Kernels that this platform chooses between.
OF_LINEAR = ("onednn", "sgl", "float") if ON_CPU else ("default",)
OF_EXPERTS = ("native", "onednn", "float") if ON_CPU else ("default",)
SCHEMES = [
    pytest.param((weight, activation), marks=marks, id=f"{weight}-{activation}")
    for weight in ck.WEIGHTS
    for activation, marks in (("static_sym", ()), ("token_sym", needs_dynamic))
]
# Each kind of scale, for what asks more of loaders than of kernels.
SOME_SCHEMES = SCHEMES[1:3]
SHARDS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@pytest.fixture(autouse=True)
def environment(layer_environment):
    return layer_environment


def _ways() -> Iterator:
    for kind, how in LOADED:
        for kernel in OF_EXPERTS if kind in ck.EXPERTS else OF_LINEAR:
            parts = [kind, how, kernel]
            yield pytest.param((kind, how, kernel), id="-".join(filter(None, parts)))


@pytest.fixture(params=_ways())
def way(request, monkeypatch) -> tuple[str, bool]:
    """A kind of layer and whether stacked experts are loaded at once; the kernel is
    chosen."""
    kind, how, kernel = request.param
    ck.needs_kernel(kind)
    if how and _load_at_once() is None:
        pytest.skip("this vLLM loads stacked experts one by one only")
    if ON_CPU and kind in ck.EXPERTS:
        from vllm.model_executor.layers.fused_moe import cpu_int8_moe

        if kernel != "native":
            choose_cpu_product(monkeypatch, cpu_int8_moe, kernel)
            monkeypatch.setattr(cpu_int8_moe, "native_experts", lambda: None)
        elif cpu_int8_moe.native_experts() is None:
            pytest.skip("csrc/cpu/int8_moe is not built here")
    elif ON_CPU:
        if kernel == "sgl" and not torch.cpu._is_amx_tile_supported():
            pytest.skip("this processor has no AMX")
        monkeypatch.setenv("VLLM_CPU_SGL_KERNEL", str(int(kernel == "sgl")))
        from vllm.model_executor.layers.quantization.quark.int8 import weights

        choose_cpu_product(monkeypatch, weights, kernel)
        _watch_products(monkeypatch)
    return kind, bool(how)


def _load_at_once() -> Callable[..., bool] | None:
    """What Step3p5Model tries before it loads stacked experts one by one."""
    from vllm.model_executor.models import step3p5

    for name in ("load_stacked", "load_stacked_experts"):
        if attribute := getattr(step3p5, name, None):
            return attribute
    return None


def _watch_products(monkeypatch) -> None:
    """Fail where oneDNN would end the process: at a product that was made for another
    dtype than its output's."""
    from vllm import _custom_ops as ops

    create = ops.create_onednn_scaled_mm

    def checked(weight, scales, output_type, *args):
        assert output_type == DTYPE, f"a {DTYPE} layer's product is for {output_type}"
        return create(weight, scales, output_type, *args)

    monkeypatch.setattr(ops, "create_onednn_scaled_mm", checked)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    old_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(old_dtype)


@contextlib.contextmanager
def like_a_worker() -> Iterator[None]:
    """What is set while a worker reloads: no default dtype or device, and a current
    config in some releases only."""
    from vllm.v1.worker.gpu_worker import Worker

    sets_config = "set_current_vllm_config" in inspect.getsource(Worker.reload_weights)
    config = get_current_vllm_config() if sets_config else None
    with set_current_vllm_config(config), torch.device("cpu"):
        yield


class Model:
    """A model of one layer, led through its life as vLLM's loader and worker do."""

    def __init__(self, checkpoint: ck.Checkpoint, at_once: bool = False):
        self.dtype = checkpoint.case.dtype
        self.at_once = at_once
        config = ck.quark_config(checkpoint)
        get_current_vllm_config().quant_config = config
        ck.forget(checkpoint.prefix)
        self.root = owner = torch.nn.Module()
        *path, last = checkpoint.prefix.split(".")
        for name in path:
            owner.add_module(name, torch.nn.Module())
            owner = owner.get_submodule(name)
        with default_dtype(self.dtype), torch.device(DEVICE):
            self.layer = ck.build(checkpoint, config)
            owner.add_module(last, self.layer)
            reload.record_metadata_for_reloading(self.root)

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> "Model":
        with default_dtype(self.dtype):
            self._hand_over(tensors)
            ck.finish(self.layer)
        return self

    def load_dummy(self) -> "Model":
        with default_dtype(self.dtype):
            loader = DummyModelLoader(LoadConfig(load_format="dummy"))
            loader.load_weights(self.root, SimpleNamespace(dtype=self.dtype))
            ck.finish(self.layer)
        return self

    def reload(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        # What the layer frees is taken and filled with NaN: who still reads it shows.
        sizes = [t.nbytes for t in self.state().values()]
        with like_a_worker():
            reload.initialize_layerwise_reload(self.root)
            self._hand_over(tensors)
            config = SimpleNamespace(dtype=self.dtype)
            reload.finalize_layerwise_reload(self.root, config)
        self.filled = [
            torch.full((size,), 255, dtype=torch.uint8, device=DEVICE)
            for size in sizes * 8
        ]

    def _hand_over(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        ck.load(self.layer, self._load_stacked(tensors) if self.at_once else tensors)

    def _load_stacked(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator:
        """Load stacked tensors as Step3p5Model does; those that are left over are to
        be loaded expert by expert."""
        load_at_once = _load_at_once()
        params = dict(self.layer.named_parameters())
        for name, tensor in tensors:
            module, _, kind = name.rpartition(".")
            shard_id = SHARDS[module.rpartition(".")[2]]
            target = parameter_name(shard_id, kind)
            if target not in params or not load_at_once(
                params[target], tensor, target, shard_id
            ):
                yield name, tensor

    def run(self, x: torch.Tensor, routes: tuple) -> torch.Tensor:
        with default_dtype(self.dtype), torch.device(DEVICE):
            return ck.run(self.layer, x, routes)

    def state(self) -> Tensors:
        return dict(self.layer.state_dict(keep_vars=True))


@dataclasses.dataclass
class Pair:
    """Two checkpoints of one layer, an input, and the models that hold them."""

    a: ck.Checkpoint
    b: ck.Checkpoint
    x: torch.Tensor
    routes: tuple[torch.Tensor, torch.Tensor]
    at_once: bool

    @property
    def named(self) -> str:
        """What an error says of the layer, in vLLM's or in the checkpoint's name."""
        return re.escape(self.a.prefix.rpartition(".")[0])

    def model(self) -> Model:
        return Model(self.a, self.at_once)

    def serving(self, tensors: Tensors) -> Model:
        return self.model().load(tensors.items())

    def serving_dummy(self) -> Model:
        load_config = get_current_vllm_config().load_config
        load_config.load_format = "dummy"
        try:
            return self.model().load_dummy()
        finally:
            load_config.load_format = "auto"

    def run(self, model: Model) -> torch.Tensor:
        return model.run(self.x, self.routes)

    def reload_or_refuse(self, model: Model, tensors: Tensors) -> None:
        """Right, or a ValueError that names the layer."""
        try:
            model.reload(tensors.items())
        except ValueError as e:
            assert re.search(self.named, str(e))
        else:
            self.assert_like_a_fresh_load(model, tensors)

    def assert_like_a_fresh_load(self, model: Model, tensors: Tensors) -> None:
        out = self.run(model)
        fresh = self.serving(tensors)
        expected, state = fresh.state(), model.state()
        assert state.keys() == expected.keys()
        for name, param in state.items():
            assert param.dtype == expected[name].dtype, name
            assert param.stride() == expected[name].stride(), name
            assert torch.equal(param, expected[name]), name
        assert torch.equal(out, self.run(fresh)), "the output"


def make_pair(kind: str, scheme: tuple[str, str], at_once: bool = False) -> Pair:
    generator = torch.Generator().manual_seed(0)
    case = ck.Case(kind, *scheme)
    x = ck.inputs_for(case, TOKENS, generator)
    a = ck.draw_checkpoint(case, x, generator)
    drawn = ck.draw_checkpoint(case, x * 1.5, generator)
    stems = [".".join(c.prefix.split(".")[:3]) + "." for c in (drawn, a)]
    tensors = {k.replace(*stems): v for k, v in drawn.tensors.items()}
    b = dataclasses.replace(a, tensors=tensors)
    assert a.tensors.keys() == b.tensors.keys()
    return Pair(a, b, x, ck.routing(TOKENS, generator), at_once)


@pytest.fixture(params=SCHEMES)
def pair(request, way) -> Pair:
    kind, at_once = way
    return make_pair(kind, request.param, at_once)


@pytest.fixture(params=SOME_SCHEMES)
def some_pair(request, way) -> Pair:
    kind, at_once = way
    return make_pair(kind, request.param, at_once)


def find_storage(model: Model) -> dict[str, int]:
    return {n: t.data_ptr() for n, t in model.state().items() if t.numel()}


def test_another_checkpoint_and_back(pair):
    """In the storage that the parameters had: CUDA graphs keep pointers."""
    model = pair.serving(pair.a.tensors)
    before, out = find_storage(model), pair.run(model)
    model.reload(pair.b.tensors.items())
    assert find_storage(model) == before
    assert not torch.equal(pair.run(model), out)
    pair.assert_like_a_fresh_load(model, pair.b.tensors)
    model.reload(pair.a.tensors.items())
    assert find_storage(model) == before
    pair.assert_like_a_fresh_load(model, pair.a.tensors)


def test_after_dummy_weights(pair):
    model = pair.model().load_dummy()
    before = find_storage(model)
    pair.run(model)
    model.reload(pair.b.tensors.items())
    assert find_storage(model) == before
    pair.assert_like_a_fresh_load(model, pair.b.tensors)


@pytest.mark.parametrize("axis", [None, -1, 0])
def test_in_another_order_and_layout(some_pair, axis):
    """The scales first, the last expert before the first; scales [N], [N, 1] or
    [1, N] after [N]."""
    pair, tensors = some_pair, some_pair.b.tensors
    if axis is not None and pair.a.case.weight == "per_channel":
        if axis == 0 and pair.a.case.kind == "moe_stacked":
            axis = 1  # after the experts' axis
        tensors = {
            n: t.unsqueeze(axis) if n.endswith("weight_scale") else t
            for n, t in tensors.items()
        }
        try:
            pair.serving(tensors)
        except (AssertionError, RuntimeError, ValueError):
            pytest.skip("this vLLM does not load scales of this layout")
    model = pair.serving(pair.a.tensors)
    model.reload(reversed(tensors.items()))
    pair.assert_like_a_fresh_load(model, pair.b.tensors)


def _stop_after(tensors: Tensors, count: int) -> Iterator[tuple[str, torch.Tensor]]:
    yield from list(tensors.items())[:count]
    raise ConnectionError("the weights' source is gone")


@pytest.mark.parametrize("second", ["the same", "another"])
def test_stops_and_is_repeated(pair, second):
    """A reload that ends in the middle of the layer leaves it to the next one, which
    is right or says which layer is not."""
    model = pair.serving(pair.a.tensors)
    half = len(pair.b.tensors) // 2
    with pytest.raises(ConnectionError):
        model.reload(_stop_after(pair.b.tensors, half))
    pair.reload_or_refuse(model, (pair.b if second == "the same" else pair.a).tensors)


@pytest.mark.parametrize("first", ["dummy", "checkpoint"])
def test_what_is_missing_is_named(some_pair, first):
    """A reload has fresh memory, not the old values, where no tensor comes. What was
    refused does not come back with the next checkpoint."""
    pair, case = some_pair, some_pair.a.case
    kinds = ["weight", "weight_scale"]
    if case.kind in ck.LINEAR and case.activation.startswith("static"):
        kinds.append("input_scale")
    for kind in kinds:
        model = (
            pair.serving_dummy() if first == "dummy" else pair.serving(pair.a.tensors)
        )
        missing = [n for n in pair.b.tensors if n.endswith(f".{kind}")][-1]
        remaining = {n: t for n, t in pair.b.tensors.items() if n != missing}
        with pytest.raises(ValueError, match=pair.named) as refusal:
            model.reload(remaining.items())
        assert "reload again" in str(refusal.value)
        pair.reload_or_refuse(model, pair.a.tensors)


@pytest.mark.parametrize("weight", ck.WEIGHTS)
@pytest.mark.parametrize("kind", ["qkv", "gate_up"])
def test_unequal_static_scales(kind, weight, monkeypatch):
    """Shards of one layer with static scales of their own: refused, no matter what
    the layer held before."""
    if ON_CPU:
        _watch_products(monkeypatch)
    pair = make_pair(kind, (weight, "static_sym"))
    names = [n for n in pair.b.tensors if n.endswith("input_scale")]
    unequal = {n: pair.b.tensors[n] * (1 + i) for i, n in enumerate(names)}
    unequal = {**pair.b.tensors, **unequal}
    equal_first = pair.serving(pair.a.tensors)
    pair.run(equal_first)
    dummy_first = pair.model().load_dummy()
    for model in (equal_first, dummy_first):
        with pytest.raises(ValueError, match="input_scale .*in another shard"):
            model.reload(unequal.items())
        model.reload(pair.b.tensors.items())
        pair.assert_like_a_fresh_load(model, pair.b.tensors)


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_of_two(some_pair, rank):
    """Tensor parallel: this rank's half of either checkpoint."""
    pair = some_pair
    if pair.a.case.kind == "row":
        pair.x = pair.x.chunk(2, dim=-1)[rank].contiguous()
    with shard(rank, 2):
        model = pair.serving(pair.a.tensors)
        pair.run(model)
        model.reload(pair.b.tensors.items())
        pair.assert_like_a_fresh_load(model, pair.b.tensors)


@pytest.mark.parametrize("first", ["loaded", "dummy"])
def test_fused_layers_of_a_models_own(first):
    """Rows of padding are made 0 once, before the first load."""
    checkpoint = ck.make_checkpoint("plain")
    model = Model(checkpoint)
    shards = ("index_k", 32), ("gate", 64)

    def draw(scale: float) -> Tensors:
        """By "kind shard", what the checkpoint has of a shard."""
        return {
            f"{kind} {name}": tensor
            for name, rows in shards
            for kind, tensor in {
                "weight": torch.randint(-127, 128, (rows, ck.K)).to(torch.int8),
                "weight_scale": torch.full((rows,), scale),
            }.items()
        }

    with default_dtype(torch.bfloat16), torch.device(DEVICE):
        config = ck.quark_config(checkpoint)
        layer = FusedShards(
            ck.K, [32, 64, 32], 1, quant_config=config, prefix="model.in_proj"
        )
        model.layer, model.root = layer, torch.nn.Module()
        model.root.add_module("in_proj", layer)
        reload.record_metadata_for_reloading(model.root)

    def hand_over(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            kind, shard = name.split()
            param = getattr(layer, kind)
            param.weight_loader(param, tensor, shard)

    model._hand_over = hand_over
    x = torch.randn(5, ck.K).to(torch.bfloat16)
    if first == "dummy":
        model.load_dummy()
    for i, tensors in enumerate((draw(0.5), draw(0.25), draw(2.0))):
        load = model.reload if i or first == "dummy" else model.load
        load(tensors.items())
        weight = torch.cat([tensors[f"weight {name}"] for name, _ in shards])
        scale = torch.cat([tensors[f"weight_scale {name}"] for name, _ in shards])
        expected = ck.quantize(x, "token_sym") @ (weight * scale[:, None]).double().t()
        assert ck.is_right(layer(x.to(DEVICE))[0].cpu()[:, :96], expected)
