# SPDX-License-Identifier: Apache-2.0
"""INT8 experts against BF16, FP8, vLLM's default config and the chip's limits.

    python -m benchmarks.speed.gpu_speed measure OUT.json TUNED.jsonl…     on the GPU
    python -m benchmarks.speed.gpu_speed table OUT.json                    the table in docs/speed-gpu.md

One layer at Step-3.5-Flash's shape, or at `--shape`, each dtype with the best config
that gpu_tune.py found; one run, medians of interleaved CUDA-graph replays, half of the
inputs with uniform and half with skewed routing. `--sums TUNED.jsonl --plain SITE`, on
a vLLM with patch 0016, measures its int32 sums ("sums") beside the kernel of SITE, and with `--overlap TUNED.jsonl`
also what they would be with another Triton ("overlap", triton_overlap.py). The limit of a call is the larger
of its bytes over the measured copy bandwidth and its operations over the measured
int8 matmul rate.
"""

import argparse
import ast
import importlib.util
import json
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.speed.gpu_layer import (
    COUNTS,
    EXPERTS,
    WIDTH,
    Graph,
    Layer,
    Shape,
    as_config,
    read_cells,
    time_together,
)
from benchmarks.speed.triton_overlap import overlapping_products

PROFILED = (64, 256, 1024, 4096, 8192)
# what a kernel's name says of its part in the layer
PARTS = {
    "fused_moe_kernel": "products",
    "quant": "quantization",
    "act_and_mul": "activation",
    "silu": "activation",
    "sum": "sum over experts",
    "align": "sorting tokens",
    "sort": "sorting tokens",
}


def ceilings() -> dict[str, float]:
    """Copy bandwidth in bytes/s (read and written) and int8 operations/s."""
    import torch
    import triton

    def best(call) -> float:
        times = triton.testing.do_bench(call, warmup=50, rep=200, return_mode="median")
        return times / 1e3

    pair = torch.rand(2, 1 << 30, device="cuda")
    copy = 4 * pair.numel() / best(lambda: pair[1].copy_(pair[0]))
    pair.resize_(0)
    n = 8192
    a = torch.randint(-127, 128, (n, n), dtype=torch.int8, device="cuda")
    b = torch.randint(-127, 128, (n, n), dtype=torch.int8, device="cuda").t()
    rates = {"torch._int_mm": lambda: torch._int_mm(a, b)}
    try:
        from vllm import _custom_ops as ops

        one = torch.ones(1, device="cuda")
        rates["cutlass_scaled_mm"] = lambda: ops.cutlass_scaled_mm(a, b, one, one, torch.bfloat16)
    except ImportError:
        pass
    rate = {name: 2 * n**3 / best(call) for name, call in rates.items()}
    return {"copy": copy, **rate, "int8": max(rate.values())}


def profiled(call, inputs: list) -> dict[str, float]:
    """Microseconds a call in each part of the layer, and of each kernel."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    for one in inputs:
        call(one)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for one in inputs:
            call(one)
        torch.cuda.synchronize()
    parts: dict[str, float] = {}
    launches: list[float] = []
    for event in seen.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        name, took = event.name, event.device_time
        part = next((p for word, p in PARTS.items() if word in name), "other")
        if part == "products":
            launches.append(took)
            continue
        parts[part] = parts.get(part, 0.0) + took / len(inputs)
    for part, times in (("up", launches[::2]), ("down", launches[1::2])):
        parts[f"{part} product"] = sum(times) / len(inputs)
    return {part: round(took, 1) for part, took in parts.items()}


def read_kernel(site: Path, folder: Path):
    """fused_moe_kernel of the vLLM in `site`, beside the one that is imported; folder: an empty one for its module."""
    source = (site / "vllm/model_executor/layers/fused_moe/fused_moe.py").read_text()
    functions = [
        ast.get_source_segment(source, node)
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name in ("write_zeros_to_output", "fused_moe_kernel")
    ]
    text = "\n\n\n".join(["from vllm.triton_utils import tl, triton", *(f"@triton.jit\n{f}" for f in functions)])
    (folder / "plain_kernel.py").write_text(text + "\n")
    spec = importlib.util.spec_from_file_location("plain_kernel", folder / "plain_kernel.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fused_moe_kernel


def with_kernel(layer: Layer, kernel):
    """`layer` as a function, launched with `kernel` in place of vLLM's."""
    from vllm.model_executor.layers.fused_moe import fused_moe

    def call(config, inputs):
        before, fused_moe.fused_moe_kernel = fused_moe.fused_moe_kernel, kernel
        try:
            return layer(config, inputs)
        finally:
            fused_moe.fused_moe_kernel = before

    return call


def with_overlap(layer: Layer):
    """`layer` as a function, with kernels whose int8 products overlap."""

    def call(config, inputs):
        with overlapping_products():
            return layer(config, inputs)

    return call


def measure(args: argparse.Namespace) -> None:
    import torch
    import triton
    import vllm

    if bool(args.sums) != bool(args.plain):
        sys.exit("--sums and --plain go together")
    cells = read_cells(args.tuned)
    shapes = {d: Shape.parse(f"{d}:{args.shape}") for d in ("int8", "fp8", "bf16")}
    limits = ceilings()
    print({k: f"{v:.3e}" for k, v in limits.items()}, flush=True)
    layers: dict = {d: Layer(shape) for d, shape in shapes.items()}
    int8 = layers["int8"]
    names = {d: (cells, str(shape)) for d, shape in shapes.items()}
    if args.sums:
        with tempfile.TemporaryDirectory() as folder:
            kernel = read_kernel(args.plain, Path(folder))
        layers |= {"sums": int8, "int8": with_kernel(int8, kernel)}
        names["sums"] = (read_cells([args.sums]), str(shapes["int8"]))
    if args.overlap:
        layers["overlap"] = with_overlap(int8)
        names["overlap"] = (read_cells([args.overlap]), str(shapes["int8"]))
    rows = []
    for tokens in args.counts or COUNTS:
        inputs = int8.mixed_inputs(tokens)
        configs = {"default": int8.default(tokens)}
        for name, (tuned, shape) in names.items():
            if cell := tuned.get((shape, tokens)):
                configs[name] = as_config(tuple(cell["best"][0][0]))
        graphs = {}
        for name, config in configs.items():
            layer = layers.get(name, layers["int8"])
            graphs[name] = Graph(lambda x, a=layer, c=config: a(c, x), inputs)
        took = time_together(graphs, rounds=6, seconds=args.seconds)
        del graphs
        work = [int8.work(one) for one in inputs]
        moved, operations = (statistics.mean(w) for w in zip(*work, strict=True))
        row = {
            "tokens": tokens,
            "us": {name: round(t, 2) for name, t in took.items()},
            "limit": {
                "us": round(1e6 * max(moved / limits["copy"], operations / limits["int8"]), 2),
                "bytes": int(moved),
                "operations": int(operations),
            },
            "configs": configs,
        }
        if tokens in PROFILED:
            row["profile"] = {
                d: profiled(lambda x, a=layers[d], c=configs[d]: a(c, x), inputs) for d in layers if d in configs
            }
        rows.append(row)
        print(tokens, row["us"], row["limit"]["us"], row.get("profile"), flush=True)
    result = {
        "shape": str(shapes["int8"]),
        "device": torch.cuda.get_device_name(),
        "versions": {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        "ceilings": limits,
        "seconds alone": args.seconds,
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def ratios(row: dict) -> dict[str, float | None]:
    """How INT8 compares; more is better: BF16's, FP8's, the default config's time and
    the limit over INT8's."""
    us = row["us"]
    others = {name: us.get(name) for name in ("bf16", "fp8", "default", "sums")}
    others["limit"] = row["limit"]["us"]
    return {name: took and took / us["int8"] for name, took in others.items()}


def table(args: argparse.Namespace) -> None:
    result = json.loads(args.out.read_text())
    rows = result["rows"]
    print(
        "| tokens | INT8 us | default config us | FP8 us | BF16 us | limit us "
        "| INT8 / BF16 | INT8 / FP8 | INT8 / default | INT8 / int32 sums | of the limit |"
    )
    print("|" + "---|" * 11)
    for row in rows:
        us, speed = row["us"], ratios(row)
        times = [us["int8"], us["default"], us.get("fp8"), us.get("bf16")]
        cells = [f"{t:.1f}" if t else "" for t in (*times, row["limit"]["us"])]
        cells += [f"{r:.2f}x" if r else "" for r in list(speed.values())[:4]]
        print("|", " | ".join([str(row["tokens"]), *cells, f"{speed['limit']:.0%}"]), "|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sub = parser.add_subparsers(required=True)
    one = sub.add_parser("measure")
    one.add_argument("out", type=Path)
    one.add_argument("tuned", type=Path, nargs="+")
    one.add_argument("--counts", type=int, nargs="*")
    one.add_argument("--shape", default=f"{EXPERTS}:{WIDTH}", help="as gpu_tune's, without the dtype")
    one.add_argument("--sums", type=Path, metavar="TUNED", help="found with patch 0016")
    one.add_argument("--plain", type=Path, metavar="SITE", help="folder of a vllm/ without 0016")
    one.add_argument("--overlap", type=Path, metavar="TUNED", help="found with --overlap, on a vLLM with 0016")
    one.add_argument("--seconds", type=float, default=0.0, help="each contestant alone before its turns")
    one.set_defaults(run=measure)
    two = sub.add_parser("table")
    two.add_argument("out", type=Path)
    two.set_defaults(run=table)
    args = parser.parse_args()
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
