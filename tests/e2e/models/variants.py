# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The ways in which people quantize a model to INT8 with AMD Quark, and write down what they left out."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch

from tests.quantization.quark import layer_config, quantization_config, tensor_config


def matches(module: str, globs: Iterable[str]) -> bool:
    """Whether any of `globs` names a module of the checkpoint."""
    return any(fnmatch(module, glob) for glob in globs)


@dataclass(frozen=True)
class Scheme:
    """weight: "per_channel", "per_tensor", "per_group" (of 32 inputs) or "none" (BF16); activation: "token" (dynamic),
    "static", "none"; symmetric: inputs; dtype: "int8" or "fp8_e4m3"."""

    weight: str = "per_channel"
    activation: str = "token"
    symmetric: bool = True
    dtype: str = "int8"

    def to_config(self) -> dict:
        """The layer config as AMD Quark 0.13 writes it."""
        if self.weight == "none":
            return {"weight": None, "input_tensors": None, "output_tensors": None, "bias": None}
        activation = f"{self.activation}_{'sym' if self.symmetric else 'asym'}"
        return layer_config(self.weight, None if self.activation == "none" else activation, self.dtype)


_ATTENTION = ("*self_attn*", "*linear_attn*")


@dataclass(frozen=True)
class Variant:
    """scheme: of every layer that no entry names. style: how `exclude` is written: "names", "bare" (names without a
    leading "model."), "globs" or "re".

    leave: globs of modules that stay BF16, beside routers and lm_head. take: globs of modules that are INT8
    although they are routers or lm_head. unlisted: globs of BF16 modules that `exclude` does not name.
    others: schemes of modules by glob (`layer_quant_config`). scale: the name of a weight's scale.
    rotated: globs of modules with an `input_rotation` (QuaRot's R4) beside the weight. kv: globs of modules whose
    outputs go into an FP8 KV cache. pack: `pack_method`. adapter: globs of modules that a LoRA adapter, served with
    the model, adds to.
    """

    scheme: Scheme = field(default_factory=Scheme)
    style: str = "names"
    leave: tuple[str, ...] = ()
    take: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()
    others: tuple[tuple[str, Scheme], ...] = ()
    scale: str = "weight_scale"
    rotated: tuple[str, ...] = ()
    kv: tuple[str, ...] = ()
    pack: str = "reorder"
    adapter: tuple[str, ...] = ()
    moe_only: bool = False
    text_only: bool = False

    def fits(self, is_moe: bool, is_wrapper: bool) -> bool:
        """Whether it means something for such an architecture. vLLM drops adapters of wrappers and has none on CPU
        for experts."""
        return not (self.moe_only and not is_moe or self.text_only and (is_moe or is_wrapper))

    def stays(self, module: str, router: tuple[str, ...]) -> bool:
        """Whether a module of the checkpoint stays BF16."""
        return not matches(module, self.take) and matches(module, (*router, "*lm_head", *self.leave))

    def scheme_of(self, module: str) -> Scheme:
        """How a quantized module of the checkpoint is quantized."""
        return next((s for glob, s in self.others if fnmatch(module, glob)), self.scheme)

    def exclude(self, kept: list[str], router: tuple[str, ...]) -> list[str]:
        """The entries of `exclude` for the modules that stay BF16."""
        listed = [m for m in kept if not matches(m, self.unlisted)]
        if self.style == "names":
            return listed
        if self.style == "bare":
            return [m.removeprefix("model.") for m in listed]
        globs = [g for g in (*router, "*lm_head", *self.leave) if any(fnmatch(m, g) for m in listed)]
        if self.style == "globs":
            return globs
        # vLLM matches from the start of a name on, and `mlp.gate` is one of `mlp.gate_proj`.
        return ["re:" + re.escape(g).replace(r"\*", ".*") + "$" for g in globs]

    def to_config(self, kept: list[str], router: tuple[str, ...]) -> dict:
        """`quantization_config` as AMD Quark 0.13 writes it, for the modules `kept` in BF16."""
        schemes = {glob: scheme.to_config() for glob, scheme in self.others}
        cache = tensor_config("per_tensor", dtype="fp8_e4m3")
        schemes |= {glob: self.scheme.to_config() | {"output_tensors": cache} for glob in self.kv}
        config = quantization_config(exclude=self.exclude(kept, router))
        config |= {
            "global_quant_config": self.scheme.to_config(),
            "layer_quant_config": schemes,
            "algo_config": None,
        }
        config["export"] |= {"kv_cache_group": list(self.kv), "pack_method": self.pack, "min_kv_scale": 0.0}
        return config


BF16 = Scheme("none")
PER_TENSOR = Scheme("per_tensor")
STATIC = Scheme("per_channel", "static")
VARIANTS = {
    "names": Variant(),
    "globs": Variant(style="globs"),
    "re": Variant(style="re"),
    "bare": Variant(style="bare"),
    "no-attention-globs": Variant(style="globs", leave=_ATTENTION),
    "no-attention-names": Variant(leave=_ATTENTION),
    "no-attention-null": Variant(others=tuple((glob, BF16) for glob in _ATTENTION)),
    "experts-only": Variant(BF16, others=(("*experts.*", Scheme()),), moe_only=True),
    "per-tensor": Variant(PER_TENSOR),
    "per-tensor-down": Variant(others=(("*down_proj", PER_TENSOR), ("*.w2", PER_TENSOR))),
    "static": Variant(STATIC),
    "static-asym": Variant(replace(STATIC, symmetric=False)),
    "template": Variant(Scheme("per_tensor", "static")),
    "asym": Variant(Scheme(symmetric=False)),
    "router-unlisted": Variant(unlisted=("*gate", "*router*", "*gate.wg", "*shared_expert_gate"), moe_only=True),
    "router-int8": Variant(take=("*gate", "*router*", "*gate.wg", "*shared_expert_gate"), moe_only=True),
    "lm-head-int8": Variant(take=("*lm_head",)),
    "other-scale-names": Variant(scale="weight_quantizer.scale"),
    "weight-only": Variant(Scheme(activation="none")),
    "per-group": Variant(Scheme("per_group", "none")),
    "kv-fp8": Variant(kv=("*k_proj", "*v_proj")),
    "pack-order": Variant(pack="order"),
    "lora": Variant(adapter=("*q_proj", "*v_proj", "*down_proj"), text_only=True),
    "mixed-fp8": Variant(others=tuple((glob, Scheme(dtype="fp8_e4m3")) for glob in _ATTENTION)),
    "rotated": Variant(rotated=("*down_proj", "*.w2")),
}
