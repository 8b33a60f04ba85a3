# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""What `vllm-quark convert` writes, through the engine of a vLLM without the series.

Stock 0.21.0 on CPU has neither INT8 experts nor Step-3.5's routing, and stock 0.32.0 no experts with Step-3.5's. So
calibrated dense exports run on stock 0.21.0, and calibrated experts on stock 0.32.0, where `make releases` has left it.
Of Step-3.5 the linear layers are built, from stock's classes: 0.21.0 has no packed_modules_mapping of it.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from examples.step3p5_nano.lab import ROOT, call, make_pythonpath
from tests.e2e.jobs import read_logprobs, relative_distance, run_jobs
from tests.processor import needs_amx, needs_vnni
from vllm_quark.convert.conversion import convert_checkpoint

DENSE = [f"dense-{weights}-{sign}" for weights in ("channel", "tensor") for sign in ("sym", "asym")]
NEWEST = ROOT / "build/releases/env-0.32.0/bin/python"
pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("exports")]


def convert(folder: Path, out: Path) -> Path:
    convert_checkpoint(folder, out, "compressed-tensors", True, lambda *_: None)
    return out


def serve(exports: list[Path], folder: Path, python: str | Path, **env: str) -> dict[str, dict[str, float]]:
    """Distances of log-probabilities from what each converted export's numbers say, by reading (static_exports.py)."""
    jobs, expected = [], {}
    for export in exports:
        expected[export.name] = json.loads((export / "expected.json").read_text())
        ckpt = convert(export, folder / export.name)
        jobs.append({"ckpt": str(ckpt), "ids": expected[export.name]["ids"], "logprobs": 128, "tokens": 4})
    summary = {}
    for name, result in zip(expected, run_jobs(jobs, folder, python, **env), strict=True):
        assert "error" not in result, result
        out = read_logprobs(result, 128)
        references = {r: torch.tensor(expected[name][r])[:, :-1] for r in ("exact", "served", "blank")}
        summary[name] = {reading: round(relative_distance(out, y), 4) for reading, y in references.items()}
    print(summary)
    return summary


def test_static_dense_exports_on_stock(exports, vllm, tmp_path):
    path = make_pythonpath(vllm([]))
    for distances in serve([exports / name for name in DENSE], tmp_path, sys.executable, PYTHONPATH=path).values():
        assert distances["exact"] <= 0.1 and distances["blank"] >= 0.5, distances


@needs_amx
def test_experts_on_the_newest_stock(exports, tmp_path):
    """Per token, as --per-token writes static ones and as the series serves them."""
    if not NEWEST.exists():
        pytest.skip(f"{NEWEST} is not there (make releases)")
    names = ("moe-channel-sym", "moe-tensor-asym")
    for distances in serve([exports / name for name in names], tmp_path, NEWEST, PYTHONPATH="").values():
        assert distances["served"] <= 0.15 and distances["blank"] >= 0.5, distances


LAYERS = """
import json, sys
from types import SimpleNamespace
import torch
from vllm_quark.checkpoint import read_checkpoint
from vllm_quark.checkpoint.int8 import headers
from vllm_quark.verify.build import environment
from vllm_quark.verify.emulate import Numbers, emulate_linear
from vllm_quark.verify.layers import find_layers
from vllm_quark.verify.measure import deviate, make_inputs, make_routes

source, out = sys.argv[1:]
ckpt, config = read_checkpoint(source), json.load(open(f"{out}/config.json"))
written = SimpleNamespace(contents=headers.read_contents(out), is_stacked=lambda module: False)
with environment(torch.bfloat16) as builder:
    builder.read_config(out, config, config["quantization_config"])
    errors = {"mapping": builder.quant_config.packed_modules_mapping}
    for layer in find_layers(ckpt):
        if layer.kind != "experts":
            x = make_inputs(layer, Numbers(layer, ckpt.modules), torch.bfloat16)
            module = builder.build(layer, Numbers(layer, written))
            expected = emulate_linear(x, Numbers(layer, ckpt.modules), layer.scheme)
            errors[layer.name] = deviate(builder.run(module, x, make_routes(layer, len(x))), expected)[0]
print(json.dumps(errors).replace("Infinity", "1e9").replace("NaN", "1e9"))
"""


@needs_vnni
def test_step3p5_without_a_packed_modules_mapping(ckpts, vllm, tmp_path):
    """Linear layers of stock 0.21.0, whose Step-3.5 has none: right by the fused names in `ignore`, garbage without."""
    out = convert(ckpts["quark"], tmp_path / "out")

    def build() -> dict[str, float]:
        path = make_pythonpath(vllm([])) + os.pathsep + str(ROOT)
        call(tmp_path / "log", sys.executable, "-c", LAYERS, ckpts["quark"], out, PYTHONPATH=path)
        log = (tmp_path / "log").read_text().splitlines()
        summary = json.loads(next(line for line in log if line.startswith('{"mapping"')))
        assert summary.pop("mapping") == {}
        return summary

    errors = build()
    assert len(errors) == 32 and max(errors.values()) < 0.01, errors
    config = json.loads((out / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    config["quantization_config"]["ignore"] = [n for n in ignored if not n.endswith((".qkv_proj", ".gate_up_proj"))]
    (out / "config.json").write_text(json.dumps(config))
    broken = {name for name, error in build().items() if error > 0.1}
    assert broken == {n for n in errors if n.endswith("qkv_proj") or n.endswith("share_expert.gate_up_proj")}
