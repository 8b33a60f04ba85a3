# SPDX-License-Identifier: Apache-2.0
"""Routed INT8 experts on CPU: the native operator against oneDNN by expert, vLLM's BF16 and INT8 experts, and memory.

    make env && PYTHONPATH=build/shadow .venv/bin/python -m benchmarks.speed.cpu_experts [--json OUT]

Needs a vLLM with the series first on PYTHONPATH (`vllm-quark shadow -o build/shadow`). Times are medians of rounds in
which all contestants run one after the other on the same fresh input and routing, so compare within a run; where one
takes less than a millisecond, a round has as many calls as fill one. VLLM_INT8_MOE_ISA and ONEDNN_MAX_CPU_ISA cap both
sides' instruction sets. The bandwidth is that of summing an int64 tensor
of the weights' size with the same threads, in rounds of its own. What a processor or a release does not have is left
out, with the reason.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe import cpu_int8_moe
from vllm.model_executor.layers.fused_moe.cpu_int8_native import native
from vllm.plugins import load_general_plugins

SHAPES = {"nano": (16, 64, 128, 4), "E=32, N=1280, K=4096": (32, 1280, 4096, 8)}
TOKENS = (1, 8, 64, 512)


def layer(experts: int, width: int, hidden: int):
    """What CPUInt8Experts reads of a FusedMoE layer, with random weights."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    module = torch.nn.Module()
    module.layer_name, module.activation = "benchmark", MoEActivation.SILU
    module.expert_map, module.apply_router_weight_on_input = None, False
    module.w13_bias = module.w2_bias = module.w13_input_scale = module.w2_input_scale = None
    for name, shape in (("w13", (experts, 2 * width, hidden)), ("w2", (experts, hidden, width))):
        weight = torch.randint(-127, 128, shape, dtype=torch.int8)
        scale = (torch.rand(*shape[:2], 1) + 0.5) / (73 * shape[2] ** 0.5)
        module.register_parameter(f"{name}_weight", torch.nn.Parameter(weight, requires_grad=False))
        module.register_parameter(f"{name}_weight_scale", torch.nn.Parameter(scale, requires_grad=False))
    return module


def experts_of(moe: torch.nn.Module, operators):
    """The layer's experts on the native operators, or on oneDNN where `operators` is None."""
    kept = cpu_int8_moe.native_experts
    cpu_int8_moe.native_experts = lambda: operators
    try:
        experts = cpu_int8_moe.CPUInt8Experts(moe, (moe.w13_weight_scale, moe.w2_weight_scale))
    finally:
        cpu_int8_moe.native_experts = kept
    return lambda x, w, i: experts(x, w, i, moe.w13_weight)


def onednn(moe: torch.nn.Module):
    return experts_of(copy.deepcopy(moe), None)


def bf16(moe: torch.nn.Module):
    w13, w2 = (
        (getattr(moe, f"{n}_weight").float() * getattr(moe, f"{n}_weight_scale")).bfloat16() for n in ("w13", "w2")
    )
    if not hasattr(torch.ops._C, "prepack_moe_weight"):
        return "this vLLM has no BF16 CPU experts for this processor"
    if torch.cpu._is_amx_tile_supported():
        isa = "amx"
    elif w13.shape[1] % 32 or w2.shape[1] % 32:
        return "its BF16 CPU experts do not take these widths"
    else:
        isa = "vec"
    w13, w2 = ops.cpu_prepack_moe_weight(w13, isa), ops.cpu_prepack_moe_weight(w2, isa)
    return lambda x, w, i: ops.cpu_fused_moe(x, w13, w2, None, None, w, i, "silu", isa)


def upstream_int8(moe: torch.nn.Module):
    if not torch.cpu._is_amx_tile_supported():
        return "upstream's fused_experts_cpu needs AMX, which this processor does not have"
    if not hasattr(ops, "CPUQuantMethod"):
        return "this vLLM's fused_experts_cpu is called in another way than 0.21.0's"
    pack = torch.ops._C.convert_weight_packed
    w13, w2 = pack(moe.w13_weight), pack(moe.w2_weight)
    s13, s2 = moe.w13_weight_scale.data, moe.w2_weight_scale.data
    method = ops.CPUQuantMethod.INT8_W8A8

    def run(x, w, i):
        return ops.fused_experts_cpu(x, w13, w2, w, i, False, method, s13, s2, None, None, None, True)

    return run


def measure(name: str, rounds: int, tokens: tuple[int, ...], without: list[str]) -> list[dict]:
    experts, width, hidden, top_k = SHAPES[name]
    moe = layer(experts, width, hidden)
    runs, reasons = {}, {}
    contestants = {"upstream INT8": upstream_int8, "BF16": bf16, "oneDNN": onednn}
    for kind, make in contestants.items():
        outcome = "asked for" if kind in without else make(moe)
        (reasons if isinstance(outcome, str) else runs)[kind] = outcome
    runs["native"] = experts_of(moe, native())
    memory = torch.ones(max(64 << 20, experts * width * hidden * 3) // 8, dtype=torch.int64)
    rows = []
    for count in tokens:
        times: dict[str, list[float]] = {kind: [] for kind in [*runs, "memory"]}
        touched, repeats = [], dict.fromkeys(runs, 1)
        for round_ in range(rounds + 2):
            x = torch.randn(count, hidden, dtype=torch.bfloat16)
            weights, ids = torch.rand(count, experts).topk(top_k)
            ids = ids.int()
            order = list(runs.items())[round_ % len(runs) :] + list(runs.items())[: round_ % len(runs)]
            for kind, run in order:
                start = time.perf_counter()
                for _ in range(repeats[kind]):
                    run(x, weights, ids)
                took = (time.perf_counter() - start) / repeats[kind]
                if round_ < 2:
                    repeats[kind] = max(1, int(1e-3 / took))
                else:
                    times[kind].append(took)
            touched.append(ids.unique().numel() * width * hidden * 3)
        for _ in range(rounds):
            start = time.perf_counter()
            memory.sum()
            times["memory"].append(time.perf_counter() - start)
        middle = {kind: statistics.median(t) for kind, t in times.items()}
        bandwidth = memory.numel() * 8 / middle.pop("memory")
        read = statistics.median(touched) / middle["native"]
        row = {"shape": name, "tokens": count, "us": {k: 1e6 * v for k, v in middle.items()}}
        row |= {"bandwidth": bandwidth, "of bandwidth": read / bandwidth, "left out": reasons}
        rows.append(row)
        ratios = ", ".join(f"{k} / native {v / middle['native']:.2f}x" for k, v in middle.items() if k != "native")
        print(
            f"{name}, {count} tokens: native {1e6 * middle['native']:.0f} us, {ratios}, "
            f"{100 * read / bandwidth:.0f} % of {bandwidth / 1e9:.1f} GB/s",
            flush=True,
        )
    return rows


def router(rounds: int) -> list[dict]:
    """Sigmoid, bias, top-8 of 288 renormalized: the native operator against the PyTorch it stands for."""
    rows = []
    bias = torch.rand(288)
    for count in TOKENS:
        times: dict[str, list[float]] = {"PyTorch": [], "native": []}
        for _ in range(rounds * 5):
            logits = torch.randn(count, 288)
            start = time.perf_counter()
            scores = logits.sigmoid()
            ids = torch.topk(scores + bias, k=8, dim=-1)[1]
            weights = scores.gather(1, ids)
            weights = weights / weights.sum(dim=-1, keepdim=True) * 3.0
            ids = ids.to(torch.int32)
            middle = time.perf_counter()
            native().route(logits, bias, 8, False, True, 3.0)
            times["native"].append(time.perf_counter() - middle)
            times["PyTorch"].append(middle - start)
        row = {k: 1e6 * statistics.median(v) for k, v in times.items()}
        rows.append({"shape": "router", "tokens": count, "us": row})
        print(
            f"router, {count} tokens: native {row['native']:.0f} us, PyTorch / native "
            f"{row['PyTorch'] / row['native']:.2f}x",
            flush=True,
        )
    return rows


def packing(shape: str, rounds: int) -> dict[str, str | float]:
    """GB/s at which the weights of `shape` are packed and copied, into memory that the allocator hands out. That is
    new, and the system clears it, unless it is told to keep what was freed (docs/speed-cpu.md has the variables)."""
    experts, width, hidden, _ = SHAPES[shape]
    moe = layer(experts, width, hidden)
    tensors = [
        moe.w13_weight,
        moe.w13_weight_scale.squeeze(-1),
        None,
        moe.w2_weight,
        moe.w2_weight_scale.squeeze(-1),
        None,
    ]
    took: dict[str, list[float]] = {"pack": [], "copy": []}
    for _ in range(rounds):
        for name, seconds in took.items():
            start = time.perf_counter()
            if name == "pack":
                result = native().pack(*tensors, 0, float("inf"))
            else:
                result = moe.w13_weight.clone(), moe.w2_weight.clone()
            seconds.append(time.perf_counter() - start)
            del result
    size = (moe.w13_weight.numel() + moe.w2_weight.numel()) / 1e9
    row: dict[str, str | float] = {"shape": shape}
    row |= {name: size / statistics.median(seconds) for name, seconds in took.items()}
    print(f"{shape}: packed at {row['pack']:.2f} GB/s, copied at {row['copy']:.2f} GB/s", flush=True)
    return row


def processor() -> dict:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in flags.splitlines() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "isas": list(native().isas()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--shapes", default="nano;E=32, N=1280, K=4096", help="separated by semicolons")
    parser.add_argument("--without", default="", help="contestants to leave out, separated by semicolons")
    parser.add_argument("--packing", action="store_true", help="how fast weights are packed, and no more")
    args = parser.parse_args()
    load_general_plugins()  # vllm-quark's names its own library to vLLM
    if native() is None:
        sys.exit("cpu_experts: the native operator is not built here: make env with a C++ compiler")
    torch.manual_seed(0)
    report = {"machine": processor(), "rows": []}
    print(report["machine"])
    tokens, shapes = tuple(map(int, args.tokens.split(","))), args.shapes.split(";")
    if args.packing:
        report["rows"] = [packing(shape, args.rounds) for shape in shapes]
    else:
        for shape in shapes:
            report["rows"] += measure(shape, args.rounds, tokens, args.without.split(";"))
        report["rows"] += router(args.rounds)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
