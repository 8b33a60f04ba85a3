# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""What vLLM runs as one layer has to be quantized alike, be complete and fit together."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from vllm_quark.checkpoint.entries import MOST_EXPERTS, experts_of, is_expert
from vllm_quark.checkpoint.int8 import scheme
from vllm_quark.checkpoint.modules import PROJECTIONS, Modules, Refusal
from vllm_quark.checkpoint.report import AGAIN, ALIKE, INCOMPLETE, RESTORE, Finding

# Projections of an expert of [width, hidden], and of [hidden, width].
UP, DOWN = ("gate_proj", "up_proj", "w1", "w3"), ("down_proj", "w2")


def judge_parts(modules: Modules) -> Iterator[Finding]:
    """What is wrong with parts of layers that are whole by themselves."""
    yield from _find_unlike(modules)
    yield from _find_unlike_in_stacks(modules)
    yield from _find_missing(modules)
    yield from _find_misshapen(modules)
    yield from _judge_experts(modules)


def _find_unlike(modules: Modules) -> Iterator[Finding]:
    layers: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for module, parsed_scheme in (*modules.int8.items(), *modules.others.items()):
        layer = modules.layer_of(module)
        if layer is None or f"{module}.weight" in modules.judged or isinstance(parsed_scheme, Refusal):
            continue
        if isinstance(parsed_scheme, str):
            description = parsed_scheme
        elif not modules.is_linear(module):
            description = "INT8"  # served alike, however they were exported
        else:
            # One weight scale a matrix can be spread over its rows.
            description = f"INT8 with {replace(parsed_scheme.for_linear(), per_channel=True).inputs()} activations"
        layers[layer][description].append(module)
    for parts in layers.values():
        if len(parts) > 1:
            rare, *_, usual = sorted(parts.items(), key=lambda part: len(part[1]))
            (description, (first, *_)), (other_description, (other, *_)) = rare, usual
            reason = f"is {description}, but {other} is {other_description}, and vLLM runs them as one layer"
            yield Finding.of_layer(first, reason, ALIKE)


def _find_unlike_in_stacks(modules: Modules) -> Iterator[Finding]:
    """Entries that name one of the experts that a tensor holds."""
    for module in (*modules.int8, *modules.others):
        last = module.rpartition(".")[2]
        if last in PROJECTIONS and modules.is_stacked(module):
            outcome = _sort_out(*modules.entries.look_up(module, is_stacked=True))
            names = (f"{experts_of(module)}.{e}.{last}" for e in range(modules.weight(module).shape[0]))
            unlike = next((n for n in names if _sort_out(*modules.entries.look_up(n, stack=module)) != outcome), None)
            if unlike:
                reason = f"holds all experts, but config.json says of {unlike} what it does not say of others"
                yield Finding.of_layer(module, reason, RESTORE)


def _sort_out(is_excluded: bool, config: Any) -> Any:
    """What an expert's layer config comes to: INT8 schemes are served alike."""
    return "INT8" if not is_excluded and scheme.is_int8(config) else (is_excluded, config)


def _find_missing(modules: Modules) -> Iterator[Finding]:
    """A gate has an up projection, and all experts have a down projection."""
    for module in modules.int8:
        stem, _, last = module.rpartition(".")
        missing = ""
        if is_expert(module):
            continue
        if last == "gate_proj" and f"{stem}.down_proj" in modules.contents.modules:
            missing = f"{stem}.up_proj"
        elif last in ("gate_proj", "up_proj") and modules.is_stacked(module):
            missing = f"{stem}.down_proj"
        if missing and missing not in modules.contents.modules:
            yield Finding.of_tensor(f"{missing}.weight", "", f"is not in the checkpoint, but {last} is", INCOMPLETE)


def _find_misshapen(modules: Modules) -> Iterator[Finding]:
    """Gate and up have one shape, keys and values one input."""
    for module in modules.int8:
        stem, _, last = module.rpartition(".")
        other = {"up_proj": f"{stem}.gate_proj", "v_proj": f"{stem}.k_proj"}.get(last)
        if other in modules.int8 and modules.is_linear(module) and modules.is_linear(other):
            weight, other_weight = modules.weight(module), modules.weight(other)
            if weight.shape[1] != other_weight.shape[1] or (last == "up_proj" and weight.shape != other_weight.shape):
                reason = f"is {weight}, but {other_weight.name} is {other_weight}, and vLLM runs them as one layer"
                yield Finding.of_tensor(weight.name, weight.file, reason, AGAIN)


def _judge_experts(modules: Modules) -> Iterator[Finding]:
    """All experts of a layer have the same projections, and all of these fit together."""
    layers: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for module in (*modules.int8, *modules.floats, *modules.others):
        layer, (stem, _, last) = modules.layer_of(module), module.rpartition(".")
        if layer and not modules.is_linear(module):
            expert = "" if modules.is_stacked(module) else stem[len(layer) + 1 :]
            layers[layer][last][expert] = module
    for layer, projections in layers.items():
        numbers = {int(expert) for experts in projections.values() for expert in experts if expert.isdecimal()}
        if numbers and max(numbers) < MOST_EXPERTS:
            numbers |= set(range(max(numbers)))
        for last, experts in projections.items():
            for number in sorted(numbers) if "" not in experts else ():
                name = f"{layer}.{number}.{last}"
                is_judged = not modules.judged.isdisjoint((f"{name}.weight", f"{name}.weight_scale"))
                if str(number) not in experts and not is_judged:
                    reason = "is not in the checkpoint, and those of other experts are"
                    yield Finding.of_tensor(f"{name}.weight", "", reason, INCOMPLETE)
        # As [width, hidden], behind the number of experts in a stack.
        shapes = {
            module: shape if last in UP else (*shape[:-2], *shape[:-3:-1])
            for last, experts in projections.items()
            for module in experts.values()
            if last in UP + DOWN and module in modules.int8
            for shape in (modules.weight(module).shape,)
        }
        usual = next(iter(Counter(shapes.values()).most_common(1)), ((), 0))[0]
        for module, shape in shapes.items():
            if shape != usual:
                weight, is_down = modules.weight(module), module.rpartition(".")[2] in DOWN
                expected = [*usual[:-2], *usual[:-3:-1]] if is_down else list(usual)
                reason = f"is {weight}, expected {expected} by the others of its layer"
                yield Finding.of_tensor(weight.name, weight.file, reason, AGAIN)
