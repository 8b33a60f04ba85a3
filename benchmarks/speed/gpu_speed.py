# SPDX-License-Identifier: Apache-2.0
"""INT8 experts against BF16, FP8, vLLM's default config and the chip's limits.

    python -m benchmarks.speed.gpu_speed measure OUT.json TUNED.jsonl…     on the GPU
    python -m benchmarks.speed.gpu_speed table OUT.json                    the table in docs/speed-gpu.md
    python -m benchmarks.speed.gpu_speed int32 SITE FOLDER                 an experiment's vLLM

One layer at Step-3.5-Flash's shape, each dtype with the best config that
gpu_tune.py found; one run, medians of interleaved CUDA-graph replays, half of the
inputs with uniform and half with skewed routing. The limit of a call is the larger
of its bytes over the measured copy bandwidth and its operations over the measured
int8 matmul rate.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from benchmarks.speed.gpu_layer import COUNTS, SKEW, Graph, Layer, Shape, as_config, calls_of, read_cells, time_together

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


def measure(args: argparse.Namespace) -> None:
    import torch
    import triton
    import vllm

    cells = read_cells(args.tuned)
    limits = ceilings()
    print({k: f"{v:.3e}" for k, v in limits.items()}, flush=True)
    layers = {d: Layer(Shape(dtype=d)) for d in ("int8", "fp8", "bf16")}
    rows = []
    for tokens in args.counts or COUNTS:
        calls = calls_of(tokens)
        inputs = [layers["int8"].inputs(tokens, skew) for _ in range(max(1, calls // 2)) for skew in (0.0, SKEW)]
        configs = {"default": layers["int8"].default(tokens)}
        for dtype, layer in layers.items():
            if cell := cells.get((str(layer.shape), tokens)):
                configs[dtype] = as_config(tuple(cell["best"][0][0]))
        graphs = {}
        for name, config in configs.items():
            layer = layers.get(name, layers["int8"])
            graphs[name] = Graph(lambda x, a=layer, c=config: a(c, x), inputs)
        took = time_together(graphs, rounds=6)
        del graphs
        work = [layers["int8"].work(one) for one in inputs]
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
        "device": torch.cuda.get_device_name(),
        "versions": {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        "ceilings": limits,
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def ratios(row: dict) -> dict[str, float | None]:
    """How INT8 compares; more is better: BF16's, FP8's, the default config's time and
    the limit over INT8's."""
    us = row["us"]
    others = {name: us.get(name) for name in ("bf16", "fp8", "default")}
    others["limit"] = row["limit"]["us"]
    return {name: took and took / us["int8"] for name, took in others.items()}


def table(args: argparse.Namespace) -> None:
    result = json.loads(args.out.read_text())
    rows = result["rows"]
    print(
        "| tokens | INT8 us | default config us | FP8 us | BF16 us | limit us "
        "| INT8 / BF16 | INT8 / FP8 | INT8 / default | of the limit |"
    )
    print("|" + "---|" * 10)
    for row in rows:
        us, speed = row["us"], ratios(row)
        times = [us["int8"], us["default"], us.get("fp8"), us.get("bf16")]
        cells = [f"{t:.1f}" if t else "" for t in (*times, row["limit"]["us"])]
        cells += [f"{r:.2f}x" if r else "" for r in list(speed.values())[:3]]
        print("|", " | ".join([str(row["tokens"]), *cells, f"{speed['limit']:.0%}"]), "|")


def int32(args: argparse.Namespace) -> None:
    """Write a copy of vLLM's package whose kernel sums int8 products in int32, an
    experiment: what the kernel's conversion to float32 at each step of K costs."""
    import shutil

    shutil.copytree(args.site / "vllm", args.out / "vllm", symlinks=True)
    file = args.out / "vllm/model_executor/layers/fused_moe/fused_moe.py"
    before, start, kernel = file.read_text().partition("\ndef fused_moe_kernel(")
    for old, new in (
        (
            "BLOCK_SIZE_N), dtype=tl.float32)",
            "BLOCK_SIZE_N), dtype=tl.int32 if use_int8_w8a8 else tl.float32)",
        ),
        (
            f"\n{' ' * 20}accumulator += tl.dot(a, b)",
            f"\n{' ' * 20}accumulator = tl.dot(a, b, acc=accumulator, out_dtype=tl.int32)",
        ),
    ):
        if kernel.count(old) != 1:
            sys.exit(f"{file}: {old.strip()!r} is there {kernel.count(old)} times: not the kernel this knows")
        kernel = kernel.replace(old, new)
    file.unlink()
    file.write_text(before + start + kernel)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sub = parser.add_subparsers(required=True)
    one = sub.add_parser("measure")
    one.add_argument("out", type=Path)
    one.add_argument("tuned", type=Path, nargs="+")
    one.add_argument("--counts", type=int, nargs="*")
    one.set_defaults(run=measure)
    two = sub.add_parser("table")
    two.add_argument("out", type=Path)
    two.set_defaults(run=table)
    three = sub.add_parser("int32")
    three.add_argument("site", type=Path, help="folder that holds vllm/")
    three.add_argument("out", type=Path)
    three.set_defaults(run=int32)
    args = parser.parse_args()
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
