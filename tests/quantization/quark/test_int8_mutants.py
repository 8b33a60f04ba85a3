# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Broken INT8 checkpoints: each computes what its numbers say, or is refused.

Mutants of good one-layer checkpoints go through QuarkConfig, the loaders and the
kernels; a float64 reading of the same mutant, which shares nothing with vLLM,
says what is right. Run as a module, it prints the table for the vLLM it finds:

    python -m tests.quantization.quark.test_int8_mutants 2000
"""

import collections
import copy
import dataclasses
import os
import random
import sys
import traceback
from typing import Any

import pytest
import regex as re
import torch

from vllm.platforms import current_platform

from . import checkpoints as ck
from .utils import vllm_environment

COUNT = int(os.environ.get("VLLM_QUARK_MUTANTS", "2000"))
OURS = re.compile(r"/quark/int8/\w+\.py$|/fused_moe/cpu_int8_\w+\.py$")


class Mutator:
    """Changes one checkpoint in place; says what it did."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        # Tensors that come a second time, after all others.
        self.again: list[tuple[str, torch.Tensor]] = []
        # A tensor that no parameter takes, and that changes what the layer says.
        self.unasked: str | None = None

    def mutate(self, c: ck.Checkpoint) -> str:
        kinds = [self.tensor] * 6 + [self.key] * 3 + [self.exclude, self.layer_config]
        kinds += [self.nobodys]
        return self.random.choice(kinds)(c)

    def tensor(self, c: ck.Checkpoint) -> str:
        pick = self.random.choice
        name = pick(sorted(c.tensors))
        module, _, kind = name.rpartition(".")
        tensor = c.tensors[name]
        how = pick(
            [
                "drop",
                "rename",
                "duplicate",
                "transpose",
                "dtype",
                "shape",
                "grow",
                "cut",
                "poison",
                "zero_point",
                "module",
                "negate",
            ]
        )
        if how == "drop":
            del c.tensors[name]
        elif how == "module":
            for other in [n for n in c.tensors if n.startswith(f"{module}.")]:
                del c.tensors[other]
        elif how == "rename":
            new = pick(
                [
                    name.replace("model.", "module."),
                    f"{name}s",
                    name.replace("weight_scale", "weight_scale_inv"),
                    name.replace("_proj.", "."),
                    name.replace("experts.0", "experts.77"),
                    name.replace("input_scale", "act_scale"),
                ]
            )
            c.tensors[new] = c.tensors.pop(name)
        elif how == "duplicate":
            other = pick([tensor.clone(), tensor + 1])
            self.again.append((name, other))
        elif how == "transpose":
            if tensor.dim() > 1:
                c.tensors[name] = tensor.transpose(-1, -2).contiguous()
        elif how == "dtype":
            types = [
                "int8",
                "uint8",
                "int32",
                "float16",
                "bfloat16",
                "float32",
                "float64",
                "bool",
            ]
            c.tensors[name] = tensor.to(getattr(torch, pick(types)))
        elif how == "shape":
            if kind == "weight" or tensor.dim() > 1:
                c.tensors[name] = pick([tensor.flatten(), tensor.unsqueeze(0)])
            else:
                forms = [
                    tensor.reshape(-1, 1),
                    tensor.reshape(1, -1),
                    tensor[None, None],
                ]
                c.tensors[name] = pick([*forms, tensor.flatten()[0]])
        elif how == "grow":
            c.tensors[name] = torch.cat([tensor, tensor]) if tensor.dim() else tensor
        elif how == "cut":
            if tensor.dim():
                axis = self.random.randrange(tensor.dim())
                c.tensors[name] = tensor.narrow(axis, 0, tensor.size(axis) // 2)
        elif how == "negate":
            c.tensors[name] = -tensor
        elif how == "zero_point":
            zero = torch.zeros_like(tensor.flatten(), dtype=torch.int8)
            zero = zero.reshape(tensor.shape)[..., 0] if kind == "weight" else zero
            if pick([True, False]):
                zero = zero + 3
            zero_name = pick(["weight_zero_point", "input_zero_point"])
            c.tensors[f"{module}.{zero_name}"] = zero
        elif tensor.is_floating_point():
            bad = tensor.clone().flatten()
            values = [
                float("nan"),
                float("inf"),
                -float("inf"),
                -0.01,
                0.0,
                1e30,
                1e-30,
            ]
            bad[self.random.randrange(bad.numel())] = pick(values)
            c.tensors[name] = bad.reshape(tensor.shape)
        return f"{how} {name}"

    def nobodys(self, c: ck.Checkpoint) -> str:
        """Tensors that nobody asked for: a rotation, a scale or weight of no layer."""
        weights = [n for n in sorted(c.tensors) if n.endswith(".weight")]
        module = self.random.choice(weights).removesuffix(".weight")
        other = f"{module.rpartition('.')[0]}.other_proj"
        eye = torch.eye(ck.K)
        name, tensor = self.random.choice(
            [
                (f"{module}.input_rotation", eye),
                (f"{module}.weight_quantizer_scale", torch.ones(4)),
                (f"{module}.smooth_scale", torch.ones(ck.K)),
                (f"{other}.weight_scale", torch.ones(4)),
                (f"{other}.weight", eye.to(torch.int8)),
            ]
        )
        c.tensors[name] = tensor
        self.unasked = name
        return f"unasked {name}"

    def key(self, c: ck.Checkpoint) -> str:
        where: Any = c.config
        path = []
        while True:
            key = self.random.choice(sorted(where))
            path.append(key)
            if not isinstance(where[key], dict) or not where[key]:
                break
            if self.random.random() < 0.15:
                break
            where = where[key]
        if key == "quant_method":  # vLLM's own choice of the method; not ours
            key = "exclude"
        how = self.random.choice(["missing", "null", "other"])
        if how == "missing":
            where.pop(key, None)
        elif how == "null":
            where[key] = None
        else:
            options = {
                "dtype": ["int4", "fp8_e4m3", "uint8", "int8", 8],
                "qscheme": ["per_group", "per_tensor", "per_channel", "x"],
                "ch_axis": [1, -1, 0, "0"],
                "symmetric": [False, True, "yes"],
                "is_dynamic": [True, False, "no"],
                "exclude": [{}, "lm_head", [3]],
            }
            where[key] = self.random.choice(options.get(key, [{}, [], 1, "x"]))
        return f"config {'.'.join(path)} {how} {where.get(key)!r}"

    def names(self, c: ck.Checkpoint) -> list[str]:
        module = self.random.choice(sorted(c.modules))
        stacked = module.replace("experts.0.", "")
        own = [module, stacked, c.prefix, module.replace("0", "?")]
        own += [n.removeprefix("model.") for n in own]
        tail = module.rpartition(".")[2]
        own += [f"*{tail}", f"*.{tail}", "*", "re:.*", f"re:.*{tail}$", "*experts*"]
        own += [f"*.{c.prefix.rpartition('.')[2]}", "nothing", "re:(", "[", ""]
        return own

    def exclude(self, c: ck.Checkpoint) -> str:
        names = self.names(c)
        c.config["exclude"] = self.random.sample(names, self.random.choice([1, 1, 2]))
        how = "int8"
        if self.random.random() < 0.5:  # and the tensors that go with it
            how = "float"
            for name in [n for n in c.tensors if n.endswith(".weight")]:
                module = name.removesuffix(".weight")
                try:
                    if ck.activation_of(c.config, module) is None:
                        c.tensors[name] = c.tensors[name].to(c.case.dtype) / 100
                except ck.MalformedError:
                    pass
        return f"exclude {c.config['exclude']} {how}"

    def layer_config(self, c: ck.Checkpoint) -> str:
        other = copy.deepcopy(c.config["global_quant_config"])
        path = self.random.choice(
            [("weight", "qscheme", "per_tensor"), ("input_tensors", "symmetric", False)]
            + [("input_tensors", "is_dynamic", True), ("weight", "observer_cls", "X")]
        )
        other[path[0]][path[1]] = path[2]
        name = self.random.choice(self.names(c))
        c.config["layer_quant_config"] = {name: self.random.choice([other, None, 3])}
        if isinstance(c.config["layer_quant_config"][name], dict):
            return f"layer_quant_config {name}: {path}"
        return f"layer_quant_config {name}: {c.config['layer_quant_config'][name]}"


@dataclasses.dataclass
class Verdict:
    mutation: str
    outcome: str  # right, refused, not INT8, unnamed, bare, wrong
    detail: str


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


def judge(seed: int) -> Verdict:
    """Make, mutate and serve checkpoint number `seed`."""
    pick = random.Random(f"case {seed}").choice
    case = ck.Case(pick(ck.LINEAR + ck.EXPERTS), pick(ck.WEIGHTS), pick(ck.ACTIVATIONS))
    generator = torch.Generator().manual_seed(seed)
    x = ck.inputs_for(case, 9, generator)
    c = ck.make(case, x, generator)
    routes = ck.routing(9, generator)
    number = c.prefix.split(".")[2]
    mutator = Mutator(seed)
    mutation = f"{case}: {mutator.mutate(c)}"
    expected, why = [], None
    # Static and asymmetric schemes may be served per token.
    for reading in (None, "token_sym", "token_asym"):
        try:
            if any(not torch.equal(c.tensors.get(n, t), t) for n, t in mutator.again):
                raise ck.MalformedError("one name, two tensors")
            if mutator.unasked:
                raise ck.MalformedError(f"nothing takes {mutator.unasked}")
            expected.append(ck.reference(c, x, routes, reading))
        except ck.MalformedError as e:
            why = why or e
    if not is_int8(c.config):
        return Verdict(mutation, "not INT8", "")
    try:
        out = ck.serve(c, x, routes, mutator.again)
    except Exception as e:
        last = traceback.extract_tb(e.__traceback__)[-1]
        detail = f"{type(e).__name__}: {e}"
        if OURS.search(last.filename) and not isinstance(e, ValueError):
            return Verdict(
                mutation, "bare", f"{detail} at {last.filename}:{last.lineno}"
            )
        named = [f"layers.{number}.", "quantization_config", "layer_quant_config"]
        named += ["layer_type_quant_config", "regular expression", "The export key"]
        outcome = "refused" if any(n in str(e) for n in named) else "unnamed"
        return Verdict(mutation, outcome, detail)
    if not expected:
        return Verdict(mutation, "wrong", f"served, but {why}")
    error = min(ck.deviation(out, e) for e in expected)
    # Twice the matrix's bounds: with nine tokens one tie between two of 127 steps
    # can be 1 %.
    if error[0] <= 0.02 and error[1] <= 0.06:
        return Verdict(mutation, "right", "")
    return Verdict(
        mutation, "wrong", f"off by {error[0]:.3g}, worst token {error[1]:.3g}"
    )


def table(count: int) -> list[Verdict]:
    verdicts = [judge(seed) for seed in range(count)]
    totals = collections.Counter(v.outcome for v in verdicts)
    print(f"\n{count} mutants:", ", ".join(f"{v} {k}" for k, v in totals.most_common()))
    unnamed = collections.Counter(
        v.detail.split(":")[0] + ":" + v.detail.split(":")[-1][:60]
        for v in verdicts
        if v.outcome == "unnamed"
    )
    for detail, number in unnamed.most_common():
        print(f"  upstream's, without a name, {number}: {detail}")
    return verdicts


@pytest.mark.skipif(
    not current_platform.is_cpu(), reason="looks at loaders, which are CPU code"
)
def test_mutants():
    ck.needs_kernel("moe_stacked")
    with vllm_environment(), torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        verdicts = table(COUNT)
    silent = [v for v in verdicts if v.outcome in ("wrong", "bare")]
    assert not silent, silent[:5]
    outcomes = collections.Counter(v.outcome for v in verdicts)
    assert outcomes["right"] > COUNT / 10 and outcomes["refused"] > COUNT / 3


if __name__ == "__main__":
    with vllm_environment(), torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        for verdict in table(int(sys.argv[1]) if sys.argv[1:] else COUNT):
            if verdict.outcome in ("wrong", "bare") or "-v" in sys.argv:
                print(verdict)
