# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Experts one by one (`moe.experts.3.up_proj.weight` [N, K]) or all in one tensor (`moe.up_proj.weight` [E, N, K])."""

from collections import defaultdict
from math import prod
from typing import Any

from vllm_quark.checkpoint.entries import experts_of, is_expert
from vllm_quark.checkpoint.int8 import scheme
from vllm_quark.checkpoint.modules import PROJECTIONS
from vllm_quark.checkpoint.report import ALIKE
from vllm_quark.convert.plan import Piece, Source, Tensor

# Modules by their new names, with their old ones.
Moved = dict[str, str]


def split_experts(source: Source) -> tuple[list[Tensor], Moved]:
    """Stacked INT8 experts one by one, all else as it is."""
    tensors: list[Tensor] = []
    moved: Moved = {}
    for module, kinds in source.contents.modules.items():
        if module not in source.modules.int8 or not source.modules.is_stacked(module):
            tensors += map(source.keep, kinds.values())
            continue
        last = module.rpartition(".")[2]
        if last not in PROJECTIONS or last == "gate_up_proj":
            way_out = "export it again with its experts split, as AMD Quark's SplitFusedExperts does"
            source.refuse(module, "holds all experts, and there is no name for one expert's part of it", way_out)
            continue
        count = kinds["weight"].shape[0]
        names = [f"{experts_of(module)}.{expert}.{last}" for expert in range(count)]
        moved |= dict.fromkeys(names, module)
        for kind, entry in kinds.items():
            tensors += _split(source, entry, [f"{name}.{kind}" for name in names], kinds["weight"].shape)
    return tensors, moved


def _split(source: Source, entry: Any, names: list[str], weight: tuple[int, ...]) -> list[Tensor]:
    """One expert's tensors by `names`, of the tensor of all; weight: the shape [E, N, K] of the experts' weight."""
    count, size, values = len(names), source.sizes[entry.name], prod(entry.shape)
    if entry.shape == weight or (values and entry.shape[0] == count) or values == count * weight[1]:
        expert_size, step = size // count, size // count
        shape = entry.shape[1:]
    elif values in (1, weight[1]):  # one for all experts
        expert_size, step = size, 0
        shape = entry.shape
    else:
        source.refuse(entry.name, f"is {entry}, which is not one value an expert", ALIKE)
        return []
    if entry.shape != weight:
        shape = tuple(n for n in shape if n != 1)
    return [Tensor(n, entry.dtype, shape, (Piece(entry, step * i, expert_size),)) for i, n in enumerate(names)]


def stack_experts(source: Source) -> tuple[list[Tensor], Moved]:
    """INT8 experts that lie one by one in one tensor a projection, all else as it is."""
    groups: dict[str, dict[int, str]] = defaultdict(dict)
    for module in source.modules.int8:
        layer, last = experts_of(module), module.rpartition(".")[2]
        expert = module[len(layer) + 1 :].removesuffix(f".{last}")
        if is_expert(module) and last in PROJECTIONS and expert.isdecimal():
            groups[f"{layer.removesuffix('.experts')}.{last}"][int(expert)] = module
    tensors: list[Tensor] = []
    moved: Moved = {}
    stacked = {module: name for name, group in groups.items() for module in group.values()}
    for module, kinds in source.contents.modules.items():
        if module not in stacked:
            tensors += map(source.keep, kinds.values())
        elif stacked[module] not in moved:
            name = stacked[module]
            group = [groups[name][expert] for expert in sorted(groups[name])]
            moved[name] = group[0]
            if not name.rpartition(".")[0].endswith(".moe"):
                way_out = "leave its experts one by one, or use --to compressed-tensors"
                source.refuse(name, "vLLM reads stacked INT8 experts of Step-3.5 alone", way_out)
            else:
                tensors += _stack(source, name, group)
    return tensors, moved


def _stack(source: Source, name: str, group: list[str]) -> list[Tensor]:
    """All tensors of a projection of all experts; group: the experts' modules, in order."""
    tensors = []
    for kind in source.contents.modules[group[0]]:
        entries = [source.contents.modules[module].get(kind) for module in group]
        headers = {(entry.dtype, entry.shape if kind == "weight" else None) for entry in entries if entry}
        if None in entries or len(headers) > 1:
            reason = f"{kind} of its experts {'is missing for some' if None in entries else 'differ in dtype or shape'}"
            source.refuse(name, reason, f"{ALIKE}, or leave its experts one by one")
            continue
        shape, most_values = entries[0].shape, max(prod(entry.shape) for entry in entries)
        if kind != "weight":
            shape = (most_values,) if most_values > 1 else ()
        # One value per expert counts for all its rows where others have one per row.
        times = [most_values // prod(entry.shape) if kind != "weight" else 1 for entry in entries]
        pieces = (Piece(e, 0, source.sizes[e.name], t) for e, t in zip(entries, times, strict=True))
        tensors.append(Tensor(f"{name}.{kind}", entries[0].dtype, (len(group), *shape), tuple(pieces)))
    extra = {kind for module in group for kind in source.contents.modules[module]}
    for kind in sorted(extra - set(source.contents.modules[group[0]])):
        reason = f"{kind} of its experts is missing for some"
        source.refuse(name, reason, f"{ALIKE}, or leave its experts one by one")
    return tensors


def carry_config(source: Source, moved: Moved) -> dict[str, Any]:
    """The quantization_config that says of the moved modules, by their new names, what it said of the old ones."""
    entries, config = source.modules.entries, source.checkpoint.own_quant_config
    added: dict[str, Any] = {}
    for new, old in moved.items():
        _, old_config = entries.look_up(old, source.modules.is_stacked(old))
        is_excluded, new_config = entries.look_up(new, not is_expert(new))
        if is_excluded:
            source.refuse(new, f"would be in `exclude`, which {old} is not", "name layers in `exclude` by full names")
        elif new_config != old_config or not scheme.is_int8(new_config):
            layer, _, last = new.rpartition(".")
            added[f"{layer.rpartition('.')[0]}.*.{last}" if is_expert(new) else new] = old_config
    return config | {"layer_quant_config": added | (config.get("layer_quant_config") or {})} if added else config
