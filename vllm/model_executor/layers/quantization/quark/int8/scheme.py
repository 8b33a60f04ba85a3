# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""INT8 W8A8 schemes of AMD Quark: parsing, refusals, and the schemes that kernels
serve instead."""

import copy
import fnmatch
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .names import compile_pattern

_RESTORE = "restore config.json from the export"
_AGAIN = "export it again with AMD Quark"
# Keys of an INT8 `quantization_config`, their types, and what stands for a missing one.
_KEYS = {
    "export": (dict, None),
    "global_quant_config": (dict, None),
    "layer_quant_config": (dict, {}),
    "layer_type_quant_config": (dict, {}),
    "exclude": (list, []),
}
_EXPORT_KEYS = {"kv_cache_group": (list, []), "pack_method": (str, "reorder")}


def _only_stage(spec: Any) -> Any:
    """A spec, out of its list of one: a list has one for each stage of quantization."""
    return spec[0] if isinstance(spec, list) and len(spec) == 1 else spec


def is_int8(layer_config: Any) -> bool:
    """Whether a Quark layer config quantizes weights to INT8."""
    weight = layer_config.get("weight") if isinstance(layer_config, dict) else None
    weight = _only_stage(weight)
    return isinstance(weight, dict) and weight.get("dtype") == "int8"


def _unwrapped(layer_config: Any) -> Any:
    """An INT8 layer config with its specs out of lists; another one as it is."""
    if not is_int8(layer_config):
        return layer_config
    return {key: _only_stage(spec) for key, spec in layer_config.items()}


def _layer_configs(quant_config: dict[str, Any]) -> dict[str, Any]:
    """Every layer config of a `quantization_config`, by its place there."""
    layer_configs = {"global_quant_config": quant_config.get("global_quant_config")}
    for key in ("layer_quant_config", "layer_type_quant_config"):
        group = quant_config.get(key)
        if isinstance(group, dict):
            layer_configs |= {
                f"{key}[{name!r}]": config for name, config in group.items()
            }
    return layer_configs


def has_int8(quant_config: Any) -> bool:
    """Whether any layer of a Quark `quantization_config` has INT8 weights."""
    is_dict = isinstance(quant_config, dict)
    return is_dict and any(map(is_int8, _layer_configs(quant_config).values()))


def _checked(key: str, value: Any, kind: type) -> Any:
    if isinstance(value, kind):
        return value
    state = "is missing or null" if value is None else f"is {value!r}"
    raise ValueError(
        f"quantization_config.{key} of this Quark INT8 checkpoint {state}, expected "
        f"{kind.__name__}: {_RESTORE}"
    )


def complete_config(quant_config: dict[str, Any]) -> dict[str, Any]:
    """An INT8 `quantization_config` with its optional keys filled in.

    One without INT8 layers passes unchanged. Raises ValueError naming a key that
    is missing or of the wrong type.
    """
    if not has_int8(quant_config):
        return quant_config

    def fill(config: dict[str, Any], keys: dict[str, tuple[type, Any]]) -> dict:
        given = {
            k: d if config.get(k) is None else config[k] for k, (_, d) in keys.items()
        }
        return config | {k: _checked(k, v, keys[k][0]) for k, v in given.items()}

    result = fill(quant_config, _KEYS)
    result["export"] = fill(result["export"], _EXPORT_KEYS)
    for entry in (*result["exclude"], *result["layer_quant_config"]):
        compile_pattern(_checked("exclude", entry, str))
    for name in result["layer_type_quant_config"]:
        if name.rsplit(".", 1)[-1].strip("'>") != "Linear":
            raise ValueError(
                f"layer_type_quant_config: layers of type {name} cannot be served "
                "from an INT8 checkpoint: export without this entry"
            )
    groups, by_name = result["export"]["kv_cache_group"], result["layer_quant_config"]
    if groups and not any(fnmatch.fnmatchcase(n, g) for n in by_name for g in groups):
        # Quark lists them apart where no layer of the KV cache is quantized.
        of_cache = quant_config.get("kv_cache_quant_config") or {}
        of_cache = copy.deepcopy(_checked("kv_cache_quant_config", of_cache, dict))
        result["layer_quant_config"] = by_name | of_cache
    result["global_quant_config"] = _unwrapped(result["global_quant_config"])
    for key in ("layer_quant_config", "layer_type_quant_config"):
        result[key] = {n: _unwrapped(config) for n, config in result[key].items()}
    for name, config in _layer_configs(result).items():
        parts = _checked(name, config, dict) if config is not None else {}
        for part in ("weight", "input_tensors", "output_tensors", "bias"):
            if not isinstance(parts.get(part), list | None):
                _checked(f"{name}.{part}", parts[part], dict)
    return result


def _spec(channel: bool, axis: int, dynamic: bool, symmetric: bool) -> dict[str, Any]:
    """Half of a Quark layer config, of weights or of inputs."""
    return {
        "dtype": "int8",
        "qscheme": "per_channel" if channel else "per_tensor",
        "ch_axis": axis if channel else None,
        "is_dynamic": dynamic,
        "symmetric": symmetric,
    }


# Inputs quantized as they come, one scale per token.
_PER_TOKEN = _spec(True, 1, True, True)
# What no kernel runs, of the config's weight (w), inputs (i) and itself (c): whether
# it is so, why it is refused, the way out.
_REFUSALS: tuple[tuple[Callable[[Any, Any, Any], Any], str, str], ...] = (
    (
        lambda w, i, c: c["output_tensors"],
        "its output_tensors are quantized",
        "without",
    ),
    (lambda w, i, c: c["bias"], "its bias is quantized", "without that"),
    (
        lambda w, i, c: w["symmetric"] is not True,
        "INT8 weights with symmetric={w[symmetric]}, kernels take symmetric ones only",
        "with symmetric=True",
    ),
    (
        lambda w, i, c: w["qscheme"] not in ("per_tensor", "per_channel"),
        "INT8 weights quantized {w[qscheme]}",
        "per_channel (ch_axis=0) or per_tensor",
    ),
    (
        lambda w, i, c: w["qscheme"] == "per_channel" and w["ch_axis"] not in (None, 0),
        "weights quantized along axis {w[ch_axis]}, kernels scale outputs",
        "with ch_axis=0",
    ),
    (lambda w, i, c: w["is_dynamic"], "weights quantized dynamically", "statically"),
    (
        lambda w, i, c: not c["input_tensors"],
        "INT8 weights whose input_tensors are null (weight-only)",
        "as W8A8, or write int8 input_tensors into config.json: "
        + ", ".join(f"{k} {json.dumps(v)}" for k, v in _PER_TOKEN.items()),
    ),
    (
        lambda w, i, c: i["dtype"] != "int8",
        "INT8 weights whose input_tensors are of dtype {i[dtype]}",
        "as W8A8, with int8 input_tensors, or without INT8 weights",
    ),
    (
        lambda w, i, c: not isinstance(i["is_dynamic"], bool),
        "input_tensors.is_dynamic is {i[is_dynamic]!r}",
        "with True or False there",
    ),
    (
        lambda w, i, c: not isinstance(i["symmetric"], bool),
        "input_tensors.symmetric is {i[symmetric]!r}",
        "with True or False there",
    ),
    (
        # Quark calls one scale per token "per channel", along the tokens' axis of
        # activations [batch, token, feature] or [token, feature].
        lambda w, i, c: i["qscheme"] != "per_tensor"
        and (
            i["qscheme"] != "per_channel"
            or not i["is_dynamic"]
            or i["ch_axis"] not in (None, 0, 1)
        ),
        "activations quantized {i[qscheme]}, is_dynamic={i[is_dynamic]}, axis "
        "{i[ch_axis]}",
        "per_tensor, or dynamic per token (per_channel, ch_axis=1)",
    ),
)


@dataclass(frozen=True)
class Int8Scheme:
    """How a layer's weights and inputs are quantized. Weights are symmetric.

    per_channel: one weight scale per row (N), or per matrix. static: input scales
    come from the checkpoint. per_token: one input scale per token, or per tensor.
    symmetric: inputs have no zero points.
    """

    per_channel: bool
    static: bool
    per_token: bool
    symmetric: bool

    @classmethod
    def parse(cls, layer_config: dict[str, Any], layer: str) -> "Int8Scheme":
        """The scheme of an INT8 layer config.

        Raises ValueError, naming `layer`, the reason and a way out, where no
        kernel runs it.
        """

        def part(value: Any) -> dict[str, Any]:
            return defaultdict(lambda: None, value if isinstance(value, dict) else {})

        config = part(layer_config)
        weight, inputs = part(config["weight"]), part(config["input_tensors"])
        for is_so, reason, way_out in _REFUSALS:
            if is_so(weight, inputs, config):
                reason = reason.format(w=weight, i=inputs)
                raise ValueError(f"{layer}: {reason}: {_AGAIN} {way_out}")
        return cls(
            per_channel=weight["qscheme"] == "per_channel",
            static=not inputs["is_dynamic"],
            per_token=inputs["qscheme"] == "per_channel",
            symmetric=inputs["symmetric"],
        )

    def for_linear(self) -> "Int8Scheme":
        """As kernels of linear layers serve it: dynamic inputs per token, which is
        at least as fine."""
        return replace(self, per_token=not self.static)

    def for_experts(self) -> "Int8Scheme":
        """As fused MoE kernels serve it: inputs per token without zero points,
        weight scales per channel (one value is spread over its rows)."""
        return Int8Scheme(True, static=False, per_token=True, symmetric=True)

    def to_config(self) -> dict[str, Any]:
        """The Quark layer config that vLLM's selection of a method reads."""
        inputs = _spec(self.per_token, 1, not self.static, self.symmetric)
        return {
            "weight": _spec(self.per_channel, 0, False, True),
            "input_tensors": inputs,
            "output_tensors": None,
            "bias": None,
        }

    def inputs(self) -> str:
        """The scheme of the activations, in words."""
        return (
            f"{'static' if self.static else 'dynamic'} "
            f"{'per-token' if self.per_token else 'per-tensor'} "
            f"{'symmetric' if self.symmetric else 'asymmetric'}"
        )

    def __str__(self) -> str:
        weights = "per-channel" if self.per_channel else "per-tensor"
        return f"{weights} weights, {self.inputs()} activations"
