# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The tuner without a GPU: its search on made-up times, its files, and its candidates compiled ahead of time."""

import argparse
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.speed import gpu_layer, gpu_tune
from vllm_quark.locate import find_installed
from vllm_quark.series import load_series
from vllm_quark.shadow import make_shadow

ROOT = Path(__file__).parents[2]

BEST = {16: (32, 64, 256, 1, 4, 3), 1024: (128, 128, 128, 8, 8, 3)}


class MadeUp:
    """A GPU on which candidates near BEST are fast, one is wrong and one does not run."""

    wrong = (16, 64, 256, 1, 4, 4)
    broken = (16, 128, 256, 1, 4, 4)

    def __init__(self, shape):
        self.shape = shape
        self.measured = []

    def inputs(self, tokens, skew):
        return (torch.zeros(tokens, 1), skew)

    def default(self, tokens):
        return gpu_layer.as_config((64, 64, 64, 1, 4, 3)) | {"SPLIT_K": 1}

    def __call__(self, config, inputs):
        key = gpu_layer.as_key(config)
        self.measured.append(key)
        if key == self.broken:
            raise RuntimeError("out of resource: shared memory")
        return torch.full((4, 4), 1.2 if key == self.wrong else 1.0)

    def reference(self, inputs, tokens):
        return torch.ones(tokens, 4, dtype=torch.float64)

    def us(self, config, inputs):
        key, tokens = gpu_layer.as_key(config), inputs[0].shape[0]
        if key == self.wrong:
            return 0.1
        best = BEST[min(BEST, key=lambda b: abs(b - tokens))]
        return 100 + sum(abs(math.log2(a / b)) for a, b in zip(key, best, strict=True)) * 10


class MadeUpGraph:
    def __init__(self, call, inputs):
        layer, config = call(None)
        self.time = sum(layer.us(config, one) for one in inputs) / len(inputs)

    def times(self, replays):
        return [self.time] * replays


class AllCompile:
    target = "sm_90"

    def __init__(self, *_):
        self.failed = {}

    def __call__(self, keys, shape, tokens):
        return [key for key in keys if key not in self.failed]


@pytest.fixture
def made_up(monkeypatch):
    layers = []

    class Layer(MadeUp):
        def __init__(self, shape):
            super().__init__(shape)
            layers.append(self)

        def __call__(self, config, inputs):
            return (self, config) if inputs is None else super().__call__(config, inputs)

    monkeypatch.setattr(gpu_tune, "Layer", Layer)
    monkeypatch.setattr(gpu_tune, "Graph", MadeUpGraph)
    monkeypatch.setattr(gpu_tune, "Compiler", AllCompile)
    monkeypatch.setattr(gpu_tune.Search, "poison", lambda *a: None)
    monkeypatch.setattr(
        gpu_tune, "time_together", lambda graphs, rounds: {name: graph.time for name, graph in graphs.items()}
    )
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200 NVL")
    return layers


def run(out, *, shapes="int8:288:1280", counts="", seeds=(), seed_shapes=(), whole=1, minutes=1.0):
    args = dict(out=out, shapes=shapes, counts=counts, seeds=seeds, seed_shapes=seed_shapes, whole=whole)
    gpu_tune.search(argparse.Namespace(**args, minutes=minutes, target="sm_90", workers=1))
    return gpu_layer.read_cells([out])


def test_finds_the_fastest_right_candidate(made_up, tmp_path):
    cells = run(tmp_path / "out.jsonl", counts="16,64,1024")
    assert tuple(cells["int8 E=288 N=1280", 1024]["best"][0][0]) == BEST[1024]  # GROUP_SIZE_M found as well
    best = cells["int8 E=288 N=1280", 64]
    assert tuple(best["best"][0][0]) == BEST[16]
    assert [tuple(key) for key, _ in best["wrong"]] == [MadeUp.wrong]  # the fastest, were it right
    assert not any(tuple(key) in (MadeUp.wrong, MadeUp.broken) for key, *_ in best["best"])


def test_goes_on_where_it_stopped(made_up, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert run(out, minutes=0) == {}
    assert "run it again" in capsys.readouterr().out
    run(out, counts="16")
    run(out, counts="16,64")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [16, 64]


def test_seeds_narrow_the_search(made_up, tmp_path):
    first, second = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    run(first, counts="64")
    seeds = dict(seeds=[first], seed_shapes=["int8:288:1280"], whole=0)
    cells = run(second, shapes="int8:288:640", counts="64", **seeds)
    assert cells["int8 E=288 N=640", 64]["tried"] <= gpu_tune.KEPT + 1
    assert cells["int8 E=288 N=640", 64]["best"][0][0] == list(BEST[16])


def test_seeds_come_from_the_nearest_shapes_at_the_same_load(made_up, tmp_path):
    """A quarter of the rows per expert: the best at 4096 tokens is tried at 16384, and at 64 that of 16."""
    out = tmp_path / "out.jsonl"
    far, near = "int8:16:64:256:512:8", "int8:64:768:64:2048:8"
    run(out, shapes=f"{far},{near}", counts="16,1024", whole=2)
    run(out, shapes=f"{far},{near},int8:256:768:256:2048:8", counts="64", whole=2)
    cells = gpu_layer.read_cells([out])
    assert gpu_layer.Shape.parse("int8:256:768:256:2048:8").load == 8 / 256
    assert cells["int8 E=256 N=768 K=2048", 64]["best"][0][0] == list(BEST[16])
    assert cells["int8 E=256 N=768 K=2048", 64]["tried"] <= 2 * (gpu_tune.KEPT + 1) + 1


def test_a_file_serves_all_shapes_of_its_name(made_up, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    run(out, shapes="int8:256:512:256:2048:8,int8:256:512:256:7168:8")
    gpu_tune.write(argparse.Namespace(results=[out], configs=tmp_path, sums=True))
    (file,) = tmp_path.glob("*.json")
    assert file.name == "E=256,N=512,device_name=NVIDIA_H200,dtype=int8_w8a8,sums=int32.json"
    assert gpu_layer.as_key(json.loads(file.read_text())["1024"]) == BEST[1024]
    assert "x the default" in capsys.readouterr().out


def test_few_configs_serve_many_counts():
    """Each compiles at its first launch: one that is near the best at several counts serves them all."""
    a, b, c = (16,), (32,), (64,)
    losses = {1: {a: 1.0, b: 1.019}, 2: {a: 1.021, b: 1.01, c: 1.0}, 4: {b: 1.02, c: 1.0}, 8: {c: 1.0}}
    assert gpu_tune.choose_configs(losses) == {1: b, 2: b, 4: b, 8: c}
    assert gpu_tune.choose_configs({1: {a: 1.1}, 2: {b: 1.0}}) == {1: a, 2: b}  # no better one is there


def test_two_searches_of_a_shape_decide_together(made_up, tmp_path):
    """As with two versions of triton: what is best in one and slow in the other is not taken."""
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    run(first)
    cells = [json.loads(line) for line in first.read_text().splitlines()]
    for cell in cells:
        for row in cell["best"]:
            if tuple(row[0]) == BEST[1024]:
                row[1:] = [2 * time for time in row[1:]]
    second.write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    for results, taken in (([first], True), ([first, second], False), ([second, first], False)):
        gpu_tune.write(argparse.Namespace(results=results, configs=tmp_path, sums=False))
        (file,) = tmp_path.glob("E=288*.json")
        assert (gpu_layer.as_key(json.loads(file.read_text())["1024"]) == BEST[1024]) is taken


def test_no_file_where_the_default_is_as_good(made_up, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_tune, "GAIN", 9.0)
    out = tmp_path / "out.jsonl"
    run(out)
    gpu_tune.write(argparse.Namespace(results=[out], configs=tmp_path, sums=False))
    assert not [*tmp_path.glob("*.json")] and "no count gains" in capsys.readouterr().out


def test_writes_whole_files_only(made_up, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    run(out, shapes="int8:288:1280,int8:36:1280")
    lines = [line for line in out.read_text().splitlines() if json.loads(line)["tokens"] != 48 or "E=288" in line]
    out.write_text("\n".join(lines) + "\n")
    gpu_tune.write(argparse.Namespace(results=[out], configs=tmp_path, sums=False))
    name = "E=288,N=1280,device_name=NVIDIA_H200,dtype=int8_w8a8.json"
    assert [f.name for f in tmp_path.glob("*.json")] == [name]
    assert "E=36,N=1280,device_name=NVIDIA_H200,dtype=int8_w8a8.json: not written" in capsys.readouterr().out
    configs = json.loads((tmp_path / name).read_text())
    assert list(map(int, configs)) == list(gpu_layer.COUNTS)
    assert set(configs["1"]) == set(gpu_layer.FIELDS)


COMPILE = """
import re
from multiprocessing import get_context
from benchmarks.speed.gpu_layer import compile_kernel

def one(key):
    try:
        kernel = compile_kernel(key, "int8", {target!r}, (False, 0, False))
    except Exception as error:
        return key, repr(error)
    text = kernel.asm.get("amdgcn") or kernel.asm["ptx"]
    return key, len(re.findall({products!r}, text))

if __name__ == "__main__":
    import vllm.model_executor.layers.fused_moe.fused_moe
    with get_context("fork").Pool() as pool:
        for key, found in pool.imap_unordered(one, {keys!r}, chunksize=4):
            print(*key, "->", found)
"""


@pytest.mark.parametrize(
    "target, products",
    [("gfx942", r"v_mfma_i32\w*_i8"), ("gfx950", r"v_mfma_i32\w*_i8"), ("sm_90", r"mma\S*\.s8\.s8")],
)
def test_every_tile_compiles_to_int8_products(target, products, tmp_path):
    """Each tile with one count of warps and stages; every candidate with VLLM_QUARK_CANDIDATES=all (minutes)."""
    keys = gpu_layer.space("int8", target)
    if os.environ.get("VLLM_QUARK_CANDIDATES") != "all":
        keys = list({key[:4] + key[6:]: key for key in keys}.values())
    code = COMPILE.format(target=target, products=products, keys=keys)
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(tmp_path), "VLLM_LOGGING_LEVEL": "ERROR"}
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    chosen_counts = dict(line.split(" -> ") for line in process.stdout.splitlines() if re.match(r"\d+ \d+ ", line))
    assert len(chosen_counts) == len(keys)
    assert all(count.isdigit() and int(count) > 0 for count in chosen_counts.values()), chosen_counts


WAITS = r"""
import contextlib, os, re
from multiprocessing import get_context
from benchmarks.speed.gpu_layer import compile_kernel
from benchmarks.speed.triton_overlap import overlapping_products

def find_waits(dtype, overlaps):
    os.environ["TRITON_CACHE_DIR"] += f"-{dtype}-{overlaps}"
    with overlapping_products() if overlaps else contextlib.nullcontext():
        kernel = compile_kernel((128, 128, 128, 1, 4, 4), dtype, "sm_90", (False, 0, False))
    print(dtype, overlaps, re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", kernel.asm["ptx"]), flush=True)

if __name__ == "__main__":
    import vllm.model_executor.layers.fused_moe.fused_moe
    with get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        pool.starmap(find_waits, [("fp8", False), ("int8", False), ("int8", True)], chunksize=1)
"""


def test_triton_ends_each_int8_product_before_the_next(tmp_path):
    """What docs/speed-gpu.md says of Triton, and that triton_overlap.py changes just that: the waits of a Hopper
    kernel, in its loop and after it."""
    series = load_series(ROOT).with_optional(["0016"])
    shadow = make_shadow(tmp_path / "sums", series, [p.name for p in series.patches], find_installed())
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    env |= {"PYTHONPATH": str(shadow), "VLLM_LOGGING_LEVEL": "ERROR"}
    process = subprocess.run([sys.executable, "-c", WAITS], cwd=ROOT, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    lines = process.stdout.splitlines()[-3:]
    assert lines == ["fp8 False ['1', '0']", "int8 False ['0']", "int8 True ['1', '0']"]
