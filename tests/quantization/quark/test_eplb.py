# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""INT8 experts that expert load balancing (EPLB) copies and moves over ranks.

Run `pytest tests/quantization/quark/test_eplb.py`.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.quantization.quark.utils import (
    DEVICE,
    DTYPE,
    apply_experts,
    assert_close,
    emulate_moe,
    layer_ids,
    make_runner,
    parameter_name,
    quark_config,
    random_input,
    random_weight,
    shard,
)
from vllm.model_executor.layers.quantization.quark import quark_moe
from vllm.model_executor.layers.quantization.quark.int8 import stop_expert_moves
from vllm.model_executor.model_loader import reload
from vllm.v1.worker.gpu_worker import Worker

pytestmark = pytest.mark.skipif(
    not hasattr(quark_moe, "select_int8_moe_backend"),
    reason="this vLLM's INT8 experts are no modular kernel, which EPLB asks for",
)

E, COPIES, RANKS, TOP_K, K, I = 6, 2, 2, 2, 256, 128  # noqa: E741
PLACES = E + COPIES
# Where the experts are after a while: 0 and 5 are there twice.
MOVED = [[7, 2], [0, -1], [6, -1], [1, -1], [5, -1], [4, 3]]
SHARDS = {"w1": (I, K), "w3": (I, K), "w2": (K, I)}
Tensors = dict[tuple[str, str], torch.Tensor]


@pytest.fixture(autouse=True)
def environment(layer_environment, monkeypatch):
    config = layer_environment.parallel_config
    monkeypatch.setattr(config, "enable_expert_parallel", True)
    monkeypatch.setattr(config, "enable_eplb", True)
    monkeypatch.setattr(config.eplb_config, "use_async", False)
    torch.manual_seed(0)


def make_tensors() -> Tensors:
    """A checkpoint's tensors of all experts, by shard and kind."""
    tensors = {}
    for name, shape in SHARDS.items():
        weight, scale = random_weight(E, *shape)
        tensors |= {(name, "weight"): weight, (name, "weight_scale"): scale}
    return tensors


def make_rank(rank: int, copies: int = COPIES, **kwargs: Any) -> torch.nn.Module:
    """A layer of experts on one rank; kwargs: FusedMoE's."""
    settings: dict[str, Any] = dict(
        num_experts=E,
        num_redundant_experts=copies,
        enable_eplb=True,
        top_k=TOP_K,
        hidden_size=K,
        intermediate_size=I,
        quant_config=quark_config(),
    )
    with shard(rank, RANKS), torch.device(DEVICE):
        return make_runner(**settings | kwargs)


class Ranks:
    """One layer of experts on two ranks, in one process."""

    def __init__(self, copies: int = COPIES) -> None:
        self.roots = [torch.nn.Module() for _ in range(RANKS)]
        self.runners = [make_rank(rank, copies) for rank in range(RANKS)]
        for runner, root in zip(self.runners, self.roots):
            root.experts = runner.routed_experts
            with torch.device(DEVICE):
                reload.record_metadata_for_reloading(root)

    def load(self, hand_over: Callable, tensors: Tensors) -> "Ranks":
        for root in self.roots:
            hand_over(root.experts, tensors)
            root.experts.quant_method.process_weights_after_loading(root.experts)
        return self

    def reload(self, hand_over: Callable, tensors: Tensors) -> None:
        for root in self.roots:
            reload.initialize_layerwise_reload(root)
            hand_over(root.experts, tensors)
            config = type("Config", (), {"dtype": DTYPE})
            reload.finalize_layerwise_reload(root, config)

    def move(self, places: list[list[int]]) -> None:
        """As the state of EPLB says it to each layer of a model."""
        of_layers = torch.tensor([places], device=DEVICE)
        for runner in self.runners:
            count = torch.ones(1, E, dtype=torch.long, device=DEVICE)
            load = torch.zeros(1, PLACES, dtype=torch.int32, device=DEVICE)
            runner.set_eplb_state(0, load, of_layers, count)

    def assert_places(self, experts: list[int], tensors: Tensors) -> None:
        """Place by place the output is that of the expert which has to be there."""
        w13, s13 = (
            torch.cat([tensors["w1", kind], tensors["w3", kind]], 1)
            for kind in ("weight", "weight_scale")
        )
        w2, s2 = tensors["w2", "weight"], tensors["w2", "weight_scale"]
        x = random_input(33, K)
        weights = torch.ones(33, 1)
        for place, expert in enumerate(experts):
            out = torch.zeros(33, K)
            for root in self.roots:
                ids = torch.full((33, 1), place, dtype=torch.int32)
                on_device = (t.to(DEVICE) for t in (x, weights, ids))
                out += apply_experts(root.experts, *on_device).float().cpu()
            ids = torch.full((33, 1), expert)
            assert_close(out, emulate_moe(x, w13, s13, w2, s2, weights, ids))


def hand_over_places(layer: torch.nn.Module, tensors: Tensors) -> None:
    """As models do that know of the copies: by the place at the start."""
    for place in range(PLACES):
        load_one(layer, place, place % E, tensors)


def hand_over_experts(layer: torch.nn.Module, tensors: Tensors) -> None:
    """As Step3p5 does: by the checkpoint's number."""
    for expert in range(E):
        load_one(layer, expert, expert, tensors)


def hand_over_stacks(layer: torch.nn.Module, tensors: Tensors) -> None:
    """All experts' weights at once, their scales one by one."""
    for (shard_id, kind), tensor in tensors.items():
        name = parameter_name(shard_id, kind)
        param = getattr(layer, name)
        if kind == "weight":
            param.weight_loader(param, tensor, name, shard_id=shard_id, expert_id=0)
            continue
        for expert, part in enumerate(tensor):
            param.weight_loader(param, part, name, shard_id=shard_id, expert_id=expert)


def load_one(layer: torch.nn.Module, place: int, expert: int, tensors: Tensors) -> None:
    local = layer._expert_map.tolist()
    for (shard_id, kind), tensor in tensors.items():
        name = parameter_name(shard_id, kind)
        param = getattr(layer, name)
        took = param.weight_loader(
            param,
            tensor[expert],
            name,
            shard_id=shard_id,
            expert_id=place,
            return_success=True,
        )
        if layer.expert_places is None and place == expert:
            assert took is any(local[at] >= 0 for at in range(expert, PLACES, E))


WAYS = (hand_over_places, hand_over_experts, hand_over_stacks)


def experts_at(places: list[list[int]]) -> list[int]:
    at = {p: e for e, row in enumerate(places) for p in row if p >= 0}
    return [at[place] for place in range(PLACES)]


@pytest.mark.parametrize("hand_over", WAYS)
def test_each_copy_is_loaded(hand_over):
    tensors = make_tensors()
    Ranks().load(hand_over, tensors).assert_places([*range(E), 0, 1], tensors)


@pytest.mark.parametrize("hand_over", WAYS)
def test_a_reload_finds_experts_where_they_are(hand_over):
    ranks = Ranks().load(hand_over, make_tensors())
    ranks.move(MOVED)
    for tensors in (make_tensors(), make_tensors()):
        ranks.reload(hand_over, tensors)
        ranks.assert_places(experts_at(MOVED), tensors)


def test_the_layer_has_a_view_of_the_state():
    ranks = Ranks()
    of_layers = torch.tensor([MOVED, MOVED], device=DEVICE)
    one = torch.ones(2, E, device=DEVICE)
    ranks.runners[0].set_eplb_state(1, one, of_layers, one)
    of_layers[1, 3, 0] = 77
    assert ranks.roots[0].experts.expert_places[3, 0] == 77


def all_but(expert: int) -> Callable:
    def hand_over(layer: torch.nn.Module, tensors: Tensors) -> None:
        for other in set(range(E)) - {expert}:
            load_one(layer, other, other, tensors)

    return hand_over


@pytest.mark.parametrize("expert", [1, 4])
def test_a_missing_expert_is_named_by_the_checkpoint(expert):
    with pytest.raises(ValueError, match=rf"expert {expert}: gate_proj \(w1\)"):
        Ranks().load(all_but(expert), make_tensors())


def test_a_missing_expert_is_named_after_it_moved():
    ranks = Ranks().load(hand_over_experts, make_tensors())
    ranks.move(MOVED)
    with pytest.raises(ValueError, match=r"expert 5: gate_proj \(w1\)"):
        ranks.reload(all_but(5), make_tensors())


class LoadBalancing:
    """What a worker has of EPLB's state: one model, whose experts are on their way."""

    def __init__(self, is_alive: bool = True) -> None:
        self.async_worker = SimpleNamespace(is_alive=lambda: is_alive)
        self.model = SimpleNamespace(rebalanced=True)
        self.model_states = {"model": self.model}
        self.calls: list[str] = []

    def drain_async(self) -> None:
        self.calls.append("drain")
        self.model.rebalanced = False


def make_worker(root: torch.nn.Module, state: LoadBalancing, reload: Callable) -> Any:
    """A rank's worker whose reload and load balancing are stood in for."""
    runner = SimpleNamespace(
        get_model=lambda: root, reload_weights=reload, eplb_state=state
    )
    config = SimpleNamespace(quant_config=quark_config())
    return SimpleNamespace(model_runner=runner, vllm_config=config)


def fail_at_reload(**_: Any) -> None:
    pytest.fail("the reload began")


@pytest.fixture
def async_ranks(layer_environment, monkeypatch) -> Ranks:
    eplb_config = layer_environment.parallel_config.eplb_config
    monkeypatch.setattr(eplb_config, "use_async", True)
    ranks = Ranks().load(hand_over_experts, make_tensors())
    ranks.move(MOVED)
    return ranks


def test_moves_end_before_a_reload(async_ranks):
    """They would bring old experts after it."""
    tensors, state = make_tensors(), LoadBalancing()
    other = make_worker(async_ranks.roots[1], state, fail_at_reload)
    stop_expert_moves(other.model_runner)
    state.model.rebalanced = True

    def reload_weights() -> None:
        state.calls.append("reload")
        async_ranks.reload(hand_over_experts, tensors)

    Worker.reload_weights(make_worker(async_ranks.roots[0], state, reload_weights))
    assert state.calls == ["drain", "drain", "reload"]
    async_ranks.assert_places(experts_at(MOVED), tensors)


def test_moves_end_before_a_transfer_of_weights(async_ranks):
    state = LoadBalancing()
    worker = make_worker(async_ranks.roots[0], state, fail_at_reload)
    worker._check_weight_transfer_engine = lambda: state.calls.append("begin")
    with contextlib.suppress(AttributeError):  # the rest of it is not stood in for
        Worker._start_weight_update(worker)
    assert state.calls == ["drain", "begin"]


def test_no_tensor_is_taken_while_experts_move(async_ranks):
    """By another way than the worker's, and after a reload that came to nothing."""
    state, root = LoadBalancing(), async_ranks.roots[0]

    def load() -> None:
        reload.initialize_layerwise_reload(root)
        load_one(root.experts, 0, 0, make_tensors())

    def assert_refused() -> None:
        with pytest.raises(ValueError, match="use_async false in eplb_config"):
            load()

    assert_refused()
    stop_expert_moves(make_worker(root, state, fail_at_reload).model_runner)
    load()
    state.model.rebalanced = True
    assert_refused()
    state.model.rebalanced = False
    del state
    assert_refused()  # of an engine that is gone


def test_no_reload_of_data_parallel_ranks_while_experts_move(async_ranks):
    """One rank's drain would meet another one's step."""
    state, root = LoadBalancing(), async_ranks.roots[0]
    root.experts.moe_config.moe_parallel_config.dp_size = 2
    with pytest.raises(ValueError, match="experts: .*use_async false in eplb_config"):
        Worker.reload_weights(make_worker(root, state, fail_at_reload))
    assert not state.calls


def test_no_reload_where_the_moving_thread_has_ended(async_ranks):
    """Its moves would be waited for for ever."""
    state = LoadBalancing(is_alive=False)
    with pytest.raises(ValueError, match="experts: .*has ended.*start vLLM anew"):
        Worker.reload_weights(make_worker(async_ranks.roots[0], state, fail_at_reload))
    assert not state.calls


def test_nothing_to_end_where_experts_move_in_a_step():
    ranks, state = Ranks().load(hand_over_experts, make_tensors()), LoadBalancing()
    ranks.move(MOVED)
    stop_expert_moves(make_worker(ranks.roots[0], state, fail_at_reload).model_runner)
    assert not state.calls


def test_stacks_of_this_ranks_experts():
    """As Llama4 hands them over: a slice, and the number of its first expert."""
    tensors = make_tensors()

    def hand_over(layer: torch.nn.Module, tensors: Tensors) -> None:
        own = layer._expert_map.ge(0).nonzero().flatten().tolist()
        for (shard_id, kind), tensor in tensors.items():
            name = parameter_name(shard_id, kind)
            param = getattr(layer, name)
            if kind == "weight":
                part = tensor[own[0] : own[-1] + 1]
                param.weight_loader(param, part, name, shard_id, own[0])
                continue
            for expert in own:
                param.weight_loader(param, tensor[expert], name, shard_id, expert)

    ranks = Ranks(copies=0).load(hand_over, tensors)
    ranks.assert_places([*range(E)], tensors)


def test_experts_with_biases_are_not_balanced():
    """Nothing would load their copies' biases."""
    with pytest.raises(NotImplementedError, match="EPLB is not supported"):
        make_rank(0, has_bias=True)


@pytest.mark.parametrize("excluded", [0, 1])
def test_layers_of_other_experts_beside_them_are_refused(excluded):
    """EPLB moves all layers by way of the first one's buffers."""
    ids = [next(layer_ids), next(layer_ids)]
    config = quark_config(exclude=[f"*layers.{ids[excluded]}.moe.experts*"])
    names = [f"layers.{ids[i]}.moe.experts" for i in (1 - excluded, excluded)]
    said = f"{names[0]} is INT8 and model.{names[1]} is not, .*without --enable-eplb"
    with pytest.raises(ValueError, match=said):
        for number in ids:
            prefix = f"model.layers.{number}.moe.experts"
            make_rank(0, quant_config=config, prefix=prefix)


def moved_weights(ranks: Ranks) -> Iterator[list[torch.Tensor]]:
    """What EPLB moves of each rank's layer."""
    return ([*root.experts.get_expert_weights()] for root in ranks.roots)


@pytest.mark.skipif(DEVICE == "cpu", reason="EPLB is for GPUs; CPUs pack weights")
def test_all_that_belongs_to_an_expert_is_moved():
    tensors = make_tensors()
    ranks = Ranks().load(hand_over_experts, tensors)
    whole = [torch.cat(parts).clone() for parts in zip(*moved_weights(ranks))]
    assert len(whole) == 4  # weights and scales of both products
    experts = experts_at(MOVED)
    for rank, weights in enumerate(moved_weights(ranks)):
        own = experts[rank * PLACES // RANKS :][: PLACES // RANKS]
        for into, source in zip(weights, whole):
            into.copy_(source[torch.tensor(own, device=DEVICE)])
    ranks.assert_places(experts, tensors)
