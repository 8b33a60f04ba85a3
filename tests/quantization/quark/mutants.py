# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Seeded mutations of a checkpoint: of its tensors and of its config, one each."""

import collections
import copy
import random
from collections.abc import Iterable
from typing import Any

import regex as re
import torch

OURS = re.compile(r"/quark/int8/\w+\.py$|/cpu_int8_\w+\.py$")
TENSOR_CHANGES = "drop drop_module rename repeat cast reshape columns transpose "
TENSOR_CHANGES += "grow cut negate poison zero_point"
DTYPES = "int8 uint8 int32 float16 bfloat16 float32 float64 bool"
BAD_SCALES = [float("nan"), float("inf"), -float("inf"), -0.01, 0.0, 1e30, 1e-30]
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
VALUES = {
    "dtype": ["int4", "fp8_e4m3", "uint8", "int8", 8],
    "qscheme": ["per_group", "per_tensor", "per_channel", "x"],
    "ch_axis": [1, -1, 0, "0"],
    "symmetric": [False, True, "yes"],
    "is_dynamic": [True, False, "no"],
    "exclude": [{}, "lm_head", [3]],
}
SCHEMES: list[tuple[str, dict[str, Any]]] = [
    ("weight", {"qscheme": "per_tensor"}),
    ("weight", {"symmetric": False}),
    ("weight", {"observer_cls": "X"}),
    ("input_tensors", {"symmetric": False}),
    ("input_tensors", {"is_dynamic": True}),
    ("input_tensors", {"is_dynamic": False, "qscheme": "per_tensor", "ch_axis": None}),
]


class Mutator:
    """Changes the tensors and the `quantization_config` of a checkpoint in place.

    again: tensors that come a second time, after all others. flaw: why this is no
    checkpoint, where neither its tensors nor its config alone say so.
    """

    def __init__(
        self, seed: int, tensors: dict[str, torch.Tensor], config: dict[str, Any]
    ) -> None:
        self.random = random.Random(seed)
        self.pick = self.random.choice
        self.tensors, self.config = tensors, config
        self.again: dict[str, torch.Tensor] = {}
        self.flaw: str | None = None

    def mutate(self) -> str:
        """Make one change, and say which."""
        kinds = [self.change_tensor] * 6 + [self.change_key] * 2 + [self.add_unasked]
        kinds += [self.change_scheme] * 2 + [self.change_exclude] * 2
        return self.pick(kinds)()

    def pick_name(self, names: Iterable[str]) -> str:
        """One of `names`; those that differ in a number only, as experts', count as
        one."""
        groups = collections.defaultdict(list)
        for name in sorted(names):
            groups[re.sub(r"\d+", "0", name)].append(name)
        return self.pick(self.pick(list(groups.values())))

    def pick_int8(self) -> str:
        """A module whose weight is INT8."""
        weights = [n for n, t in self.tensors.items() if t.dtype == torch.int8]
        weights = [n for n in weights if n.endswith(".weight")]
        return self.pick_name(weights).removesuffix(".weight")

    def change_tensor(self) -> str:
        change = self.pick(TENSOR_CHANGES.split())
        axes = {"transpose": 2, "grow": 1, "cut": 1}.get(change, 0)
        names = [n for n, t in self.tensors.items() if t.dim() >= axes]
        if change == "poison":
            names = [n for n in names if n.endswith("_scale")]
        elif change == "zero_point":
            scale_names = {n: f"{n.rpartition('.')[0]}.weight_scale" for n in names}
            names = [n for n, scale in scale_names.items() if scale in self.tensors]
        name = self.pick_name(names)
        tensor, module = self.tensors[name], name.rpartition(".")[0]
        if change == "drop":
            del self.tensors[name]
        elif change == "drop_module":
            for other in [n for n in self.tensors if n.startswith(f"{module}.")]:
                del self.tensors[other]
        elif change == "rename":
            del self.tensors[name]
            new_names = [
                name.replace("model.", "module."),
                name.replace("model.", "model.model."),
                f"{name}s",
                name.replace("weight_scale", "weight_scale_inv"),
                name.replace("input_scale", "act_scale"),
                name.replace("_proj.", "."),
                re.sub(r"experts\.\d+", "experts.77", name),
            ]
            self.tensors[self.pick([n for n in new_names if n != name])] = tensor
        elif change == "repeat":
            self.again[name] = self.pick([tensor.clone(), tensor + 1])
            if not torch.equal(self.again[name], tensor):
                self.flaw = "one name, two tensors"
        elif change == "columns":
            for scale in [n for n in self.tensors if n.endswith("weight_scale")]:
                self.tensors[scale] = self.tensors[scale].unsqueeze(-1)
        elif change == "zero_point":
            rows = tensor[..., 0] if name.endswith(".weight") else tensor
            zero_point = torch.zeros(rows.shape, dtype=torch.int8) + self.pick([0, 3])
            kind = self.pick(["weight_zero_point", "input_zero_point"])
            self.tensors[f"{module}.{kind}"] = zero_point
        else:
            self.tensors[name] = getattr(self, change)(tensor)
        return f"{change} {name}"

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        dtypes = [getattr(torch, d) for d in DTYPES.split()]
        return tensor.to(self.pick([d for d in dtypes if d != tensor.dtype]))

    def reshape(self, tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.flatten()
        forms = [flat, flat[0], flat[:, None], tensor[None], tensor[None, None]]
        return self.pick([f for f in forms if f.shape != tensor.shape])

    def transpose(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(-1, -2).contiguous()

    def grow(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor])

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        axis = self.random.randrange(tensor.dim())
        return tensor.narrow(axis, 0, tensor.size(axis) // 2)

    def negate(self, tensor: torch.Tensor) -> torch.Tensor:
        return -tensor

    def poison(self, scale: torch.Tensor) -> torch.Tensor:
        bad = scale.flatten().clone()
        index = self.random.randrange(bad.numel())
        bad[index] = self.pick([*BAD_SCALES, -bad[index].item()])
        return bad.reshape(scale.shape)

    def add_unasked(self) -> str:
        """Add what nobody asked for: a rotation, a scale or weight of no layer."""
        module = self.pick_int8()
        eye = torch.eye(self.tensors[f"{module}.weight"].size(-1))
        other = f"{module.rpartition('.')[0]}.other_proj"
        name, tensor = self.pick(
            [
                (f"{module}.input_rotation", eye),
                (f"{module}.weight_quantizer_scale", torch.ones(4)),
                (f"{module}.smooth_scale", torch.ones(len(eye))),
                (f"{other}.weight_scale", torch.ones(4)),
                (f"{other}.weight", eye.to(torch.int8)),
            ]
        )
        self.tensors[name] = tensor
        self.flaw = f"nothing takes {name}"
        return f"unasked {name}"

    def change_key(self) -> str:
        if self.random.random() < 0.05:
            self.config.clear()
            return "no config"
        node, path = self.config, [self.pick(sorted(self.config))]
        while isinstance(node[path[-1]], dict) and node[path[-1]]:
            if self.random.random() < 0.15:
                break
            node = node[path[-1]]
            path.append(self.pick(sorted(node)))
        key, change = path[-1], self.pick(["missing", "null", "other"])
        if change == "missing":
            del node[key]
        else:
            values = VALUES.get(key, [{}, [], 1, "x"])
            node[key] = None if change == "null" else self.pick(values)
        return f"config {'.'.join(path)} {change} {node.get(key)!r}"

    def change_scheme(self) -> str:
        part, change = self.pick(SCHEMES)
        scheme = copy.deepcopy(self.config["global_quant_config"])
        scheme[part].update(change)
        if self.random.random() < 0.2:
            self.config["global_quant_config"] = scheme
            return f"global_quant_config {part} {change}"
        name, value = self.pick(self.names()), self.pick([scheme, None, 3])
        self.config["layer_quant_config"] = {name: value}
        description = f"{part} {change}" if value is scheme else value
        return f"layer_quant_config {name}: {description}"

    def names(self) -> list[str]:
        """Names and patterns, most of which mean one INT8 layer or what is near."""
        module = self.pick_int8()
        block, _, tail = re.sub(r"\.experts\.\d+", "", module).rpartition(".")
        layer = f"{block}.{FUSED.get(tail, tail)}"
        names = [module, re.sub(r"\d", "?", module)]
        if block.endswith(".moe"):
            layer = f"{block}.experts"
            names.append(f"{layer}.0.{tail}")
        names.append(layer)
        names += [n.removeprefix("model.") for n in names]
        names += [f"*{tail}", f"*.{tail}", "*", "re:.*", f"re:.*{tail}$", "*experts*"]
        names += [f"*.{layer.rpartition('.')[2]}", "nothing", "re:(", "[", ""]
        return names

    def change_exclude(self) -> str:
        entries = self.config["exclude"]
        changes = ["only", "more"] * 3 + ["null"]
        if len(entries) > 1:
            changes += ["forget", "glob", "bare", "vllm"]
        change = self.pick(changes)
        if change in ("only", "more"):
            new = self.random.sample(self.names(), self.pick([1, 1, 2]))
            entries[:] = new if change == "only" else [*entries, *new]
            if self.pick([True, False]):
                change += " float"
                self.dequantize_excluded(keep_scales=self.pick([True, False]))
            return f"exclude {change} {new}"
        if change == "forget":
            entry = self.pick(entries)
            entries.remove(entry)
            change += f" {entry}"
        elif change == "glob":
            part = self.pick(entries).split(".")[-2:][0]
            entries[:] = [e for e in entries if f".{part}." not in f".{e}."]
            entries.append(f"*{part}*")
            change += f" {part}"
        elif change == "bare":
            entries[:] = [e.removeprefix("model.") for e in entries]
        elif change == "vllm":
            old, new = ".share_expert.", ".moe.share_expert."
            entries[:] = [e.replace(old, new) for e in entries]
        else:
            self.config["exclude"] = None
        return f"exclude {change}"

    def dequantize_excluded(self, keep_scales: bool) -> None:
        """Make the weights that `exclude` lists what an export would have left."""
        from .checkpoints import MalformedError, activation_of  # they import vLLM

        for name in [n for n in self.tensors if n.endswith(".weight_scale")]:
            module = name.removesuffix(".weight_scale")
            try:
                if activation_of(self.config, module) is not None:
                    continue
            except MalformedError:
                continue
            weight, scale = self.tensors[f"{module}.weight"], self.tensors[name]
            scale = scale.reshape(*scale.shape, *[1] * (weight.dim() - scale.dim()))
            self.tensors[f"{module}.weight"] = (weight * scale).bfloat16()
            if not keep_scales:
                del self.tensors[name]


def is_int8(config: dict[str, Any]) -> bool:
    """Whether a mutant still has INT8 layers: what others are is stock's business."""
    groups = [config.get(f"layer_{k}quant_config") or {} for k in ("", "type_")]
    schemes = [s for g in groups if isinstance(g, dict) for s in g.values()]
    weights = [
        s.get("weight")
        for s in (config.get("global_quant_config"), *schemes)
        if isinstance(s, dict)
    ]
    return any(isinstance(w, dict) and w.get("dtype") == "int8" for w in weights)


def judge_error(kind: str, message: str, file: str, names: Iterable[str]) -> str:
    """What an error is: "bare", of our files and no ValueError; "refused", as it
    names the config or one of `names`; else "unnamed"."""
    if OURS.search(file) and kind != "ValueError":
        return "bare"
    subjects = ["quantization_config", "layer_quant_config", "layer_type_quant_config"]
    subjects += ["regular expression", "The export key", *names]
    return "refused" if any(n in message for n in subjects) else "unnamed"
