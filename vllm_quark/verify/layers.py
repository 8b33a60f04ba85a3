# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The layers that vLLM makes of a checkpoint's modules, and a choice among them."""

import math
import random
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from vllm_quark.checkpoint import Checkpoint
from vllm_quark.checkpoint.entries import FUSED, is_expert
from vllm_quark.checkpoint.modules import Refusal

# Parts of a fused layer in the order of its outputs.
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Gate, up and down projection of an expert, by the names that models use.
EXPERTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
# Layers of these names are built with the quantization config, by all models.
SURE = (*FUSED, "o_proj", "down_proj")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Layer:
    """A layer of vLLM, by its name in the words of the checkpoint.

    kind: "linear", "gate_up_proj", "qkv_proj" or "experts". parts: modules of the checkpoint, in the order of outputs;
    of experts, gate, up and down, one list of modules each, or one module that holds all.
    scheme: an Int8Scheme; None: the layer is in `exclude`. shape: rows and columns of all weights together, of
    experts [experts, width, hidden].
    """

    name: str
    kind: str
    parts: tuple[tuple[str, ...], ...]
    scheme: Any
    shape: tuple[int, ...]
    activation: str = "silu"

    @property
    def group_key(self) -> tuple[Any, ...]:
        """Layers for which this is the same differ in their numbers alone."""
        return self.kind, self.scheme, self.shape, self.activation, self.name.rpartition(".")[2]


def find_layers(checkpoint: Checkpoint) -> list[Layer]:
    """All layers with INT8 weights, and those linear ones that `exclude` lists, in the model's order.

    Of layers that draft, behind the model's own, only INT8 ones: another class of vLLM's makes them, under other names.
    """
    modules: Any = checkpoint.modules
    model_depth = checkpoint.config.get("num_hidden_layers") or math.inf
    linear = {m: s for m, s in modules.int8.items() if modules.is_linear(m) and not isinstance(s, Refusal)}
    for module, state in modules.others.items():
        last = module.rpartition(".")[2]
        number = _LAYER.search(module)
        is_own = number is not None and int(number[1]) < model_depth
        if state == "in `exclude`" and is_own and last in SURE and modules.is_linear(module):
            linear[module] = None
    layers = []
    seen: set[str] = set()
    for module, scheme in linear.items():
        if module in seen:
            continue
        stem, _, last = module.rpartition(".")
        kind = FUSED.get(last, "linear")
        parts = tuple(f"{stem}.{part}" for part in PARTS.get(kind, ()))
        if not parts or not all(part in linear for part in parts):
            kind, parts = "linear", (module,)
        seen.update(parts)
        rows = sum(modules.weight(part).shape[0] for part in parts)
        name = module if kind == "linear" else f"{stem}.{kind}"
        shape = rows, modules.weight(module).shape[1]
        scheme = _join([linear[part] for part in parts])
        layers.append(Layer(name, kind, tuple((part,) for part in parts), scheme, shape))
    layers += _find_experts(checkpoint)
    return sorted(layers, key=lambda layer: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", layer.name)])


def _join(schemes: list[Any]) -> Any:
    """The scheme of a layer whose parts have these: one that has a scale a row spreads those of the others."""
    return next((s for s in schemes if s is not None and s.per_channel), schemes[0])


def _find_experts(checkpoint: Checkpoint) -> list[Layer]:
    modules: Any = checkpoint.modules
    groups: dict[str, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    for module, scheme in modules.int8.items():
        layer = modules.layer_of(module)
        if modules.is_linear(module) or layer is None or isinstance(scheme, Refusal):
            continue
        stem, _, last = module.rpartition(".")
        number = int(stem[len(layer) + 1 :]) if is_expert(module) and not modules.is_stacked(module) else -1
        groups[layer][last][number] = module
    layers = []
    for name, projections in groups.items():
        family = next((f for f in EXPERTS if all(p in projections for p in f)), None)
        if family is None:
            continue
        parts = tuple(tuple(m for _, m in sorted(projections[p].items())) for p in family)
        shape = modules.weight(parts[1][0]).shape
        if len(shape) == 2:
            shape = (len(parts[1]), *shape)
        scheme = _join([modules.int8[module] for part in parts for module in part])
        layers.append(Layer(name, "experts", parts, scheme, shape, _find_activation(checkpoint, name)))
    return layers


def _find_activation(checkpoint: Checkpoint, layer: str) -> str:
    """The activation of a layer's experts: Step-3.5 limits those of its last layers."""
    config, text = checkpoint.config, checkpoint.text_config
    limits, number = config.get("swiglu_limits") or text.get("swiglu_limits") or [], _LAYER.search(layer)
    if number and int(number[1]) < len(limits) and limits[int(number[1])]:
        return "swiglustep"
    act = config.get("hidden_act") or text.get("hidden_act") or "silu"
    return "gelu" if "gelu" in str(act) else "silu"


def choose_layers(layers: list[Layer], count: int) -> list[Layer]:
    """`count` of them: some of each kind, shape and scheme, the first and the last before others."""
    groups: dict[Any, list[Layer]] = defaultdict(list)
    for layer in layers:
        groups[layer.group_key].append(layer)
    queues = []
    for group in groups.values():
        first, middle, last = group[:1], group[1:-1], group[1:][-1:]
        random.Random(0).shuffle(middle)
        queues.append(first + last + middle)
    by_turns: list[Layer] = []
    while len(by_turns) < min(count, len(layers)):
        by_turns += [queue.pop(0) for queue in queues if queue]
    chosen = set(by_turns[:count])
    return [layer for layer in layers if layer in chosen]
