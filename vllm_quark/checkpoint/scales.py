# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Scales and zero points of INT8 modules: whether they are there, are what the scheme has, and hold good numbers."""

from collections import defaultdict
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

from vllm_quark.checkpoint.modules import Modules, Refusal
from vllm_quark.checkpoint.report import AGAIN, Finding
from vllm_quark.checkpoint.values import (
    DTYPES,
    FLOATS,
    ShortFileError,
    judge_scale,
    judge_zero_point,
    read_values,
)

SPREAD = "set qscheme to per_channel and ch_axis to 0 in the weight part of its config in config.json"
DYNAMIC = "set is_dynamic to true and qscheme to per_channel in the input_tensors of config.json: one scale per token"


class Wanted(NamedTuple):
    """A tensor whose values are judged: a scale (of a weight, or of inputs) or a zero point."""

    entry: Any
    way_out: str
    weight: Any = None
    is_zero: bool | None = None  # of a zero point: only 0 is one


def judge_scale_headers(modules: Modules, wanted: list[Wanted]) -> Iterator[Finding]:
    """What is wrong with the headers of scales and zero points; those whose values count go into `wanted`."""
    # One scale a row counts for a layer's parts that have one a matrix.
    spread = {modules.layer_of(m) for m, s in modules.int8.items() if not isinstance(s, Refusal) and s.per_channel}
    for module, scheme in modules.int8.items():
        kinds, is_linear = modules.contents.modules[module], modules.is_linear(module)
        weight, scale, zero = kinds["weight"], kinds.get("weight_scale"), kinds.get("weight_zero_point")
        is_sound = scale is not None and scale.name not in modules.judged
        if is_sound:
            wanted.append(Wanted(scale, AGAIN, weight=weight))
        if isinstance(scheme, Refusal):
            continue
        # Experts are served per channel, whatever they were exported as.
        is_per_tensor = is_linear and not scheme.per_channel and (modules.layer_of(module) or module) not in spread
        if is_per_tensor and is_sound and prod(scale.shape) > 1:
            reason = f"is {scale}, but config.json says one value a matrix"
            yield Finding.of_tensor(scale.name, scale.file, reason, SPREAD)
        if zero is not None:
            counts = {prod(weight.shape[:-2])} if is_per_tensor else {prod(weight.shape[:-2]), prod(weight.shape[:-1])}
            if _is_integer(zero) and prod(zero.shape) in counts:
                wanted.append(Wanted(zero, f"{AGAIN} with symmetric=True", is_zero=True))
            else:
                expected = "or ".join(f"{count} " for count in sorted(counts))
                reason = f"is {zero}, but expected are {expected}integers"
                yield Finding.of_tensor(zero.name, zero.file, reason, AGAIN)
        if is_linear and scheme.static:
            yield from _judge_inputs(module, kinds, scheme.symmetric, wanted)


def _is_integer(zero: Any) -> bool:
    return zero.dtype in DTYPES and zero.dtype not in FLOATS


def _judge_inputs(module: str, kinds: dict[str, Any], is_symmetric: bool, wanted: list[Wanted]) -> Iterator[Finding]:
    """The scale and the zero point of static activations: one value each."""
    for kind in ("input_scale", "input_zero_point"):
        entry, is_zero_point = kinds.get(kind), kind == "input_zero_point"
        if entry is None:
            if not (is_zero_point and is_symmetric):
                reason = "is not in the checkpoint, but config.json says that activations are static"
                yield Finding.of_tensor(f"{module}.{kind}", "", reason, DYNAMIC)
        elif prod(entry.shape) != 1 or not (_is_integer(entry) if is_zero_point else entry.dtype in FLOATS):
            reason = f"is {entry}, expected one {'integer' if is_zero_point else 'float'}"
            yield Finding.of_tensor(entry.name, entry.file, reason, DYNAMIC)
        else:
            wanted.append(Wanted(entry, DYNAMIC, is_zero=is_symmetric if is_zero_point else None))


def judge_values(modules: Modules, wanted: list[Wanted]) -> Iterator[Finding]:
    """Read `wanted` and judge its values. Raises OSError."""
    by_name = {w.entry.name: w for w in wanted if w.entry.dtype in DTYPES}
    inputs: dict[str, float] = {}
    try:
        for entry, values in read_values([w.entry for w in by_name.values()]):
            tensor = by_name[entry.name]
            if tensor.is_zero is None:
                reason = judge_scale(entry, values, tensor.weight)
            else:
                reason = judge_zero_point(entry, values, tensor.is_zero)
            if reason:
                yield Finding.of_tensor(entry.name, entry.file, reason, tensor.way_out)
            elif tensor.way_out is DYNAMIC:
                inputs[entry.name] = values[0].item()
    except ShortFileError as e:
        yield Finding.of_file(e.file, "was cut short while it was read", "copy or export it again")
    yield from _judge_fused_inputs(modules, inputs)


def _judge_fused_inputs(modules: Modules, inputs: dict[str, float]) -> Iterator[Finding]:
    """vLLM quantizes a fused layer's input once. inputs: static scales and zero points by name."""
    layers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in inputs:
        module, _, kind = name.rpartition(".")
        if layer := modules.layer_of(module):
            layers[layer, kind].append(name)
    for (_, kind), (first, *others) in layers.items():
        for other in [other for other in others if inputs[other] != inputs[first]][:1]:
            entry = modules.contents.modules[first.rpartition(".")[0]][kind]
            reason = f"is {inputs[first]:.6g}, but {other} is {inputs[other]:.6g}, and vLLM quantizes their input once"
            yield Finding.of_tensor(first, entry.file, reason, DYNAMIC)
