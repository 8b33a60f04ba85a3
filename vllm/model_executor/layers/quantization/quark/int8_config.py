# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which scheme each layer of an INT8 W8A8 checkpoint of AMD Quark has.

Quark names layers as the checkpoint does, one projection and one expert at a
time, in exact names, globs and `re:` patterns. vLLM fuses projections and
experts and renames modules. Each layer is looked up here under every name that
it may have; one whose parts disagree, or whose scheme has no kernel, is
refused by name.
"""

import fnmatch
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import regex as re
import torch

from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

logger = init_logger(__name__)

# The projections of an expert, gate, up and down, by the names models use.
_EXPERT_PROJECTIONS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("gate_up_proj", "gate_up_proj", "down_proj"),
)
_PARTS = ("weight", "input_tensors", "output_tensors", "bias")


def _int8_weights(config: Any) -> bool:
    """Whether a Quark layer config quantizes weights to INT8."""
    weight = config.get("weight") if isinstance(config, dict) else None
    return isinstance(weight, dict) and weight.get("dtype") == "int8"


def _schemes(quant_config: dict[str, Any]) -> list[Any]:
    groups = (
        quant_config.get("layer_quant_config"),
        quant_config.get("layer_type_quant_config"),
    )
    configs = [c for g in groups if isinstance(g, dict) for c in g.values()]
    return [quant_config.get("global_quant_config"), *configs]


def is_int8(quant_config: Any) -> bool:
    """Whether any layer of a Quark `quantization_config` has INT8 weights."""
    if not isinstance(quant_config, dict):
        return False
    return any(map(_int8_weights, _schemes(quant_config)))


def checked_config(quant_config: dict[str, Any]) -> dict[str, Any]:
    """An INT8 `quantization_config` with its optional keys filled in.

    Other configs pass unchanged. Raises ValueError naming a key that is
    missing or of the wrong type.
    """
    schemes = [c for c in _schemes(quant_config) if isinstance(c, dict)]
    if not any(isinstance(c.get("weight"), (dict, list)) for c in schemes):
        raise ValueError(
            "quantization_config.global_quant_config of this Quark checkpoint names "
            "no weight scheme: restore config.json from the export"
        )
    if not is_int8(quant_config):
        return quant_config
    result = dict(quant_config)

    def need(where: dict[str, Any], key: str, kind: type, default: Any = None) -> None:
        value = where.get(key)
        if value is None and default is not None:
            value = default
        if not isinstance(value, kind):
            found = "is missing" if value is None else f"is {value!r}"
            raise ValueError(
                f"quantization_config.{key} of this Quark INT8 checkpoint {found}, "
                f"expected {kind.__name__}: restore config.json from the export"
            )
        where[key] = value

    need(result, "export", dict)
    result["export"] = dict(result["export"])
    need(result["export"], "kv_cache_group", list, [])
    need(result["export"], "pack_method", str, "reorder")
    need(result, "global_quant_config", dict)
    need(result, "layer_quant_config", dict, {})
    need(result, "layer_type_quant_config", dict, {})
    need(result, "exclude", list, [])
    for entry in (*result["exclude"], *result["layer_quant_config"]):
        if not isinstance(entry, str):
            raise ValueError(
                f"quantization_config.exclude holds {entry!r}, expected names: "
                "restore config.json from the export"
            )
        _compiled(entry)
    by_key = {"global_quant_config": result["global_quant_config"]}
    for key in ("layer_quant_config", "layer_type_quant_config"):
        by_key |= {f"{key}[{n!r}]": c for n, c in result[key].items()}
    for name, scheme in by_key.items():
        if scheme is not None and not isinstance(scheme, dict):
            raise ValueError(
                f"quantization_config.{name} is {scheme!r}, expected dict: restore "
                "config.json from the export"
            )
        for part in _PARTS if scheme else ():
            value = scheme.get(part)
            if value is not None and not isinstance(value, (dict, list)):
                raise ValueError(
                    f"quantization_config.{name}.{part} is {value!r}, expected dict: "
                    "restore config.json from the export"
                )
    return result


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> "re.Pattern | None":
    """The expression of a glob or `re:` pattern; None for an exact name."""
    if pattern.startswith("re:"):
        try:
            return re.compile(pattern[3:])
        except re.error as e:
            raise ValueError(f"{pattern!r} is no regular expression: {e}") from e
    if any(c in pattern for c in "*?["):
        return re.compile(fnmatch.translate(pattern))
    return None


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether an exact name, glob or `re:` pattern matches any of `names`."""
    compiled = _compiled(pattern)
    if compiled is None:
        return pattern in names
    return any(compiled.match(name) for name in names)


class Int8Layers:
    """The layers of one checkpoint: `exclude` and schemes by checkpoint names."""

    def __init__(self, quant_config: dict[str, Any]) -> None:
        self.exclude: list[str] = quant_config["exclude"]
        self.by_name: dict[str, Any] = quant_config["layer_quant_config"]
        self.by_type: dict[str, Any] = quant_config["layer_type_quant_config"]
        self.default: dict[str, Any] = quant_config["global_quant_config"]
        # Exact names are many, one for each expert at worst; patterns are few.
        self._exact = {p for p in self.exclude if _compiled(p) is None}
        self._patterns = [p for p in self.exclude if _compiled(p) is not None]
        self.mappers: list[Any] = []
        # Schemes of layers met so far, as vLLM's own selection reads them.
        self.served: dict[str, dict[str, Any]] = {}
        self.used: set[str] = set()
        self._reported: set[str] = set()
        for key in self.by_type:
            if key.rsplit(".", 1)[-1].strip("'>") != "Linear":
                raise ValueError(
                    f"layer_type_quant_config: layers of type {key} cannot be served "
                    "from an INT8 checkpoint: export without this entry"
                )

    def names(self, name: str) -> tuple[str, ...]:
        """Names that the checkpoint or its config may have for vLLM's `name`."""
        found = {name, name.replace(".mtp_block.", ".")}
        for mapper in self.mappers:
            for new in list(found):
                for old, to in (
                    getattr(mapper, "orig_to_new_substr", {}) or {}
                ).items():
                    if to and to in new:
                        found.add(new.replace(to, old))
                for old, to in (
                    getattr(mapper, "orig_to_new_prefix", {}) or {}
                ).items():
                    if to and new.startswith(to):
                        found.add(old + new[len(to) :])
                for old, to in (
                    getattr(mapper, "orig_to_new_suffix", {}) or {}
                ).items():
                    if to and new.endswith(to):
                        found.add(new[: -len(to)] + old)
        bare = {n.removeprefix("model.") for n in found}
        return tuple(found | bare | {f"model.{n}" for n in bare})

    def excludes(self, name: str) -> bool:
        """Whether `exclude` lists the checkpoint's module `name`."""
        return self._excluded(self.names(name), None)

    def _excluded(self, names: tuple[str, ...], among: set[str] | None) -> bool:
        hit = self._exact.intersection(names)
        for pattern in self._patterns:
            if (among is None or pattern in among) and matches(pattern, names):
                hit.add(pattern)
        self.used |= hit
        return bool(hit)

    def _scheme(
        self, names: tuple[str, ...], among: set[str] | None = None
    ) -> dict[str, Any] | None:
        """The config of one projection by the patterns `among` (None: all);
        None: kept in high precision."""
        if self._excluded(names, among):
            return None
        for pattern, config in self.by_name.items():
            if (among is None or pattern in among) and matches(pattern, names):
                self.used.add(pattern)
                return config
        for config in self.by_type.values():
            return config
        return self.default

    def _one(self, layer_name: str, parts: dict[str, dict[str, Any] | None]) -> Any:
        """The scheme that all `parts` (by name) of a layer share."""
        (first, scheme), *others = parts.items()
        for name, other in others:
            if _brief(other) != _brief(scheme):
                raise ValueError(
                    f"{layer_name}: {first} is {_says(scheme)}, but {name} is "
                    f"{_says(other)}: vLLM runs them as one layer. Export them alike "
                    "(`exclude`, `layer_quant_config`)"
                )
        return scheme

    def linear(self, layer_name: str, shards: list[str] | None) -> Any:
        """The config of a linear layer made of `shards`; None: excluded."""
        own = self.names(layer_name)
        exact = [p for p in (*self.exclude, *self.by_name) if _compiled(p) is None]
        if not shards or any(p in own for p in exact):
            return self._scheme(own)
        stem = layer_name.rpartition(".")[0]
        parts = [f"{stem}.{s}" if stem else s for s in shards]
        return self._one(layer_name, {p: self._scheme(self.names(p)) for p in parts})

    def experts(
        self, layer_name: str, count: int, projections: tuple[str, str, str] | None
    ) -> Any:
        """The config that all experts of a layer share; None: excluded.

        count: number of experts, over all ranks.
        projections: the checkpoint's names of gate, up and down, where known.
        """
        own = self.names(layer_name)
        best: tuple[list[str], dict[str, tuple[str, ...]]] = ([], {})
        for family in dict.fromkeys(filter(None, (projections, *_EXPERT_PROJECTIONS))):
            parts = {}
            for proj in dict.fromkeys(family):
                # One tensor for all experts is named beside or below the layer.
                stacked = [f"{n.rpartition('.')[0]}.{proj}" for n in own]
                stacked += [f"{n}.{proj}" for n in own]
                for e in range(count):
                    each = [f"{n}.{e}.{proj}" for n in own]
                    parts[f"{layer_name}.{e}.{proj}"] = (*own, *stacked, *each)
            names = {n for each in parts.values() for n in each}
            touched = [p for p in (*self.exclude, *self.by_name) if matches(p, names)]
            if len(touched) > len(best[0]) or not best[1]:
                best = touched, parts
        touched, parts = best
        return self._one(
            layer_name, {p: self._scheme(n, set(touched)) for p, n in parts.items()}
        )

    def unmatched(self, modules: Iterable[str]) -> list[str]:
        """Entries of `exclude` and `layer_quant_config` that match no layer and
        none of the checkpoint's `modules`."""
        modules = set(modules)
        modules |= {m.removeprefix("model.") for m in modules}
        modules |= {f"model.{m}" for m in modules}
        return [
            p
            for p in (*self.exclude, *self.by_name)
            if p not in self.used and not matches(p, modules)
        ]

    def say_once(self, what: str) -> None:
        if what not in self._reported:
            self._reported.add(what)
            logger.warning(what)


def _brief(config: dict[str, Any] | None) -> Any:
    """What of a config decides how a layer runs."""
    if not isinstance(config, dict):
        return config
    keys = ("dtype", "is_dynamic", "qscheme", "ch_axis", "group_size", "symmetric")

    def spec(part: Any) -> Any:
        if isinstance(part, dict):
            return {k: part.get(k) for k in keys}
        return [spec(p) for p in part] if isinstance(part, list) else part

    return {k: spec(config.get(k)) for k in _PARTS}


def _says(config: dict[str, Any] | None) -> str:
    if config is None:
        return "excluded from quantization"

    def spec(part: Any) -> str:
        if not isinstance(part, dict):
            return "not quantized" if part is None else str(part)
        how = "dynamic" if part.get("is_dynamic") else "static"
        sign = "symmetric" if part.get("symmetric") else "asymmetric"
        return f"{part.get('dtype')} {part.get('qscheme')} {how} {sign}"

    return (
        f"quantized (weight {spec(config.get('weight'))}, "
        f"input {spec(config.get('input_tensors'))})"
    )


def _refuse(layer_name: str, reason: str, way_out: str) -> None:
    raise ValueError(f"{layer_name}: {reason}: {way_out}")


def _check_scheme(layer_name: str, config: dict[str, Any]) -> None:
    """Raise ValueError, naming the layer, for INT8 schemes that no kernel runs."""
    weight, inputs = config["weight"], config.get("input_tensors")
    again = "export it again with AMD Quark"
    for part in ("output_tensors", "bias"):
        if config.get(part):
            _refuse(layer_name, f"its {part} is quantized", f"{again} without that")
    if weight.get("symmetric") is not True:
        _refuse(
            layer_name,
            f"INT8 weights with symmetric={weight.get('symmetric')}, kernels take "
            "symmetric ones only",
            f"{again} with symmetric=True",
        )
    if weight.get("qscheme") not in ("per_tensor", "per_channel"):
        _refuse(
            layer_name,
            f"INT8 weights quantized {weight.get('qscheme')}",
            f"{again} per_channel (ch_axis=0) or per_tensor",
        )
    if weight["qscheme"] == "per_channel" and weight.get("ch_axis") not in (None, 0):
        _refuse(
            layer_name,
            f"weights quantized along axis {weight['ch_axis']}, kernels scale outputs",
            f"{again} with ch_axis=0",
        )
    if weight.get("is_dynamic"):
        _refuse(layer_name, "weights quantized dynamically", f"{again} statically")
    if not isinstance(inputs, dict):
        found = "is missing" if inputs is None else f"is {inputs!r}"
        _refuse(
            layer_name,
            f"INT8 weights whose input_tensors config {found}",
            f"{again} as W8A8, or without INT8 weights",
        )
    if inputs.get("dtype") != "int8":
        _refuse(
            layer_name,
            f"INT8 weights with {inputs.get('dtype')} activations",
            f"{again} with int8 activations",
        )
    for key in ("is_dynamic", "symmetric"):
        if not isinstance(inputs.get(key), bool):
            _refuse(
                layer_name,
                f"input_tensors.{key} is {inputs.get(key)!r}",
                "restore config.json from the export",
            )
    qscheme, axis = inputs.get("qscheme"), inputs.get("ch_axis")
    if qscheme == "per_tensor":
        return
    # Quark calls one scale per token "per channel", along the tokens' axis of
    # activations [batch, token, feature] or [token, feature].
    if qscheme != "per_channel" or not inputs["is_dynamic"] or axis not in (None, 0, 1):
        _refuse(
            layer_name,
            f"activations quantized {qscheme}, "
            f"{'dynamic' if inputs['is_dynamic'] else 'static'}, axis {axis}",
            f"{again} per_tensor, or dynamic per token (per_channel, ch_axis=1)",
        )


def _describe(inputs: dict[str, Any]) -> str:
    how = "dynamic" if inputs["is_dynamic"] else "static"
    sign = "symmetric" if inputs["symmetric"] else "asymmetric"
    what = "per-tensor" if inputs["qscheme"] == "per_tensor" else "per-token"
    return f"{how} {what} {sign}"


def _layers(config: Any) -> Int8Layers:
    if "_int8_layers" not in config.__dict__:
        config._int8_layers = Int8Layers(config.quant_config)
    return config._int8_layers


def keep_names(config: Any, mapper: Any) -> None:
    """Remember a model's WeightsMapper, before it rewrites the config's names."""
    if is_int8(config.quant_config):
        _layers(config).mappers.append(mapper)


def int8_layers(config: Any) -> Int8Layers | None:
    """The layers of a QuarkConfig; None where it has no INT8 weights."""
    if "_int8_layers" in config.__dict__:
        return config._int8_layers
    return _layers(config) if is_int8(config.quant_config) else None


def unquantized_method(
    config: Any, layer: torch.nn.Module, layer_name: str
) -> QuantizeMethodBase | None:
    """The method of a layer that an INT8 checkpoint keeps in high precision.

    None: the layer is quantized (its scheme is then `served_config`), is no
    layer with weights, or the checkpoint has no INT8 weights. Raises ValueError
    naming the layer where its parts disagree or no kernel runs its scheme.
    """
    layers = int8_layers(config)
    is_experts = hasattr(layer, "moe_config")
    if layers is None or not (isinstance(layer, LinearBase) or is_experts):
        return None
    if is_experts:
        projections = tuple(
            getattr(layer, f"ckpt_{name}_proj_name", None)
            for name in ("gate", "up", "down")
        )
        scheme = layers.experts(
            layer_name,
            getattr(
                layer.moe_config, "num_logical_experts", layer.moe_config.num_experts
            ),
            projections if all(projections) else None,  # type: ignore[arg-type]
        )
    else:
        packed = config.packed_modules_mapping.get(layer_name.rpartition(".")[2])
        scheme = layers.linear(layer_name, packed)
    if scheme is None or not (scheme.get("weight") or scheme.get("input_tensors")):
        if is_experts:
            return UnquantizedFusedMoEMethod(layer.moe_config)
        return UnquantizedLinearMethod()
    if not scheme.get("weight"):
        _refuse(
            layer_name,
            "its input is quantized, its weight is not",
            "export it again with AMD Quark as W8A8",
        )
    if _int8_weights(scheme):
        _check_scheme(layer_name, scheme)
        inputs = scheme["input_tensors"]
        if is_experts or (inputs["is_dynamic"] and inputs["qscheme"] == "per_tensor"):
            # Fused MoE kernels quantize per token and scale per channel; a scale
            # per token is at least as fine as one per tensor.
            token = {**inputs, "qscheme": "per_channel", "ch_axis": 1}
            token |= {"is_dynamic": True}
            weight = scheme["weight"]
            if is_experts:
                token["symmetric"] = True
                weight = {**weight, "qscheme": "per_channel", "ch_axis": 0}
            if _describe(token) != _describe(inputs):
                layers.say_once(
                    f"{'INT8 experts' if is_experts else 'INT8 linear layers'} "
                    f"exported with {_describe(inputs)} activations are served with "
                    f"{_describe(token)} ones"
                )
            scheme = {**scheme, "weight": weight, "input_tensors": token}
    layers.served[layer_name] = scheme
    return None


def served_config(config: Any, layer_name: str) -> dict[str, Any] | None:
    """The scheme of a layer that `unquantized_method` has looked up."""
    layers = int8_layers(config)
    if layers is None:
        return None
    if layer_name not in layers.served:
        # Asked for before the layer is made, as for MXFP4's padding.
        return layers._scheme(layers.names(layer_name))
    return layers.served[layer_name]
