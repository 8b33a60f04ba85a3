# SPDX-License-Identifier: Apache-2.0
"""`vllm-quark check` on a checkpoint of 200,000 tensors in 200 files.

    python -m benchmarks.speed.load_check [--tensors 200000] [--files 200] [--runs 3] [--out build/check-speed]

Writes the checkpoint of a model as Step-3.5-Flash is, with as many layers of 288 experts as it takes: true names and
shapes, scales as numbers, weights as holes in the files (half a terabyte that takes a gigabyte of disk). Then times
the command as a user runs it. The first run may read from disk, the others read from the system's cache.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.quantization.quark import layer_config, quantization_config

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, WIDTH, EXPERTS, VOCABULARY = 4096, 1280, 288, 128896
ATTENTION = {"q_proj": (8192, HIDDEN), "k_proj": (1024, HIDDEN), "v_proj": (1024, HIDDEN), "o_proj": (HIDDEN, 8192)}
MLP = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
SIZES = {"F32": 4, "BF16": 2, "I8": 1}
Tensor = tuple[str, str, tuple[int, ...]]


def list_tensors(count: int) -> Iterator[Tensor]:
    """Name, dtype and shape of a model's tensors: `count`, and what makes the last layer whole."""
    yield "model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN)
    yield "model.norm.weight", "BF16", (HIDDEN,)
    yield "lm_head.weight", "BF16", (VOCABULARY, HIDDEN)
    layer, written = 0, 3
    while written < count:
        stem = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{stem}.{name}.weight", "BF16", (HIDDEN,)
        for name, shape in ATTENTION.items():
            yield f"{stem}.self_attn.{name}.weight", "BF16", shape
        yield f"{stem}.moe.gate.weight", "BF16", (EXPERTS, HIDDEN)
        yield f"{stem}.moe.router_bias", "F32", (EXPERTS,)
        experts = [f"{stem}.moe.experts.{e}" for e in range(EXPERTS)]
        for module in (*experts, f"{stem}.share_expert"):
            for name, (rows, columns) in MLP.items():
                yield f"{module}.{name}.weight", "I8", (rows, columns)
                yield f"{module}.{name}.weight_scale", "F32", (rows,)
        layer, written = layer + 1, written + 8 + 6 * (EXPERTS + 1)


def write_file(path: Path, part: list[Tensor]) -> None:
    """A safetensors file in the library's order, with 0.01 in every F32 and nothing in the others."""
    header, end = {}, 0
    for name, dtype, shape in sorted(part, key=lambda t: (-SIZES[t[1]], t[0])):
        start, end = end, end + SIZES[dtype] * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    numbers = sum(int(np.prod(shape)) for _, dtype, shape in part if dtype == "F32")
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.write(np.full(numbers, 0.01, np.float32))
        f.truncate(8 + len(text) + end)


def write_checkpoint(out: Path, count: int, files: int) -> None:
    """Write the checkpoint: at least `count` tensors in `files` files."""
    listed = list(list_tensors(count))
    modules = [name.removesuffix(".weight") for name, dtype, _ in listed if dtype == "BF16" and "norm" not in name]
    # By full names, as Quark writes them, and by patterns, as people do.
    patterns = ["*.vision_tower.*", "re:.*embed.*", "re:.*\\.moe\\.gate$", "*self_attn*", "*eh_proj"]
    quant_config = quantization_config(exclude=[*modules, *patterns])
    quant_config["layer_quant_config"] = {"*share_expert.*": layer_config()}
    config = {"architectures": ["Step3p5ForCausalLM"], "quantization_config": quant_config}
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config))
    per_file = -(-len(listed) // files)
    weight_map = {}
    for i in range(files):
        name = f"model-{i + 1:05}-of-{files:05}.safetensors"
        write_file(out / name, listed[i * per_file : (i + 1) * per_file])
        weight_map |= {tensor: name for tensor, _, _ in listed[i * per_file : (i + 1) * per_file]}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", type=int, default=200_000)
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "build/check-speed")
    args = parser.parse_args()
    write_checkpoint(args.out, args.tensors, args.files)
    processor = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "regex")]
    print(
        processor.partition(": ")[2],
        f"{os.cpu_count()} cores",
        f"Python {platform.python_version()}",
        *versions,
        sep=", ",
    )
    size = sum(p.stat().st_size for p in args.out.iterdir())
    print(f"{args.files} files, {size / 1e9:.0f} GB")
    for _ in range(args.runs):
        start = time.perf_counter()
        process = subprocess.run(
            [sys.executable, "-m", "vllm_quark", "check", args.out], capture_output=True, text=True, cwd=ROOT
        )
        seconds = time.perf_counter() - start
        print(f"{seconds:.1f} s, exit {process.returncode}: {(process.stdout or process.stderr).splitlines()[0]}")


if __name__ == "__main__":
    main()
