# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Speculative decoding with the MTP layers, and tensor, expert, pipeline and data parallelism, of the nano model:
the tables in docs/parallel.md.

    PYTHONPATH=SITE python -m benchmarks.correctness.gpu_parallel --ckpts DIR [--stdlib DIR] [--out DIR]

Compares greedy continuations, of the halves of the held-out windows, with one GPU's without speculation.
"""

import argparse
import json
import math
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from examples.step3p5_nano.lab import Judge, LabError, find_port, shadow
from examples.step3p5_nano.model import acceptance, load

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "examples/step3p5_nano"

SPECULATE = ("bf16", "quark", "quark-mtp", "quark-all")
PARALLEL = {
    "tensor parallel 2": ["--tp", "2"],
    "expert parallel 2": ["--tp", "2", "--ep"],
    "pipeline 2": ["--pp", "2"],
    "tensor parallel 4": ["--tp", "4"],
}
# Two processes, each with requests of its own; experts are parted over both, by width or by number.
DATA_PARALLEL: dict[str, list[str]] = {"data parallel 2": [], "data and expert parallel 2": ["--ep"]}


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--ckpts", type=Path, required=True)
    ap.add_argument("--stdlib", type=Path, default=None, help="folder with the held-out modules")
    ap.add_argument("--out", type=Path, default=ROOT / "build/gpu-parallel")
    ap.add_argument("--jobs", type=int, default=5)
    ap.add_argument("--drafts", type=int, nargs="*", default=[0, 1], help="tokens drafted at a time")
    args = ap.parse_args()
    import torch
    import vllm

    gpus = torch.cuda.device_count()
    print(f"{gpus} x {torch.cuda.get_device_name()}, vLLM {vllm.__version__}, torch {torch.__version__}", flush=True)
    series = shadow(Path(tempfile.mkdtemp(prefix="vllm-quark-")) / "series", None)
    judge = Judge(stdlib=args.stdlib)

    def run(name: str, ckpt: str, *flags: str, **env: str) -> dict:
        folder = NANO if ckpt == "bf16" else args.ckpts.absolute() / ckpt
        out = args.out / f"{ckpt}-{name.replace(' ', '-')}.json"
        try:
            judge.run(folder, series, out, *flags, **env)
        except LabError as e:
            return {"error": str(e).splitlines()[-1][:160]}
        return json.loads(out.read_text())

    def run_ranks(name: str, ckpt: str, *flags: str) -> dict:
        """The worse of two data-parallel ranks that serve the same prompts."""
        shared = {"VLLM_DP_SIZE": "2", "VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_MASTER_PORT": str(find_port())}
        ranks = [shared | {"VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank)} for rank in range(2)]
        with ThreadPoolExecutor(2) as workers:
            jobs = [workers.submit(run, f"{name} {r['VLLM_DP_RANK']}", ckpt, *flags, **r) for r in ranks]
            results = [job.result() for job in jobs]
        failed = next((r for r in results if "error" in r), None)
        return failed or max(results, key=lambda r: r["perplexity"] or math.inf)

    windows = torch.tensor(judge.windows)
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {(c, n): pool.submit(run, f"mtp {n}", c, "--speculate", str(n)) for c in SPECULATE for n in args.drafts}
        parallel = {
            (c, name): pool.submit(run, name, c, *flags)
            for name, flags in PARALLEL.items()
            if int(flags[1]) <= gpus
            for c in ("quark", "stacked", "quark-all")
        }
        parallel |= {
            (c, name): pool.submit(run_ranks, name, c, *flags)
            for name, flags in DATA_PARALLEL.items()
            if gpus > 1
            for c in ("quark", "stacked", "quark-all")
        }
        parallel |= {(c, "one GPU"): pool.submit(run, "one", c) for c in ("stacked",) if parallel}
        print(f"float reference: {acceptance(load(NANO), windows):.1%} of the first MTP layer's tokens agree")

        def count_same(result: dict, baseline: dict) -> str:
            pairs = list(zip(result["continuations"], baseline["continuations"], strict=True))
            texts = sum(a == b for a, b in pairs)
            tokens = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=True))
            return f"{texts} of {len(pairs)} texts, {tokens} of {sum(len(a) for a, _ in pairs)} tokens"

        print("\n| checkpoint | drafted at a time | perplexity | accepted | same as without |\n|---|---|---|---|---|")
        for (ckpt, count), future in runs.items():
            result, baseline = future.result(), runs[ckpt, 0].result()
            if "error" in result:
                print(f"| {ckpt} | {count} | fails: {result['error']} | | |")
                continue
            drafted, accepted = result["drafted"], result["accepted"]
            rate = f"{accepted / drafted:.1%} of {drafted:.0f}" if drafted else ""
            same = count_same(result, baseline)
            print(f"| {ckpt} | {count} | {result['perplexity']:.4f} | {rate} | {same} |", flush=True)
        if parallel:
            print("\n| checkpoint | how | perplexity | same as on one |\n|---|---|---|---|")
        for (ckpt, name), future in parallel.items():
            result = future.result()
            baseline = (parallel[ckpt, "one GPU"] if ckpt == "stacked" else runs[ckpt, 0]).result()
            if "error" in result:
                print(f"| {ckpt} | {name} | fails: {result['error']} | |")
            else:
                same = count_same(result, baseline)
                print(f"| {ckpt} | {name} | {result['perplexity']:.4f} | {same} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
