# SPDX-License-Identifier: Apache-2.0
"""Step-3.5-Flash's layers at their real widths through vLLM's engine, depth cut to fit one GPU.

    python -m benchmarks.speed.gpu_engine all OUT.json --work /dev/shm/depth --stock SITE --series SITE
    python -m benchmarks.speed.gpu_engine shards OUT.json CHECKPOINT  loads of the ranks of one layer
    python -m benchmarks.speed.gpu_engine table OUT.json              the table in docs/speed-engine.md

One dense layer and `--moe-layers` with 288 experts, random weights. The INT8 ones are written once, in the stacked
Quark layout; its compressed-tensors twin links to them and has its own scales' shape and config. BF16 is a checkpoint
of the same shapes. `--runs` names the runs in their order; another call adds to OUT.json. Each run is a process of its
own: load time (of the weights alone, once the files lie in the page cache), peak GPU memory, prefill of 8192 tokens,
decode at batch 1, 32 and 128, medians of repeats, CUDA graphs for decode, no torch.compile. `read` is the bandwidth of
reading the same files into one buffer: the load's bound.
"""

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.speed.depth_checkpoint import EXPERTS, HIDDEN, VOCAB, WIDTH
from benchmarks.speed.depth_runs import COMPILATION, DECODE, RUNS, make_checkpoint
from benchmarks.speed.engine_speed import decode_speed, took_for

ROOT = Path(__file__).resolve().parents[2]
PREFILL = 8192


def read_bandwidth(folder: Path, files: str = "*.safetensors") -> tuple[int, float]:
    """Bytes of the weights and seconds to read them into one buffer, once they lie in the page cache."""
    buffer = memoryview(bytearray(64 << 20))
    total, took = 0, 0.0
    for file in sorted(folder.glob(files)):
        with open(file, "rb", buffering=0) as raw:
            while raw.readinto(buffer):
                pass
            raw.seek(0)
            start = time.perf_counter()
            while count := raw.readinto(buffer):
                total += count
            took += time.perf_counter() - start
    return total, took


def measure_run(args: argparse.Namespace) -> None:
    """One checkpoint through the engine of the vLLM that PYTHONPATH has first."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    import torch
    from vllm import LLM
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    total, took = read_bandwidth(args.checkpoint)
    result: dict = {"bytes": total, "read s": took, "device": torch.cuda.get_device_name()}
    load = DefaultModelLoader.load_weights

    def timed(self, *words, **more):
        torch.cuda.synchronize()
        start = time.perf_counter()
        load(self, *words, **more)
        torch.cuda.synchronize()
        result["load s"] = time.perf_counter() - start
        result["load peak bytes"] = torch.cuda.max_memory_allocated()

    DefaultModelLoader.load_weights = timed
    llm = LLM(
        str(args.checkpoint),
        skip_tokenizer_init=True,
        max_model_len=PREFILL + 256,
        max_num_batched_tokens=PREFILL,
        max_num_seqs=max(DECODE),
        enable_prefix_caching=False,
        kv_cache_memory_bytes=6 << 30,
        compilation_config=COMPILATION,
        disable_log_stats=True,
        **json.loads(args.engine),
    )
    random.seed(0)
    took_for(llm, VOCAB, 1, PREFILL, 2)
    result["prefill tokens/s"] = PREFILL / statistics.median(took_for(llm, VOCAB, 1, PREFILL, 1) for _ in range(5))
    for batch in DECODE:
        result[f"decode tokens/s, batch {batch}"] = decode_speed(llm, VOCAB, batch)
    result["peak bytes"] = torch.cuda.max_memory_allocated()
    args.out.write_text(json.dumps(result))


def measure_runs(args: argparse.Namespace) -> None:
    layers = args.moe_layers + 1
    results: dict = {"moe layers": args.moe_layers, "runs": {}}
    if args.out.exists():
        results = json.loads(args.out.read_text())
    wanted = args.runs.split(",")
    if unknown := set(wanted) - set(RUNS):
        sys.exit(f"--runs: {unknown.pop()} is none of {', '.join(RUNS)}")
    if lacking := [name for name in wanted if getattr(args, RUNS[name][1]) is None]:
        sys.exit(f"--runs: {lacking[0]} needs --{RUNS[lacking[0]][1]}")
    for i, name in enumerate(wanted):
        kind, site, engine = RUNS[name]
        checkpoint = make_checkpoint(args.work, kind, layers)
        part = args.work / "part.json"
        part.unlink(missing_ok=True)
        env = {**os.environ, "PYTHONPATH": f"{getattr(args, site)}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        log_file = args.out.with_suffix(f".{name}.log")
        with open(log_file, "w") as log:
            words = [sys.executable, "-m", "benchmarks.speed.gpu_engine", "one", checkpoint.absolute(), part.absolute()]
            words += ["--engine", json.dumps(engine)]
            process = subprocess.run(
                words, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, timeout=args.timeout
            )
        result = json.loads(part.read_text()) if part.exists() else {"failed": process.returncode}
        if backend := re.search(r"Using (\S+) \w+ MoE backend", log_file.read_text(errors="replace")):
            result["MoE backend"] = backend[1]
        results["runs"].setdefault(name, []).append(result)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        print(name, {k: round(v, 2) if isinstance(v, float) else v for k, v in result.items()}, flush=True)
        needed = {RUNS[later][0] for later in wanted[i + 1 :]}
        if not args.keep and kind not in needed and not (kind == "quark" and "compressed-tensors" in needed):
            shutil.rmtree(checkpoint)


def measure_shards(args: argparse.Namespace) -> None:
    """Seconds to load one layer's stacked experts on a rank, at once and expert by expert, and to read its files."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch
    from safetensors import safe_open
    from vllm.model_executor.layers.quantization.quark.int8 import load_stacked

    from tests.quantization.quark.utils import make_experts, parameter_name, quark_config, shard, vllm_environment

    files = [args.checkpoint / f"{stem}-1.safetensors" for stem in ("layer", "scales")]
    results = {"device": torch.cuda.get_device_name(), "ranks": {}}

    def load(layer: torch.nn.Module, at_once: bool) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for file in files:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if ".moe." not in name or "_proj" not in name:
                        continue
                    stem, _, kind = name.rpartition(".")
                    shard_id = {"gate": "w1", "up": "w3", "down": "w2"}[stem.rpartition(".")[2].removesuffix("_proj")]
                    parameter = parameter_name(shard_id, kind)
                    param, tensor = getattr(layer, parameter), opened.get_tensor(name)
                    if at_once:
                        assert load_stacked(param, tensor, parameter, shard_id)
                        continue
                    for expert, weight in enumerate(tensor):
                        param.weight_loader(param, weight, parameter, shard_id=shard_id, expert_id=expert)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    with vllm_environment():
        for tp, ep in ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 8)):
            with shard(tp - 1, tp):
                local = EXPERTS // ep
                layer = make_experts(
                    num_experts=local,
                    top_k=8,
                    hidden_size=HIDDEN,
                    intermediate_size=WIDTH,
                    params_dtype=torch.bfloat16,
                    renormalize=True,
                    quant_config=quark_config(),
                    prefix=f"model.layers.{tp}{ep}.moe.experts",
                )
                if ep > 1:
                    places = torch.full((EXPERTS,), -1, dtype=torch.int32)
                    places[-local:] = torch.arange(local, dtype=torch.int32)
                    layer._expert_map = places
                    layer._map_global_expert_id_to_local_expert_id = lambda e, places=places: int(places[e])
                seconds: dict[str, list[float]] = {"at once": [], "expert by expert": []}
                kept = []
                for at_once in (True, False) * 3:
                    for param in layer.parameters():
                        param.data.zero_()
                    seconds["at once" if at_once else "expert by expert"].append(load(layer, at_once))
                    kept.append([p.data.clone() for p in layer.parameters()] if len(kept) < 2 else None)
                assert all(torch.equal(a, b) for a, b in zip(kept[0], kept[1], strict=True))
                own = sum(p.numel() * p.element_size() for p in layer.parameters())
                read = statistics.median(read_bandwidth(args.checkpoint, "*-1.safetensors")[1] for _ in range(3))
                result = {k: statistics.median(v) for k, v in seconds.items()} | {
                    "read whole files": read,
                    "bytes": own,
                }
                results["ranks"][f"tensor parallel {tp}" if ep == 1 else f"expert parallel {ep}"] = result
                print(f"tp {tp} ep {ep}", {k: round(v, 3) for k, v in result.items()}, flush=True)
                del layer, kept, param
                torch.cuda.empty_cache()
    args.out.write_text(json.dumps(results, indent=1) + "\n")


FIGURES = ("prefill tokens/s", *(f"decode tokens/s, batch {b}" for b in DECODE))


def print_table(args: argparse.Namespace) -> None:
    runs = json.loads(args.out.read_text())["runs"]
    names = [name for name in RUNS if name in runs]
    rows = [*FIGURES, "load s", "read s", "load peak bytes", "peak bytes"]
    values = {n: {r: [run[r] for run in runs[n] if r in run] for r in rows} for n in names}
    print("| |", " | ".join(f"{n} ({len(runs[n])} runs)" for n in names), "|")
    print("|---" * (len(names) + 1) + "|")
    for row in rows:
        cells = []
        for n in names:
            middle = statistics.median(values[n][row])
            low, high = min(values[n][row]), max(values[n][row])
            cells.append(f"{middle / 1e9:.1f} GB" if "bytes" in row else f"{middle:.5g} ({low:.5g}-{high:.5g})")
        print(f"| {row} |", " | ".join(cells), "|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sub = parser.add_subparsers(required=True)
    whole = sub.add_parser("all")
    whole.add_argument("out", type=Path)
    whole.add_argument("--work", type=Path, required=True, help="an empty or new folder with 70 GB of room")
    whole.add_argument("--stock", type=Path, required=True, help="folder that holds stock vllm/")
    whole.add_argument("--series", type=Path, required=True, help="one with the series (vllm-quark shadow)")
    whole.add_argument("--sums", type=Path, help="one with patch 0016, too, for quark-sums")
    whole.add_argument("--moe-layers", type=int, default=4)
    default = "quark-series,compressed-tensors,quark-stock,bf16"
    whole.add_argument("--runs", default=default, help=f"in their order, names repeated at will (default {default})")
    whole.add_argument("--keep", action="store_true", help="leave the checkpoints in --work")
    whole.add_argument("--timeout", type=float, default=200)
    whole.set_defaults(run=measure_runs)
    part = sub.add_parser("one")
    part.add_argument("checkpoint", type=Path)
    part.add_argument("out", type=Path)
    part.add_argument("--engine", default="{}", help="more arguments of LLM, as JSON")
    part.set_defaults(run=measure_run)
    ranks = sub.add_parser("shards")
    ranks.add_argument("out", type=Path)
    ranks.add_argument("checkpoint", type=Path)
    ranks.set_defaults(run=measure_shards)
    shown = sub.add_parser("table")
    shown.add_argument("out", type=Path)
    shown.set_defaults(run=print_table)
    args = parser.parse_args()
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
