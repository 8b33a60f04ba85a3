# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The same numbers in the words of compressed-tensors, for a vLLM without the series.

The format: a symmetric weight with scales [N, 1], input_scale and input_zero_point [1] where activations are static,
experts one by one. vLLM runs experts with dynamic per-token symmetric activations alone.
Layers are listed by their names in the checkpoint and by those that vLLM fuses them to: releases whose model has no
packed_modules_mapping (Step-3.5's in 0.21.0) look for the latter.
"""

from collections import Counter, defaultdict
from math import prod
from typing import Any

from vllm_quark.checkpoint.entries import FUSED, experts_of
from vllm_quark.checkpoint.modules import PROJECTIONS
from vllm_quark.checkpoint.values import FLOATS
from vllm_quark.convert.layouts import split_experts
from vllm_quark.convert.plan import Piece, Source, Tensor

WEIGHTS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
KEPT = ("weight", "weight_scale", "bias")
DROPPED = ("weight_zero_point", "input_scale", "input_zero_point")
KV_CACHE = tuple(f"{of}_{kind}" for of in ("k", "v", "q", "kv", "output") for kind in ("scale", "zero_point"))
PER_TOKEN = "convert it with --per-token, which writes dynamic per-token ones (at least as fine), or serve it patched "
PER_TOKEN += "(vllm-quark apply)"
OTHER = "use --to per-expert, which leaves it as it is"


def to_compressed_tensors(source: Source, per_token: bool) -> tuple[list[Tensor], dict[str, Any]]:
    """The tensors, and the quantization_config.

    per_token: write dynamic per-token activations where the format cannot say a layer's own.
    """
    _refuse_others(source)
    inputs = {module: _name_inputs(source, module, per_token) for module in source.modules.int8}
    tensors, moved = split_experts(source)
    stacks = set(moved.values())
    unmoved = {module: activation for module, activation in inputs.items() if module not in stacks}
    inputs = unmoved | {new: inputs[old] for new, old in moved.items()}
    rows = {t.module: t.shape[0] for t in tensors if t.kind == "weight" and t.module in inputs}
    written = [_write(t, inputs[t.module], rows[t.module]) if t.module in inputs else t for t in tensors]
    return [t for t in written if t], _make_config(source, inputs)


def _refuse_others(source: Source) -> None:
    for module, state in source.modules.others.items():
        if source.modules.weight(module).dtype not in FLOATS:
            source.refuse(module, f"is {state}, and INT8 alone is converted", OTHER)
    for module, kinds in source.contents.modules.items():
        if any(kind in KV_CACHE for kind in kinds):
            source.refuse(module, "has the scales of a quantized KV cache, which are not converted", OTHER)


def _name_inputs(source: Source, module: str, per_token: bool) -> tuple[str, bool]:
    """How a module's activations are written: "token" or "tensor", and whether they are symmetric."""
    scheme = source.modules.int8[module]
    is_linear = source.modules.is_linear(module)
    if not scheme.static and scheme.per_token and (is_linear or scheme.symmetric):
        return "token", scheme.symmetric
    if is_linear and scheme.static:
        return "tensor", scheme.symmetric
    if not per_token:
        reason = f"has {scheme.inputs()} activations, which vLLM does not run from this format"
        source.refuse(module if is_linear else experts_of(module), reason, PER_TOKEN)
    return "token", True


def _write(tensor: Tensor, inputs: tuple[str, bool], rows: int) -> Tensor | None:
    """A tensor of an INT8 module as the format has it; None: it has none. rows: of the module's weight."""
    strategy, is_symmetric = inputs
    if tensor.kind == "weight_scale":
        piece = tensor.pieces[0]
        values = prod(tensor.shape)
        if values != rows:
            piece = Piece(piece.entry, piece.start, piece.size, rows)
        return Tensor(tensor.name, tensor.dtype, (rows, 1), (piece,))
    is_static = strategy == "tensor"
    if (tensor.kind == "input_scale" and is_static) or (
        tensor.kind == "input_zero_point" and is_static and not is_symmetric
    ):
        return Tensor(tensor.name, tensor.dtype, (1,), tensor.pieces)
    return tensor if tensor.kind in KEPT else None


def _make_config(source: Source, inputs: dict[str, tuple[str, bool]]) -> dict[str, Any]:
    """inputs: of the modules that are written as INT8."""
    groups: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for module, activation in inputs.items():
        groups[activation].append(module)
    # "Linear" stands for all that is not named, experts among them.
    experts = [activation for module, activation in inputs.items() if ".experts." in module]
    default = Counter(experts or inputs.values()).most_common(1)[0][0]
    config_groups = {}
    for i, (activation, modules) in enumerate(sorted(groups.items(), key=lambda group: group[0] != default)):
        strategy, is_symmetric = activation
        config_groups[f"group_{i}"] = {
            "targets": ["Linear"] if activation == default else _spell(source, modules),
            "weights": WEIGHTS,
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "strategy": strategy,
                "symmetric": is_symmetric,
                "dynamic": strategy == "token",
            },
        }
    floats = [m for m, w in source.contents.weights() if len(w.shape) >= 2 and m not in source.modules.int8]
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": list(dict.fromkeys(["lm_head", *_spell(source, floats)])),
        "config_groups": config_groups,
    }


def _spell(source: Source, modules: list[str]) -> list[str]:
    """The modules by all names that a vLLM may look for."""
    names: dict[str, None] = {}
    for module in modules:
        stem, _, last = module.rpartition(".")
        weight = source.contents.modules[module]["weight"]
        names[module] = None
        if last in FUSED and stem:
            names[f"{stem}.{FUSED[last]}"] = None
        if len(weight.shape) == 3 and last in PROJECTIONS:
            names |= dict.fromkeys(f"{experts_of(module)}.{expert}.{last}" for expert in range(weight.shape[0]))
    return [*names, *_spell_drafting(source, list(names))]


def _spell_drafting(source: Source, names: list[str]) -> list[str]:
    """Layers that draft, behind the model's own, as vLLM calls them in Step-3.5: below `mtp_block`."""
    config = source.checkpoint.config
    if not any("Step3p5" in name for name in config.get("architectures") or ()):
        return []
    stems = [f"model.layers.{config.get('num_hidden_layers', 0) + i}." for i in range(_count_drafting(config))]
    return [f"{s}mtp_block.{n.removeprefix(s)}" for n in names for s in stems if n.startswith(s)]


def _count_drafting(config: dict[str, Any]) -> int:
    return config.get("num_nextn_predict_layers") or 0
