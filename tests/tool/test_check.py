# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""`vllm-quark check`: what is wrong with an INT8 checkpoint, one line each; what is right is not mentioned."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from trees import ROOT, cli, one_line
from typer.testing import CliRunner

from tests.quantization.quark import layer_config, quantization_config
from vllm_quark import checkpoint
from vllm_quark.checkpoint.entries import Entries
from vllm_quark.checkpoint.int8 import headers, names
from vllm_quark.cli import app

K, N, EXPERTS = 8, 6, 3
DTYPES = {"I8": "i1", "I32": "<i4", "F32": "<f4", "F64": "<f8", "F16": "<f2", "BF16": "<u2", "U8": "u1"}
AGAIN = "export it again with AMD Quark"
DYNAMIC = "set is_dynamic to true and qscheme to per_channel in the input_tensors"
ACTIVATIONS = ("token_sym", "tensor_dynamic", "static_sym", "static_asym")
Tensor = tuple[str, np.ndarray]


def f32(*values: float) -> Tensor:
    return "F32", np.array(values, np.float32)


def bf16(*shape: int) -> Tensor:
    return "BF16", np.full(shape, 0x3F80, np.uint16)


class Checkpoint:
    """Two decoder layers with attention, a router, experts and a shared expert, all INT8 but the router."""

    def __init__(self, activation: str = "token_sym", qscheme: str = "per_channel", stacked: bool = False) -> None:
        self.files: dict[str, dict[str, Tensor]] = {"model.safetensors": {}}
        self.quant = quantization_config(qscheme, activation, exclude=["lm_head", "*.mlp.gate"])
        self.config = {"architectures": ["AForCausalLM"], "quantization_config": self.quant}
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            self.tensors[name] = bf16(N, K)
        self.tensors["model.norm.weight"] = bf16(K)
        random = np.random.default_rng(0)

        def add(module: str, *experts: int, static: bool = activation.startswith("static")) -> None:
            shape = (K, N) if module.endswith("down_proj") else (N, K)
            rows = shape[:1] if qscheme == "per_channel" else ()
            self.tensors[f"{module}.weight"] = "I8", random.integers(1, 9, (*experts, *shape), np.int8)
            self.tensors[f"{module}.weight_scale"] = "F32", np.full((*experts, *rows), 0.01, np.float32)
            if static:
                self.tensors[f"{module}.input_scale"] = f32(0.02)
            if static and activation == "static_asym":
                self.tensors[f"{module}.input_zero_point"] = "I32", np.array([-3], np.int32)

        for layer in ("model.layers.0", "model.layers.1"):
            self.tensors[f"{layer}.input_layernorm.weight"] = bf16(K)
            self.tensors[f"{layer}.mlp.gate.weight"] = bf16(EXPERTS, K)
            for last in ("q_proj", "k_proj", "v_proj", "o_proj"):
                add(f"{layer}.self_attn.{last}")
            for last in ("gate_proj", "up_proj", "down_proj"):
                add(f"{layer}.mlp.shared_expert.{last}")
                if stacked:
                    add(f"{layer}.mlp.{last}", EXPERTS, static=False)
                else:
                    for expert in range(EXPERTS):
                        add(f"{layer}.mlp.experts.{expert}.{last}")

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.files["model.safetensors"]

    @property
    def inputs(self) -> dict:
        return self.quant["global_quant_config"]["input_tensors"]

    def write(self, folder: Path) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config))
        for name, tensors in self.files.items():
            save(folder / name, tensors)
        return folder

    def make_dynamic(self) -> None:
        self.inputs.update(is_dynamic=True, qscheme="per_channel")


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    header, data = {}, b""
    # Wide types first, as the library writes them.
    for name, (dtype, values) in sorted(tensors.items(), key=lambda t: (-np.dtype(DTYPES[t[1][0]]).itemsize, t[0])):
        start, data = len(data), data + values.astype(DTYPES[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def check(folder: Path | str, *words: str) -> tuple[int, list[str]]:
    """Exit code and lines of stdout."""
    result = CliRunner().invoke(app, ["check", str(folder), *words])
    return result.exit_code, result.stdout.splitlines()


def problem_lines(lines: list[str]) -> list[str]:
    """The lines after the summary that are no notes, without the last."""
    return [line for line in lines[1:-1] if not line.startswith(("  ", "note: "))]


def sound(folder: Path) -> list[str]:
    code, lines = check(folder)
    assert code == 0 and lines[-1] == "sound" and not problem_lines(lines), lines
    return lines


def problem(folder: Path, *parts: str, of: int = 1) -> str:
    """Assert exit 1 and `of` problems, a single one of which has all `parts`; its line."""
    code, lines = check(folder)
    assert code == 1 and lines[-1] == f"problems: {of}", lines
    finding = [line for line in problem_lines(lines) if all(part in line for part in parts)]
    assert len(finding) == 1, lines
    return finding[0]


@pytest.mark.parametrize("stacked", [False, True], ids=["experts", "stacked"])
@pytest.mark.parametrize("qscheme", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sound(tmp_path, activation, qscheme, stacked):
    lines = sound(Checkpoint(activation, qscheme, stacked).write(tmp_path / "ckpt"))
    weights = qscheme.replace("_", "-")
    modules = 2 * (7 + (3 if stacked else 3 * EXPERTS))
    assert lines[1].startswith(f"  {modules} modules: {weights} weights, ")
    assert lines[2] == "  3 modules in `exclude`"
    assert len(lines) == 4


@pytest.mark.parametrize("name", ["quark", "quark-all", "stacked", "stacked-all", "quark-mtp"])
def test_exports_of_amd_quark_are_sound(name):
    folder = ROOT / "build/ckpts" / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} is not there (make ckpts)")
    assert not [line for line in sound(folder) if line.startswith("note") or "nothing matches" in line]


def test_neither_torch_nor_vllm_is_imported(tmp_path):
    folder = Checkpoint("static_sym").write(tmp_path / "ckpt")
    code = (
        "import sys; from vllm_quark.cli import main; sys.argv = ['vllm-quark', 'check', sys.argv[1]]\n"
        "try: main()\n"
        "finally: assert not {'torch', 'vllm'} & sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and result.stdout.endswith("sound\n") and not result.stderr, result


def test_help_has_an_example():
    result = cli(ROOT, "check", "--help")
    assert result.returncode == 0 and "vllm-quark check ~/models/" in result.stdout and "0 sound" in result.stdout


@pytest.mark.parametrize("below", ["mlp", "mlp.experts"])
def test_entries_that_name_stacks(tmp_path, below):
    """As exporters that keep experts stacked write them, beside their layer or below it."""
    ckpt = Checkpoint(stacked=True)
    other = {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}, "input_tensors": None}
    ckpt.quant["layer_quant_config"] = {"*experts.1.*": copy.deepcopy(ckpt.quant["global_quant_config"])}
    for last in ("gate_proj", "up_proj", "down_proj"):
        weight = ckpt.tensors[f"model.layers.0.mlp.{last}.weight"][1]
        ckpt.tensors[f"model.layers.0.mlp.{last}.weight"] = bf16(*weight.shape)
        del ckpt.tensors[f"model.layers.0.mlp.{last}.weight_scale"]
        ckpt.quant["exclude"].append(f"model.layers.0.{below}.{last}")
    sound(ckpt.write(tmp_path / "ckpt"))
    ckpt.quant["layer_quant_config"] = {"model.layers.1.mlp.experts.2.up_proj": other}
    problem(
        ckpt.write(tmp_path / "ckpt"), "says of model.layers.1.mlp.experts.2.up_proj what it does not say of others"
    )


# What is wrong with values, and nothing else. The change, what the line says, and the way out.

SCALE = "model.layers.1.self_attn.o_proj.weight_scale"
EXPERT = "model.layers.1.mlp.experts.2.up_proj"


def scaled(index: int, value: float, dtype: str = "F32") -> Tensor:
    values = np.full(N, 1, np.float64)
    values[index] = value
    if dtype == "BF16":
        return dtype, (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return dtype, values


BAD_VALUES = {
    "nan": ("token_sym", SCALE, scaled(4, np.nan), "is nan at [4]: export it again with AMD Quark"),
    "nan of an expert": ("token", f"{EXPERT}.weight_scale", scaled(4, np.nan), "is nan at [4]"),
    "infinite": ("token_sym", SCALE, scaled(1, np.inf), "is inf at [1]"),
    "negative": ("token_sym", SCALE, scaled(0, -0.5), "is -0.5 at [0]"),
    "zero": ("token_sym", SCALE, scaled(5, 0), "is 0 at [5], but its weight is not"),
    "BF16 nan": ("token_sym", SCALE, scaled(2, np.nan, "BF16"), "is nan at [2]"),
    "BF16 negative": ("token_sym", SCALE, scaled(2, -0.5, "BF16"), "is -0.5 at [2]"),
    "F16 infinite": ("token_sym", SCALE, scaled(2, np.inf, "F16"), "is inf at [2]"),
    "F64 beyond float32": ("token_sym", SCALE, scaled(2, 1e300, "F64"), "is inf at [2]"),
    "several": ("token_sym", SCALE, f32(1, np.nan, -1, 1, np.inf, 1), "is nan at [1] (and 2 more of its values)"),
    "column": ("token_sym", SCALE, ("F32", np.array([[1], [1], [-1], [1], [1], [1]])), "is -1.0 at [2, 0]"),
    "one value": ("token_sym", SCALE, f32(0), "is 0, but its weight is not"),
    "weight zero point": (
        "token_sym",
        SCALE.replace("scale", "zero_point"),
        ("I32", np.array([0, 0, 7, 0, 9, 0])),
        "is 7 at [2] (and 1 more of its values): export it again with AMD Quark with symmetric=True",
    ),
    "float zero point": (
        "token_sym",
        SCALE.replace("scale", "zero_point"),
        f32(0, 0, 0, 0, 0, 0),
        "is F32 [6], but expected are 1 or 6 integers: export it again",
    ),
    "input scale nan": ("static_sym", "model.layers.0.self_attn.o_proj.input_scale", f32(np.nan), f"is nan: {DYNAMIC}"),
    "input scale zero": ("static_sym", "model.layers.0.self_attn.o_proj.input_scale", f32(0), f"is 0: {DYNAMIC}"),
    "input scales": (
        "static_sym",
        "model.layers.0.self_attn.o_proj.input_scale",
        f32(1, 2),
        f"is F32 [2], expected one float: {DYNAMIC}",
    ),
    "symmetric input zero point": (
        "static_sym",
        "model.layers.0.self_attn.o_proj.input_zero_point",
        ("I32", np.array([3])),
        f"is 3: {DYNAMIC}",
    ),
    "wide input zero point": (
        "static_asym",
        "model.layers.0.self_attn.o_proj.input_zero_point",
        ("I32", np.array([300])),
        f"is 300: {DYNAMIC}",
    ),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_values(tmp_path, case):
    activation, name, tensor, message = BAD_VALUES[case]
    ckpt = Checkpoint(activation)
    ckpt.tensors[name] = tensor
    folder = ckpt.write(tmp_path / "ckpt")
    assert problem(folder, message).startswith(f"{name} (model.safetensors) is ")
    if DYNAMIC in message:
        ckpt.make_dynamic()
        sound(ckpt.write(folder))


@pytest.mark.parametrize("shape", [(EXPERTS, N), (EXPERTS, N, 1)])
def test_values_of_stacked_experts(tmp_path, shape):
    ckpt = Checkpoint(stacked=True)
    name = "model.layers.0.mlp.up_proj"
    values = np.ones(shape, np.float32)
    values[1, 4] = 0
    ckpt.tensors[f"{name}.weight_scale"] = "F32", values
    problem(ckpt.write(tmp_path / "ckpt"), f"{name}.weight_scale", "is 0 at [1, 4], but its weight is not")
    ckpt.tensors[f"{name}.weight"][1][1, 4] = 0
    sound(ckpt.write(tmp_path / "ckpt"))


@pytest.mark.parametrize("value", [np.nan, 0])
def test_one_scale_an_expert(tmp_path, value):
    ckpt = Checkpoint(stacked=True, qscheme="per_tensor")
    ckpt.tensors["model.layers.0.mlp.up_proj.weight_scale"] = f32(1, 1, value)
    message = "is nan at [2]" if value else "is 0 at [2, 0], but its weight is not"
    problem(ckpt.write(tmp_path / "ckpt"), "mlp.up_proj.weight_scale", message)


def test_rows_of_zeros_may_have_a_scale_of_zero(tmp_path):
    ckpt = Checkpoint()
    ckpt.tensors[SCALE] = scaled(3, 0)
    ckpt.tensors[SCALE.replace("_scale", "")][1][3] = 0
    sound(ckpt.write(tmp_path / "ckpt"))


def test_values_that_vllm_does_not_read(tmp_path):
    """Static scales of experts, which are served per token, and of dynamic layers."""
    ckpt = Checkpoint("static_sym")
    ckpt.tensors["model.layers.0.mlp.experts.0.up_proj.input_scale"] = f32(np.nan)
    del ckpt.tensors["model.layers.1.mlp.experts.0.up_proj.input_scale"]
    sound(ckpt.write(tmp_path / "ckpt"))
    ckpt = Checkpoint()
    ckpt.tensors["model.layers.0.self_attn.q_proj.input_scale"] = f32(np.nan)
    sound(ckpt.write(tmp_path / "ckpt"))


@pytest.mark.parametrize("kind", ["input_scale", "input_zero_point"])
@pytest.mark.parametrize("fused", ["self_attn.{}_proj", "mlp.shared_expert.{}_proj"])
def test_static_inputs_of_a_fused_layer_differ(tmp_path, fused, kind):
    ckpt = Checkpoint("static_asym")
    first, other = ("q", "v") if "attn" in fused else ("gate", "up")
    name, tensor = f"model.layers.1.{fused.format(other)}.{kind}", ("I32", np.array([5]))
    ckpt.tensors[name] = f32(0.03) if kind == "input_scale" else tensor
    line = problem(ckpt.write(tmp_path / "ckpt"), name, "vLLM quantizes their input once", DYNAMIC)
    assert f"model.layers.1.{fused.format(first)}.{kind}" in line or "k_proj" in line
    assert ("0.02" in line and "0.03" in line) if kind == "input_scale" else ("-3" in line and "5" in line)
    ckpt.make_dynamic()
    sound(ckpt.write(tmp_path / "ckpt"))


@pytest.mark.parametrize("activation, kind", [("static_sym", "input_scale"), ("static_asym", "input_zero_point")])
def test_static_input_missing(tmp_path, activation, kind):
    ckpt = Checkpoint(activation)
    name = f"model.layers.1.self_attn.o_proj.{kind}"
    del ckpt.tensors[name]
    # What its layer lacks is seen in the headers, too.
    code, lines = check(ckpt.write(tmp_path / "ckpt"))
    assert code == 1 and any(line.startswith(name) and DYNAMIC in line for line in lines), lines
    for layer in (0, 1):
        ckpt.tensors.pop(f"model.layers.{layer}.self_attn.o_proj.{kind}", None)
    ckpt.make_dynamic()
    sound(ckpt.write(tmp_path / "ckpt"))


# What headers and config say.


def test_rows_where_the_config_says_one_value(tmp_path):
    ckpt = Checkpoint(qscheme="per_tensor")
    ckpt.tensors[SCALE] = scaled(0, 1)
    way_out = "set qscheme to per_channel and ch_axis to 0 in the weight part"
    problem(ckpt.write(tmp_path / "ckpt"), SCALE, "is F32 [6], but config.json says one value a matrix", way_out)
    ckpt.quant["global_quant_config"]["weight"].update(qscheme="per_channel", ch_axis=0)
    sound(ckpt.write(tmp_path / "ckpt"))


def test_one_part_with_rows_is_enough(tmp_path):
    ckpt = Checkpoint(qscheme="per_tensor")
    special = copy.deepcopy(ckpt.quant["global_quant_config"])
    special["weight"].update(qscheme="per_channel", ch_axis=0)
    ckpt.quant["layer_quant_config"]["*.k_proj"] = special
    for layer in (0, 1):
        for part in ("q_proj", "k_proj"):
            ckpt.tensors[f"model.layers.{layer}.self_attn.{part}.weight_scale"] = scaled(0, 1)
    lines = sound(ckpt.write(tmp_path / "ckpt"))
    assert lines[2].startswith("  2 modules: per-channel")


def test_scale_missing(tmp_path):
    ckpt = Checkpoint()
    scale = ckpt.tensors.pop(f"{EXPERT}.weight_scale")
    problem(ckpt.write(tmp_path / "ckpt"), f"{EXPERT}.weight (model.safetensors) is int8", f"no {EXPERT}.weight_scale")
    ckpt.tensors[f"{EXPERT}.weight_scale"] = scale
    sound(ckpt.write(tmp_path / "ckpt"))


def test_weight_missing(tmp_path):
    ckpt = Checkpoint()
    del ckpt.tensors[f"{EXPERT}.weight"]
    problem(ckpt.write(tmp_path / "ckpt"), f"{EXPERT}.weight_scale", f"has no {EXPERT}.weight", "incomplete")


def test_scale_of_another_shape(tmp_path):
    ckpt = Checkpoint()
    ckpt.tensors[SCALE] = f32(1, 1, 1)
    problem(ckpt.write(tmp_path / "ckpt"), SCALE, "is F32 [3], expected one value or one per row", AGAIN)


@pytest.mark.parametrize("kind", ["input_rotation", "weight_scale_2"])
def test_tensors_that_nobody_takes(tmp_path, kind):
    ckpt = Checkpoint()
    name = f"model.layers.0.self_attn.o_proj.{kind}"
    ckpt.tensors[name] = f32(*range(K))
    folder = ckpt.write(tmp_path / "ckpt")
    code, lines = check(folder)
    assert code == 1 and any(line.startswith(f"{name} (model.safetensors) lies beside") for line in lines), lines
    del ckpt.tensors[name]
    sound(ckpt.write(folder))


def test_scales_of_caches_are_nothing(tmp_path):
    ckpt = Checkpoint()
    for layer in (0, 1):
        for name in ("k_proj.output_scale", "v_proj.output_scale", "k_scale", "v_scale"):
            ckpt.tensors[f"model.layers.{layer}.self_attn.{name}"] = f32(0.1)
    lines = sound(ckpt.write(tmp_path / "ckpt"))
    assert len(lines) == 4


def test_outputs_that_stand_for_a_cache_are_nothing(tmp_path):
    ckpt = Checkpoint()
    of_cache = {**ckpt.quant["global_quant_config"], "output_tensors": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}}
    ckpt.quant["layer_quant_config"] = {name: of_cache for name in ("*k_proj", "*v_proj", "*q_proj")}
    ckpt.quant["export"]["kv_cache_group"] = ["*k_proj", "*v_proj"]
    sound(ckpt.write(tmp_path / "ckpt"))
    ckpt.quant["export"]["kv_cache_group"] = []
    problem(ckpt.write(tmp_path / "ckpt"), "output_tensors are quantized")


def test_int8_under_exclude(tmp_path):
    ckpt = Checkpoint()
    ckpt.quant["exclude"].append("model.layers.1.self_attn.o_proj")
    folder = ckpt.write(tmp_path / "ckpt")
    problem(folder, "layers.1.self_attn.o_proj.weight (model.safetensors) is int8, but", "`exclude`", "restore config")
    ckpt.quant["exclude"].pop()
    sound(ckpt.write(folder))


@pytest.mark.parametrize("entry", ["model.layers.0.mlp.experts", "*layers.0.mlp.experts.*.up_proj"])
def test_int8_stacks_under_exclude(tmp_path, entry):
    ckpt = Checkpoint(stacked=True)
    ckpt.quant["exclude"].append(entry)
    code, lines = check(ckpt.write(tmp_path / "ckpt"))
    assert code == 1 and not any("nothing matches" in line for line in lines)
    line = "model.layers.0.mlp.up_proj.weight (model.safetensors) is int8, but its layer is in `exclude`: restore"
    assert any(finding.startswith(line) for finding in lines), lines


def test_int8_where_the_config_says_something_else(tmp_path):
    ckpt = Checkpoint()
    ckpt.quant["layer_quant_config"]["*.o_proj"] = {"weight": {"dtype": "fp8_e4m3"}, "input_tensors": None}
    problem(ckpt.write(tmp_path / "ckpt"), "layers.0.self_attn.o_proj.weight", "quantizes it to fp8_e4m3", of=2)
    ckpt.quant["layer_quant_config"]["*.o_proj"] = {"weight": None, "input_tensors": None}
    problem(ckpt.write(tmp_path / "ckpt"), "layers.0.self_attn.o_proj.weight", "does not quantize it", of=2)


def test_floats_where_others_are_int8(tmp_path):
    ckpt = Checkpoint()
    name = "model.layers.1.self_attn.o_proj"
    del ckpt.tensors[f"{name}.weight_scale"]
    ckpt.tensors[f"{name}.weight"] = bf16(N, K)
    folder = ckpt.write(tmp_path / "ckpt")
    message = "is BF16, but config.json says int8, and other o_proj are: add its layer to `exclude`"
    problem(folder, f"{name}.weight (model.safetensors) {message}")
    ckpt.quant["exclude"].append(name)
    sound(ckpt.write(folder))


@pytest.mark.parametrize("stacked", [False, True])
def test_float_experts(tmp_path, stacked):
    ckpt = Checkpoint(stacked=stacked)
    experts = [n for n in ckpt.tensors if re.search(r"mlp\.(experts\.|\w+_proj)", n) and n.endswith("weight")]
    for name in experts:
        del ckpt.tensors[f"{name}_scale"]
        ckpt.tensors[name] = bf16(*(EXPERTS, 16, 16) if stacked else (16, 16))
    code, lines = check(ckpt.write(tmp_path / "ckpt"))
    assert code == 1 and lines[-1] == f"problems: {len(experts)}"
    ckpt.quant["exclude"].append("re:.*mlp.experts")
    sound(ckpt.write(tmp_path / "ckpt"))


def test_float_experts_without_modules(tmp_path):
    ckpt = Checkpoint(stacked=True)
    name = "model.layers.0.mlp2.experts.gate_up_proj"
    ckpt.tensors[name] = bf16(EXPERTS, 32, 16)
    folder = ckpt.write(tmp_path / "ckpt")
    problem(folder, f"{name} (model.safetensors) is BF16", "add its layer to `exclude`")
    ckpt.quant["exclude"].append("model.layers.0.mlp2.experts")
    assert not any("nothing matches" in line for line in sound(ckpt.write(folder)))


def test_floats_that_vllm_builds_unquantized_are_a_note(tmp_path):
    ckpt = Checkpoint()
    ckpt.quant["exclude"].clear()
    lines = sound(ckpt.write(tmp_path / "ckpt"))
    (note,) = [line for line in lines if line.startswith("note: ")]
    assert "nowhere INT8: BF16 gate (2)." in note and "embed" not in note and "lm_head" not in note


def test_parts_of_one_layer(tmp_path):
    ckpt = Checkpoint()
    name = "model.layers.1.self_attn.v_proj"
    del ckpt.tensors[f"{name}.weight_scale"]
    ckpt.tensors[f"{name}.weight"] = bf16(N, K)
    folder = ckpt.write(tmp_path / "ckpt")
    problem(folder, f"{name}.weight", "other parts of its layer are: export them again, all alike")
    # Listed, it is not what its layer is either.
    ckpt.quant["exclude"].append(name)
    line = problem(ckpt.write(folder), "vLLM runs them as one layer: export them again, all alike")
    assert line.startswith(f"{name} is in `exclude`, but model.layers.1.self_attn.")
    for part in ("q_proj", "k_proj"):
        module = name.replace("v_proj", part)
        del ckpt.tensors[f"{module}.weight_scale"]
        ckpt.tensors[f"{module}.weight"] = bf16(N, K)
    # By the name of vLLM's layer for all three.
    ckpt.quant["exclude"][-1] = "model.layers.1.self_attn.qkv_proj"
    lines = sound(ckpt.write(folder))
    assert "  6 modules in `exclude`" in lines and not any("nothing matches" in line for line in lines)


def test_floats_beside_excluded_parts(tmp_path):
    ckpt = Checkpoint()
    for name in [n for n in ckpt.tensors if ".self_attn." in n]:
        if name.endswith("scale"):
            del ckpt.tensors[name]
        else:
            ckpt.tensors[name] = bf16(N, K)
    ckpt.quant["exclude"] += ["*k_proj", "*v_proj", "*o_proj"]
    reason = "is BF16, but config.json says int8, and not of other parts of its layer: add its layer to `exclude`"
    problem(ckpt.write(tmp_path / "ckpt"), f"model.layers.1.self_attn.q_proj.weight (model.safetensors) {reason}", of=2)
    ckpt.quant["exclude"].append("*q_proj")
    sound(ckpt.write(tmp_path / "ckpt"))


def test_one_expert_that_is_not_like_the_others(tmp_path):
    ckpt = Checkpoint()
    ckpt.tensors[f"{EXPERT}.weight"] = bf16(N, K)
    del ckpt.tensors[f"{EXPERT}.weight_scale"]
    ckpt.quant["exclude"].append(EXPERT)
    problem(ckpt.write(tmp_path / "ckpt"), f"{EXPERT} is in `exclude`, but", "is INT8, and vLLM runs them as one layer")


@pytest.mark.parametrize("entry", ["model.layers.1.mlp.experts.1.up_proj", "*experts.1.*", "*experts.0.up_proj"])
def test_entries_of_one_expert_in_a_stack(tmp_path, entry):
    ckpt = Checkpoint(stacked=True)
    # INT8 experts are served alike.
    ckpt.quant["layer_quant_config"][entry] = layer_config(activation="static_sym")
    sound(ckpt.write(tmp_path / "ckpt"))
    ckpt.quant["layer_quant_config"][entry] = {"weight": {"dtype": "fp8_e4m3"}, "input_tensors": None}
    code, lines = check(ckpt.write(tmp_path / "ckpt"))
    assert code == 1 and any("holds all experts, but config.json says of" in line for line in lines), lines
    del ckpt.quant["layer_quant_config"][entry]
    sound(ckpt.write(tmp_path / "ckpt"))


def test_experts_that_are_not_there(tmp_path):
    ckpt = Checkpoint()
    for name in [n for n in ckpt.tensors if n.startswith(f"{EXPERT}.")]:
        del ckpt.tensors[name]
    message = "is not in the checkpoint, and those of other experts are: the checkpoint is incomplete"
    problem(ckpt.write(tmp_path / "ckpt"), f"{EXPERT}.weight {message}")
    for name in [n for n in ckpt.tensors if ".1.mlp.experts.1." in n]:
        del ckpt.tensors[name]
    problem(ckpt.write(tmp_path / "ckpt"), "model.layers.1.mlp.experts.1.gate_proj.weight is not in", of=4)


@pytest.mark.parametrize("key", ["num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts"])
@pytest.mark.parametrize("nested", [False, True])
def test_fewer_experts_than_the_config_says(tmp_path, key, nested):
    ckpt = Checkpoint()
    ckpt.config |= {"text_config": {key: EXPERTS + 1}} if nested else {key: EXPERTS + 1}
    missing = f"model.layers.0.mlp.experts.{EXPERTS}.up_proj.weight is not in the checkpoint"
    problem(ckpt.write(tmp_path / "ckpt"), missing, f"there are {EXPERTS + 1} experts ({key})", of=6)
    gone = [n for n in ckpt.tensors if n.startswith("model.layers.0.mlp.experts.1.")]
    kept = {n: ckpt.tensors.pop(n) for n in gone}
    missing = "model.layers.0.mlp.experts.1.up_proj.weight is not in the checkpoint, and those of other experts are"
    problem(ckpt.write(tmp_path / "ckpt"), missing, of=6)
    ckpt.tensors.update(kept)
    for count in (EXPERTS, [EXPERTS + 1] * 2, None):
        ckpt.config |= {"text_config": {key: count}} if nested else {key: count}
        sound(ckpt.write(tmp_path / "ckpt"))


def test_a_layer_that_is_not_there(tmp_path):
    """What vLLM says of headers: tests/quantization/quark/test_int8_checkpoint.py."""
    ckpt = Checkpoint()
    norms = {f"model.layers.{i}.input_layernorm.weight": bf16(K) for i in range(2, 6)}
    ckpt.tensors.update(norms)
    ckpt.config["num_hidden_layers"] = 7
    problem(
        ckpt.write(tmp_path / "ckpt"),
        "model.layers.6 is not in the checkpoint",
        "there are 7 layers (num_hidden_layers)",
    )
    ckpt.config["num_hidden_layers"] = 6
    sound(ckpt.write(tmp_path / "ckpt"))


def test_a_head_that_is_not_there(tmp_path):
    ckpt = Checkpoint()
    del ckpt.tensors["lm_head.weight"]
    sound(ckpt.write(tmp_path / "ckpt"))
    ckpt.config["tie_word_embeddings"] = False
    (note,) = (line for line in sound(ckpt.write(tmp_path / "ckpt")) if line.startswith("note: "))
    assert note.startswith("note: lm_head.weight is not in the checkpoint") and "pooling only" in note


def test_int8_experts_without_modules(tmp_path):
    ckpt = Checkpoint(stacked=True)
    name = "model.layers.0.mlp2.experts.gate_up_proj"
    ckpt.tensors[name] = "I8", np.ones((EXPERTS, 32, 16), np.int8)
    problem(ckpt.write(tmp_path / "ckpt"), f"{name} (model.safetensors) is int8, but has no scale beside it")
    ckpt.tensors[f"{name}_scale"] = f32(1)
    assert any(line.startswith(f"note: {name} is no module's weight") for line in sound(ckpt.write(tmp_path / "ckpt")))


def test_a_scale_that_was_left_in_exclude(tmp_path):
    ckpt = Checkpoint()
    for i in range(2):
        ckpt.tensors[f"model.layers.{i}.mlp.gate.weight_scale"] = f32(1)
    (note,) = (line for line in sound(ckpt.write(tmp_path / "ckpt")) if line.startswith("note: "))
    assert note.startswith("note: model.layers.0.mlp.gate.weight_scale (and 1 more) lies beside"), note


@pytest.mark.parametrize(
    "stacked, present, missing", [(True, "up", "down"), (True, "gate", "up"), (False, "gate", "up")]
)
def test_projections_that_are_not_there(tmp_path, stacked, present, missing):
    ckpt = Checkpoint(stacked=stacked)
    block = "mlp" if stacked else "mlp.shared_expert"
    for name in [n for n in ckpt.tensors if f".{block}.{missing}_proj." in n]:
        del ckpt.tensors[name]
    message = f"{block}.{missing}_proj.weight is not in the checkpoint, but {present}_proj is"
    code, lines = check(ckpt.write(tmp_path / "ckpt"))
    assert code == 1 and sum(message in line for line in lines) == 2, lines


def test_an_expert_of_another_shape(tmp_path):
    for name, shape in ((EXPERT, (2 * N, K)), (EXPERT.replace("up_proj", "down_proj"), (N, K))):
        ckpt = Checkpoint()
        ckpt.tensors[f"{name}.weight"] = "I8", np.ones(shape, np.int8)
        ckpt.tensors[f"{name}.weight_scale"] = f32(0.1)
        expected = [K, N] if "down" in name else [N, K]
        reason = f"is I8 {list(shape)}, expected {expected} by the others of its layer"
        problem(ckpt.write(tmp_path / "ckpt"), f"{name}.weight (model.safetensors) {reason}", AGAIN)


def test_a_stack_of_another_shape(tmp_path):
    ckpt = Checkpoint(stacked=True)
    ckpt.tensors["model.layers.0.mlp.down_proj.weight"] = "I8", np.ones((EXPERTS, N, K), np.int8)
    ckpt.tensors["model.layers.0.mlp.down_proj.weight_scale"] = "F32", np.ones((EXPERTS, N))
    expected = f"expected [{EXPERTS}, {K}, {N}] by the others of its layer"
    problem(ckpt.write(tmp_path / "ckpt"), "layers.0.mlp.down_proj.weight", f"is I8 [{EXPERTS}, {N}, {K}]", expected)


@pytest.mark.parametrize("part, shape", [("mlp.shared_expert.up_proj", (2, K)), ("self_attn.v_proj", (N, 2))])
def test_parts_of_other_shapes(tmp_path, part, shape):
    ckpt = Checkpoint()
    ckpt.tensors[f"model.layers.0.{part}.weight"] = "I8", np.ones(shape, np.int8)
    ckpt.tensors[f"model.layers.0.{part}.weight_scale"] = f32(0.1)
    problem(ckpt.write(tmp_path / "ckpt"), f"{part}.weight", f"is I8 {list(shape)}, but", "as one layer", AGAIN)
    # Fewer key and value heads than query heads are as usual.
    ckpt = Checkpoint()
    for last in ("k_proj", "v_proj"):
        for layer in (0, 1):
            ckpt.tensors[f"model.layers.{layer}.self_attn.{last}.weight"] = "I8", np.ones((2, K), np.int8)
            ckpt.tensors[f"model.layers.{layer}.self_attn.{last}.weight_scale"] = f32(0.1, 0.1)
    sound(ckpt.write(tmp_path / "ckpt"))


def test_excluded_experts_by_their_layers_name(tmp_path):
    ckpt = Checkpoint()
    for name in [n for n in ckpt.tensors if ".experts." in n]:
        if name.endswith("scale"):
            del ckpt.tensors[name]
        else:
            ckpt.tensors[name] = bf16(*ckpt.tensors[name][1].shape)
    ckpt.quant["exclude"] += ["layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    lines = sound(ckpt.write(tmp_path / "ckpt"))
    assert f"  {3 + 2 * 3 * EXPERTS} modules in `exclude`" in lines and len(lines) == 4


@pytest.mark.parametrize("entry", ["re:.*mlp.gate", "*.mlp.gate*", "re:.*gate$"])
def test_a_routers_pattern_is_no_gates(tmp_path, entry):
    """Of a stack's name `mlp.gate_proj`, which this checkpoint does not have."""
    ckpt = Checkpoint()
    ckpt.quant["exclude"] = ["lm_head", entry]
    assert "  3 modules in `exclude`" in sound(ckpt.write(tmp_path / "ckpt"))


def test_zero_points_of_one_value(tmp_path):
    ckpt = Checkpoint(qscheme="per_tensor")
    name = "model.layers.1.self_attn.o_proj.weight_zero_point"
    ckpt.tensors[name] = "I8", np.zeros(N, np.int8)
    problem(ckpt.write(tmp_path / "ckpt"), name, "is I8 [6], but expected are 1 integers", AGAIN)
    ckpt.tensors[name] = "I8", np.zeros(1, np.int8)
    sound(ckpt.write(tmp_path / "ckpt"))


def test_schemes_that_no_kernel_runs(tmp_path):
    ckpt = Checkpoint()
    special = copy.deepcopy(ckpt.quant["global_quant_config"])
    special["weight"]["symmetric"] = False
    ckpt.quant["layer_quant_config"]["*.o_proj"] = special
    line = problem(ckpt.write(tmp_path / "ckpt"), "INT8 weights with symmetric=False", f"{AGAIN} with symmetric=True")
    assert line.startswith("model.layers.0.self_attn.o_proj has a scheme that no kernel runs, and so have 1 more (")
    assert "model.layers.1.self_attn.o_proj" in line
    special["weight"] = None
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        ckpt.tensors[name] = bf16(N, K)
        del ckpt.tensors[f"{name}_scale"]
    problem(ckpt.write(tmp_path / "ckpt"), "its input is quantized, its weight is not")


def test_an_int8_head(tmp_path):
    ckpt = Checkpoint()
    ckpt.quant["exclude"].remove("lm_head")
    ckpt.tensors["lm_head.weight"] = "I8", np.ones((N, K), np.int8)
    ckpt.tensors["lm_head.weight_scale"] = scaled(0, 1)
    folder = ckpt.write(tmp_path / "ckpt")
    problem(folder, "lm_head.weight (model.safetensors) is int8", "add it to `exclude` and export it unquantized")
    sound(Checkpoint().write(folder))


def test_another_dtype(tmp_path):
    ckpt = Checkpoint()
    ckpt.tensors["model.layers.1.self_attn.o_proj.weight"] = "U8", np.ones((N, K), np.uint8)
    code, lines = check(ckpt.write(tmp_path / "ckpt"))
    assert code == 1 and any("o_proj.weight (model.safetensors) is U8, but config.json says int8" in x for x in lines)


def test_twice(tmp_path):
    ckpt = Checkpoint()
    ckpt.files["other.safetensors"] = {f"{EXPERT}.weight": ckpt.tensors[f"{EXPERT}.weight"]}
    folder = ckpt.write(tmp_path / "ckpt")
    line = problem(folder, "is in the checkpoint twice, in model.safetensors and other.safetensors")
    assert line.startswith(f"{EXPERT}.weight (other.safetensors)") and "keep the files of one export" in line
    (folder / "other.safetensors").unlink()
    sound(folder)


def test_what_matches_nothing(tmp_path):
    ckpt = Checkpoint(stacked=True)
    ckpt.quant["exclude"] += [
        "model.layers.9.mlp.gate",
        "re:.*nothing",
        "re:.*embed",
        "model.layers.0.mlp.shared_experts",
    ]
    ckpt.quant["layer_quant_config"] = {
        "*layers.7.*": ckpt.quant["global_quant_config"],
        # Names of layers that vLLM makes, and of what a stacked tensor holds.
        "model.layers.1.mlp.experts": ckpt.quant["global_quant_config"],
        "layers.1.self_attn.qkv_proj": ckpt.quant["global_quant_config"],
        "model.layers.1.mlp.experts.2.up_proj": ckpt.quant["global_quant_config"],
        "*.experts.2.down_proj": ckpt.quant["global_quant_config"],
    }
    unmatched = ["model.layers.9.mlp.gate", "re:.*nothing", "model.layers.0.mlp.shared_experts", "*layers.7.*"]
    folder = ckpt.write(tmp_path / "ckpt")
    assert f"  nothing matches 4 of `exclude` and `layer_quant_config`: {', '.join(unmatched)}" in sound(folder)
    code, lines = check(folder, "--json")
    assert code == 0 and json.loads("".join(lines))["unmatched"] == unmatched


def test_a_tied_head_may_be_listed(tmp_path):
    ckpt = Checkpoint()
    ckpt.config["tie_word_embeddings"] = True
    del ckpt.tensors["lm_head.weight"]
    assert len(sound(ckpt.write(tmp_path / "ckpt"))) == 4


def test_language_models_inside_others(tmp_path):
    """transformers calls modules model.language_model.… in memory and language_model.model.… in files, or both."""
    for prefix, other_prefix in (
        ("model.language_model", "language_model.model"),
        ("language_model.model", "model.language_model"),
    ):
        ckpt = Checkpoint()
        ckpt.files["model.safetensors"] = {n.replace("model.", f"{prefix}.", 1): t for n, t in ckpt.tensors.items()}
        ckpt.quant["exclude"] = ["lm_head", *(f"{other_prefix}.layers.{i}.mlp.gate" for i in (0, 1))]
        assert "  3 modules in `exclude`" in sound(ckpt.write(tmp_path / "ckpt"))
        assert len(sound(tmp_path / "ckpt")) == 4


def test_configs_of_a_text_model(tmp_path):
    ckpt = Checkpoint()
    ckpt.config = {"text_config": {"quantization_config": ckpt.quant}}
    sound(ckpt.write(tmp_path / "ckpt"))


# Files and configs that are none.


def test_files_cut_short(tmp_path):
    ckpt = Checkpoint()
    ckpt.files["other.safetensors"] = {"model.extra.weight": bf16(K)}
    folder = ckpt.write(tmp_path / "ckpt")
    contents = {name: (folder / name).read_bytes() for name in ckpt.files}
    (folder / "model.safetensors").write_bytes(contents["model.safetensors"][:-1])
    (folder / "other.safetensors").write_bytes(b"PK")
    problem(folder, "model.safetensors is no whole safetensors file (it is cut short)", "copy or export it again", of=2)
    problem(folder, "other.safetensors is no whole safetensors file (no header)", of=2)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    sound(folder)


HEADERS = {
    "larger than its place": {"shape": [2, N]},
    "smaller than its place": {"shape": [1]},
    "another dtype": {"dtype": "F64"},
    "in another's place": {"data_offsets": [0, 4 * N]},
    "beyond its file": {"data_offsets": [1 << 40, (1 << 40) + 4 * N]},
    "before its file": {"data_offsets": [-4 * N, 0]},
    "no offsets": {"data_offsets": []},
    "no shape": {"shape": None},
    "a shape of words": {"shape": ["6"]},
    "a negative shape": {"shape": [-6, -1]},
    "no dtype": {"dtype": 3},
}


@pytest.mark.parametrize("case", [*HEADERS, "nested", "a list", "longer than its tensors"])
def test_headers_that_are_not_their_files(tmp_path, case):
    folder = Checkpoint().write(tmp_path / "ckpt")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    if case in HEADERS:
        header[SCALE] |= HEADERS[case]
    text = {"nested": b"[" * 100_000, "a list": b"[1]"}.get(case, json.dumps(header).encode())
    tail = b"more" if case == "longer than its tensors" else b""
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:] + tail)
    code, lines = check(folder)
    assert code == 1 and lines[-1] == "problems: 1" and lines[1].startswith("model.safetensors "), lines
    assert lines[1].endswith("copy or export it again")
    with pytest.raises(Exception):  # noqa: B017
        safe_open(path, "numpy")
    path.write_bytes(data)
    sound(folder)


def test_broken_index(tmp_path):
    folder = Checkpoint().write(tmp_path / "ckpt")
    index = folder / "model.safetensors.index.json"
    index.write_text("{")
    one_line(cli(ROOT, "check", folder), str(index), "is no index", "copy or export it again")
    (finding,) = json.loads("".join(check(folder, "--json")[1]))["problems"]
    assert finding["file"] == str(index) and finding["way_out"].startswith("the checkpoint is incomplete"), finding
    index.write_text("[" * 100_000)
    one_line(cli(ROOT, "check", folder), str(index), "is no index", "copy or export it again")
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    one_line(cli(ROOT, "check", folder), f"{folder}/model-2.safetensors", "is missing", "copy or export it again")
    save(folder / "model-2.safetensors", {"model.b": f32(1)})
    # Files that the index does not name are not loaded.
    (folder / "stray.safetensors").write_text("")
    sound(folder)


def test_sharded_states(tmp_path):
    folder = Checkpoint().write(tmp_path / "ckpt")
    (folder / "model.safetensors").rename(folder / "model-rank-0-part-0.safetensors")
    one_line(
        cli(ROOT, "check", folder), "model-rank-0-part-0.safetensors", "load the checkpoint that it was saved from"
    )


NO_CHECKPOINT: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ("config.json: does not exist", "name the folder of")),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), ("config.json: is no JSON", "restore it")),
    "config is not text": (
        lambda f: (f / "config.json").write_bytes(b"\xff"),
        ("config.json: is no JSON", "restore it"),
    ),
    "config is nested": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        ("config.json: is no JSON", "restore"),
    ),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ("config.json: is no JSON object", "restore")),
    "config is a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        ("config.json: cannot be read (Is a directory)", "mend that"),
    ),
    "no files": (lambda f: (f / "model.safetensors").unlink(), ("has no safetensors files", "download or export")),
    "no tensors": (lambda f: save(f / "model.safetensors", {}), ("has no tensors", "copy or export it again")),
    "no folder": (shutil.rmtree, ("ckpt: does not exist", "name the folder of a checkpoint")),
}


@pytest.mark.parametrize("case", NO_CHECKPOINT)
def test_not_a_checkpoint(tmp_path, case):
    folder = Checkpoint().write(tmp_path / "ckpt")
    change, parts = NO_CHECKPOINT[case]
    change(folder)
    line = one_line(cli(ROOT, "check", folder), str(folder), *parts)
    result = cli(ROOT, "check", folder, "--json")
    data = json.loads(result.stdout)
    assert result.returncode == 2 and result.stderr.strip() == line and data["sound"] is False
    (finding,) = data["problems"]
    assert line == f"vllm-quark: {finding['file']}: {finding['reason']}: {finding['way_out']}"


def test_a_file_instead_of_its_folder(tmp_path):
    folder = Checkpoint().write(tmp_path / "ckpt")
    one_line(cli(ROOT, "check", folder / "model.safetensors"), "is a file", f"name its folder, {folder}")


OTHERS: dict[str, tuple[Callable[[Checkpoint], object], str]] = {
    "compressed-tensors": (
        lambda c: c.quant.update(quant_method="compressed-tensors"),
        "'compressed-tensors', not 'quark'",
    ),
    "a number": (lambda c: c.quant.update(quant_method=3), "quant_method is 3"),
    "a list": (lambda c: c.config.update(quantization_config=[]), "its quantization_config is no JSON object"),
    "floats": (
        lambda c: (
            c.config.pop("quantization_config"),
            c.files.update({"model.safetensors": {"a.weight": bf16(2, 2)}}),
        ),
        "has no quantization_config, and no weight is int8",
    ),
    "INT8 without scales": (
        lambda c: (
            c.config.pop("quantization_config"),
            c.files.update({"model.safetensors": {"a.weight": ("I8", np.ones((2, 2)))}}),
        ),
        "has no quantization_config, and no weight is int8",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_not_an_int8_checkpoint_of_quark(tmp_path, case):
    ckpt = Checkpoint()
    change, message = OTHERS[case]
    change(ckpt)
    one_line(cli(ROOT, "check", ckpt.write(tmp_path / "ckpt")), "ckpt/config.json", message)


def test_int8_files_whose_config_does_not_say_so(tmp_path):
    ckpt = Checkpoint()
    folder = ckpt.write(tmp_path / "ckpt")
    del ckpt.quant["quant_method"]
    line = problem(ckpt.write(folder), "config.json has no quant_method")
    assert 'add "quant_method": "quark"' in line
    ckpt.quant["quant_method"] = "quark"
    sound(ckpt.write(folder))
    special, ckpt.quant["global_quant_config"] = ckpt.quant["global_quant_config"], None
    problem(
        ckpt.write(folder), "config.json quantizes no layer to INT8, but 32 weights are int8", "restore config.json"
    )
    ckpt.quant["global_quant_config"] = special
    del ckpt.config["quantization_config"]
    line = problem(
        ckpt.write(folder), "config.json has no quantization_config, but 32 weights are int8, model.layers.0."
    )
    assert line.endswith("restore config.json from the export")
    ckpt.config["quantization_config"] = ckpt.quant
    sound(ckpt.write(folder))


def test_quark_without_int8(tmp_path):
    ckpt = Checkpoint()
    ckpt.quant["global_quant_config"] = {"weight": {"dtype": "fp8_e4m3"}, "input_tensors": {"dtype": "fp8_e4m3"}}
    ckpt.files["model.safetensors"] = {"model.layers.0.mlp.up_proj.weight": ("U8", np.ones((2, 2)))}
    lines = sound(ckpt.write(tmp_path / "ckpt"))
    assert lines[1] == "note: no layer is INT8: nothing was judged but that the files are whole"


BROKEN_CONFIGS = {
    "exclude": (3, "exclude of this Quark INT8 checkpoint is 3, expected list"),
    "layer_quant_config": ([], "layer_quant_config of this Quark INT8 checkpoint is []"),
    "layer_type_quant_config": ({"<class 'torch.nn.Embedding'>": None}, "cannot be served", "export without"),
    "export": (None, "export of this Quark INT8 checkpoint is missing"),
}


@pytest.mark.parametrize("key", BROKEN_CONFIGS)
def test_broken_quantization_config(tmp_path, key):
    ckpt = Checkpoint()
    value, *parts = BROKEN_CONFIGS[key]
    ckpt.quant[key] = value
    problem(ckpt.write(tmp_path / "ckpt"), "config.json is wrong, ", *parts)


def test_broken_pattern(tmp_path):
    ckpt = Checkpoint()
    ckpt.quant["exclude"].append("re:(")
    code, lines = check(ckpt.write(tmp_path / "ckpt"))
    assert code == 1 and "config.json is wrong" in lines[1] and "re:(" in lines[1]


# How it is said.


def test_json(tmp_path):
    ckpt = Checkpoint()
    ckpt.tensors[SCALE] = scaled(4, np.nan)
    result = cli(ROOT, "check", ckpt.write(tmp_path / "ckpt"), "--json")
    assert result.returncode == 1 and not result.stderr
    data = json.loads(result.stdout)
    assert {k: data[k] for k in ("checkpoint", "sound", "excluded", "unmatched", "notes")} == {
        "checkpoint": str(tmp_path / "ckpt"),
        "sound": False,
        "excluded": 3,
        "unmatched": [],
        "notes": [],
    }
    assert data["schemes"] == {"per-channel weights, dynamic per-token symmetric activations": 32}
    assert data["problems"] == [
        {
            "layer": "model.layers.1.self_attn.o_proj",
            "tensor": SCALE,
            "file": "model.safetensors",
            "reason": "is nan at [4]",
            "way_out": AGAIN,
        }
    ]


def test_many_problems_of_a_kind(tmp_path):
    ckpt = Checkpoint()
    for name in [n for n in ckpt.tensors if n.endswith("scale")][:20]:
        ckpt.tensors[name] = scaled(0, np.nan)
    folder = ckpt.write(tmp_path / "ckpt")
    code, lines = check(folder)
    assert code == 1 and lines[-1] == "problems: 20" and len(problem_lines(lines)) == 11
    assert lines[-2] == f"… and 10 more (--json has them all): {AGAIN}"
    assert len(json.loads("".join(check(folder, "--json")[1]))["problems"]) == 20


def test_names_that_are_no_text(tmp_path):
    ckpt = Checkpoint()
    ckpt.tensors["model.layers.0.self_attn.o_proj.\ud800\n\x1b[31m"] = f32(1)
    result = cli(ROOT, "check", ckpt.write(tmp_path / "ckpt"))
    assert result.returncode == 1 and not result.stderr
    assert any("o_proj.\\ud800\\n\\x1b[31m (model.safetensors) lies beside" in x for x in result.stdout.splitlines())


def test_any_locale(tmp_path):
    ckpt = Checkpoint()
    ckpt.quant["exclude"].append("model.é")
    folder = ckpt.write(tmp_path / "ckpt-ß")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "vllm_quark", "check", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert "ckpt-\\xdf: " in result.stdout and "model.\\xe9" in result.stdout


# The hub.


def test_hub_without_network(tmp_path):
    started = time.monotonic()
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vllm_quark", "check", "nobody/nothing-INT8"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    one_line(result, "nobody/nothing-INT8: is no folder", "download it first (hf download nobody/nothing-INT8)")
    assert time.monotonic() - started < 30


def test_hub_without_its_library(tmp_path):
    code = (
        "import sys; sys.modules['huggingface_hub'] = None; sys.argv[1:] = ['check', 'nobody/nothing']\n"
        "from vllm_quark.cli import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    one_line(result, "nobody/nothing: is no folder, and without huggingface_hub", "download it first")


@pytest.mark.parametrize("name", ["../nothing", "a/b/c", "", "what is this", "-x/y/z"])
def test_names_that_are_of_no_hub(name):
    result = cli(ROOT, "check", "--", name)
    one_line(result, "does not exist", "name the folder of a checkpoint")


def test_hub_headers(tmp_path, monkeypatch):
    import huggingface_hub

    ckpt = Checkpoint()
    ckpt.tensors[SCALE] = scaled(4, np.nan)
    ckpt.quant["exclude"].append("model.layers.0.self_attn.o_proj")
    folder = ckpt.write(tmp_path / "ckpt")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(folder / file))

    def read(name, revision, in_use):
        assert in_use == ckpt.config
        return headers.read_contents(str(folder), in_use)

    monkeypatch.setattr(headers, "contents_of_hub", read)
    line = problem("somebody/something", "is int8, but", "`exclude`")
    assert "layers.0.self_attn.o_proj" in line
    ckpt.quant["exclude"].pop()
    ckpt.write(folder)
    lines = sound("somebody/something")
    assert lines[0] == f"somebody/something: {len(ckpt.tensors)} tensors in 1 file"
    assert lines[-2].startswith("note: values of scales and zero points were not looked at")
    monkeypatch.setattr(headers, "contents_of_hub", lambda name, revision, in_use: None)
    with pytest.raises(checkpoint.NoCheckpointError, match="has no safetensors files on the Hugging Face hub"):
        checkpoint.check_checkpoint("somebody/something")


# As it is installed.


def test_installed_without_a_checkout(tmp_path):
    """The wheel holds the series in vllm_quark/series; vllm need not be there."""
    site = tmp_path / "site"
    shutil.copytree(ROOT / "vllm_quark", site / "vllm_quark", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    inside = site / "vllm_quark/series"
    shutil.copytree(ROOT / "patches", inside / "patches")
    result = cli(site, "check", Checkpoint().write(tmp_path / "ckpt"))
    one_line(result, "names.py", "is not in this copy of vllm-quark", "install it again")
    int8 = "vllm/model_executor/layers/quantization/quark/int8"
    shutil.copytree(ROOT / int8, inside / int8)
    (inside / int8 / "__init__.py").write_text("raise ImportError('vllm is not here')")
    result = cli(site, "check", tmp_path / "ckpt")
    assert result.returncode == 0 and result.stdout.endswith("sound\n"), result


# One expert stands for all only where no entry tells them apart.

MODULES = [
    f"model.layers.{layer}.{rest}"
    for layer in (1, 2, 12)
    for rest in (
        "block1.up_proj",
        "self_attn.q_proj",
        "mlp.shared.up_proj",
        *(f"mlp.experts.{e}.{p}_proj" for e in (*range(12), 100) for p in ("up", "gate")),
    )
]
TELLING = [
    "*.experts.1*",
    "*.1.up_proj",
    "*experts.?.up_proj",
    "*experts.[0-4].*",
    "*experts.[!0-4].*",
    "*experts.[layers.1].*",
    "*ts.1.*",
    "*experts*.1.up*",
    "*block1*",
    "re:.*experts?.1.up",
    "*experts.[0-9].*",
    "*layers.1*",
    "*layers.1.*",
    "model.layers.2.*up*",
    "*self_attn*",
    r"re:.*experts\.\d\.up",
    r"re:.*experts\.\d{2}\.up",
    r"re:.*experts\.(1|2)\.up",
    r"re:.*experts\.[^5]\.up",
    r"re:.*layers\.(\d+)\.mlp\.experts\.\1\.",
    r"re:.*layers\.(?P<n>\d+)\.mlp\.experts\.(?P=n)\.",
    r"re:.*layers\.2\.mlp\.experts\..*gate",
    r"re:.*\x31.up",
    "model.layers.1.mlp.experts.3.up_proj",
    "layers.1.mlp.shared.up_proj",
    "model.layers.2.mlp.experts",
]


@pytest.mark.parametrize("entry", TELLING)
@pytest.mark.parametrize("key", ["exclude", "layer_quant_config"])
def test_entries_say_of_each_expert_what_they_say(entry, key):
    config = {"exclude": ["*down_proj"], "global_quant_config": {"weight": {"dtype": "int8"}}}
    special = {"weight": {"dtype": "other"}}
    config |= {"exclude": ["*down_proj", entry]} if key == "exclude" else {"layer_quant_config": {entry: special}}
    entries, plain = Entries(config), names.Names(config)
    touched = 0
    for module in MODULES:
        spellings = [module]
        if ".experts." in module:
            # vLLM looks experts up by their layer's name, too.
            spellings.append(module.partition(".experts.")[0] + ".experts")
        spellings = names.both_prefixes(spellings)
        assert entries.look_up(module) == (plain.excludes(spellings), plain.config_of(spellings)), module
        own_spellings = names.both_prefixes([module])
        assert entries.excludes(own_spellings) == plain.excludes(own_spellings)
        touched += names.matches(entry, spellings)
    assert 0 < touched < len(MODULES)
