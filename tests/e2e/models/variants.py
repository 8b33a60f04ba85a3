# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The ways in which people quantize a model to INT8 with AMD Quark, and write down what they left out."""

import re
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch


@dataclass(frozen=True)
class Scheme:
    """weight: "per_channel" or "per_tensor"; activation: "token" (dynamic), "static", "none"; symmetric: inputs."""

    weight: str = "per_channel"
    activation: str = "token"
    symmetric: bool = True

    def to_config(self) -> dict:
        """The layer config as AMD Quark 0.13 writes it."""
        common = {"dtype": "int8", "is_dynamic": False, "symmetric": True, "group_size": None}
        weight = common | {"qscheme": self.weight, "ch_axis": 0 if self.weight == "per_channel" else None}
        inputs = None
        if self.activation != "none":
            dynamic = self.activation == "token"
            inputs = common | {
                "qscheme": "per_channel" if dynamic else "per_tensor",
                "ch_axis": 1 if dynamic else None,
                "is_dynamic": dynamic,
                "symmetric": self.symmetric,
            }
        return {"weight": weight, "input_tensors": inputs, "output_tensors": None, "bias": None}


_ATTENTION = ("*self_attn*", "*linear_attn*")


@dataclass(frozen=True)
class Variant:
    """scheme: of every layer that no entry names. style: how `exclude` is written: "names", "globs" or "re".

    leave: globs of modules that stay BF16, beside routers and lm_head. take: globs of modules that are INT8
    although they are routers or lm_head. unlisted: globs of BF16 modules that `exclude` does not name.
    others: schemes of modules by glob (`layer_quant_config`). scale: the name of a weight's scale.
    rotated: globs of modules with an `input_rotation` (QuaRot's R4) beside the weight.
    """

    scheme: Scheme = field(default_factory=Scheme)
    style: str = "names"
    leave: tuple[str, ...] = ()
    take: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()
    others: tuple[tuple[str, Scheme], ...] = ()
    scale: str = "weight_scale"
    rotated: tuple[str, ...] = ()
    moe_only: bool = False

    def stays(self, module: str, router: tuple[str, ...]) -> bool:
        """Whether a module of the checkpoint stays BF16."""
        if any(fnmatch(module, glob) for glob in self.take):
            return False
        return any(fnmatch(module, glob) for glob in (*router, "*lm_head", *self.leave))

    def scheme_of(self, module: str) -> Scheme:
        """How a quantized module of the checkpoint is quantized."""
        return next((s for glob, s in self.others if fnmatch(module, glob)), self.scheme)

    def exclude(self, kept: list[str], router: tuple[str, ...]) -> list[str]:
        """The entries of `exclude` for the modules that stay BF16."""
        listed = [m for m in kept if not any(fnmatch(m, glob) for glob in self.unlisted)]
        if self.style == "names":
            return listed
        globs = [g for g in (*router, "*lm_head", *self.leave) if any(fnmatch(m, g) for m in listed)]
        if self.style == "globs":
            return globs
        return ["re:" + re.escape(g).replace(r"\*", ".*") for g in globs]


PER_TENSOR = Scheme("per_tensor")
STATIC = Scheme("per_channel", "static")
VARIANTS = {
    "names": Variant(),
    "globs": Variant(style="globs"),
    "re": Variant(style="re"),
    "no-attention-globs": Variant(style="globs", leave=_ATTENTION),
    "no-attention-names": Variant(leave=_ATTENTION),
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
    "rotated": Variant(rotated=("*down_proj", "*.w2")),
}
