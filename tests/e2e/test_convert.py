# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""What `vllm-quark convert` writes, through the engine of a vLLM without the series.

Stock 0.21.0 on CPU has neither INT8 experts nor Step-3.5's routing. So calibrated dense exports run on stock as it is;
Step-3.5 with its experts in BF16 runs with 0004, the routing, and without 0001, Step-3.5's packed_modules_mapping; INT8
experts run on stock 0.32.0, where `make releases` has left it.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from lab import GARBAGE, RIGHT, ROOT, before, call
from safetensors.torch import load_file, save_file

from vllm_quark.convert.conversion import convert_checkpoint

DENSE = [f"dense-{weights}-{sign}" for weights in ("channel", "tensor") for sign in ("sym", "asym")]
NEWEST = ROOT / "build/releases/env-0.32.0/bin/python"
pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("exports")]


def convert(folder: Path, out: Path) -> Path:
    convert_checkpoint(folder, out, "compressed-tensors", True, lambda *_: None)
    return out


def serve(names: list[str], folder: Path, python: str | Path, **env: str) -> dict[str, dict[str, float]]:
    """Distances of log-probabilities from what each converted export's numbers say, by reading (static_exports.py)."""
    jobs, expected = [], {}
    for name in names:
        export = ROOT / "build/static" / name
        if not (export / "expected.json").is_file():
            pytest.skip(f"{export} is not there (tests/e2e/test_exports.py makes it)")
        expected[name] = json.loads((export / "expected.json").read_text())
        ckpt = convert(export, folder / name)
        jobs.append({"ckpt": str(ckpt), "ids": expected[name]["ids"], "logprobs": 128, "tokens": 4,
                     "out": str(folder / f"{name}.json")})  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps(jobs))
    call(folder / "log", python, Path(__file__).with_name("in_process.py"), folder / "jobs.json", **env)
    found = {}
    for name, job in zip(names, jobs, strict=True):
        result = json.loads(Path(job["out"]).read_text())
        assert "error" not in result, result
        out = torch.tensor([[[at[str(t)] for t in range(128)] for at in prompt] for prompt in result["logprobs"]])
        found[name] = {}
        for reading in ("exact", "served", "blank"):
            reference = torch.tensor(expected[name][reading])[:, :-1]
            a, b = (y - y.mean(-1, keepdim=True) for y in (out, reference))
            found[name][reading] = round(((a - b).norm() / b.norm()).item(), 4)
    print(found)
    return found


def test_static_dense_exports_on_stock(vllm, tmp_path):
    for distances in serve(DENSE, tmp_path, sys.executable, PYTHONPATH=before(vllm([]))).values():
        assert distances["exact"] <= 0.1 and distances["blank"] >= 0.5, distances


def test_experts_on_the_newest_stock(tmp_path):
    """Per token, as --per-token writes static ones and as the series serves them."""
    if not NEWEST.exists():
        pytest.skip(f"{NEWEST} is not there (make releases)")
    for distances in serve(["moe-channel-sym", "moe-tensor-asym"], tmp_path, NEWEST, PYTHONPATH="").values():
        assert distances["served"] <= 0.15 and distances["blank"] >= 0.5, distances


@pytest.fixture
def float_experts(ckpts, tmp_path) -> Path:
    """Quark's export with its experts in BF16: dense layers INT8, attention and all experts in `exclude`."""
    out = shutil.copytree(ckpts["quark"], tmp_path / "float-experts")
    tensors = load_file(out / "model.safetensors")
    for name in [n for n in tensors if ".experts." in n and n.endswith("_scale")]:
        scale, weight = tensors.pop(name), name.removesuffix("_scale")
        tensors[weight] = (tensors[weight].float() * scale.unsqueeze(-1)).bfloat16()
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (out / name).unlink()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["exclude"] += sorted({n.removesuffix(".weight") for n in tensors if ".experts." in n})
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_step3p5_without_a_packed_modules_mapping(float_experts, judge, vllm, tmp_path):
    """Right by the fused layers' names in `ignore`; garbage without them, as other writers have it."""
    out = convert(float_experts, tmp_path / "out")
    emulated = judge.emulate(float_experts)
    result = judge.run(out, vllm(["0004"]), tmp_path / "r.json")
    assert result.perplexity is not None and abs(result.perplexity / emulated.perplexity - 1) <= RIGHT / 2, result
    assert abs(result.perplexity / judge.reference.perplexity - 1) <= RIGHT and result.agreement >= 0.97, result
    config = json.loads((out / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    config["quantization_config"]["ignore"] = [n for n in ignored if not n.endswith((".qkv_proj", ".gate_up_proj"))]
    (out / "config.json").write_text(json.dumps(config))
    broken = judge.run(out, vllm(["0004"]), tmp_path / "broken.json")
    assert broken.perplexity is None or broken.perplexity >= GARBAGE * judge.reference.perplexity, broken
