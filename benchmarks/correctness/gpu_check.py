# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Nano checkpoints through the engine and the layer tests, on a GPU: the tables in docs/results.md.

    PYTHONPATH=SITE python -m benchmarks.correctness.gpu_check --ckpts DIR [--stdlib DIR] [--out DIR]

DIR of --ckpts holds what `make ckpts` writes (quark, stacked, quark-all, compressed-tensors, …).
Everything runs beside each other, so no time here means anything.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from examples.step3p5_nano.lab import Judge, LabError, Result, make_pythonpath, shadow

ROOT = Path(__file__).resolve().parents[2]

ENGINE = {  # name of the vLLM: checkpoints
    "stock": ["quark", "stacked", "quark-all", "compressed-tensors"],
    "0001 only": ["quark", "compressed-tensors"],
    "series": ["quark", "stacked", "quark-all", "stacked-all", "compressed-tensors", "compressed-tensors-all"],
}
TRITON = ("series, Triton linear", "quark-all")
LAYERS = ["stock", "series"]


def patches_of(name: str) -> list[str] | None:
    if name == "series":
        return None
    if name == "stock":
        return []
    return [name.split()[0]]


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--ckpts", type=Path, required=True)
    ap.add_argument("--stdlib", type=Path, default=None, help="folder with the held-out modules")
    ap.add_argument("--out", type=Path, default=ROOT / "build/gpu")
    ap.add_argument("--jobs", type=int, default=5)
    ap.add_argument("--engines-only", action="store_true", help="no layer tests")
    args = ap.parse_args()
    import torch
    import vllm

    print(
        f"{torch.cuda.get_device_name()}, vLLM {vllm.__version__}, torch {torch.__version__}, "
        f"triton {__import__('triton').__version__}, Python {sys.version.split()[0]}",
        flush=True,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(prefix="vllm-quark-"))
    trees = {n: shadow(temp / n.replace(" ", "-"), patches_of(n)) for n in {*ENGINE, *LAYERS}}
    judge = Judge(stdlib=args.stdlib)

    def run_engine(name: str, ckpt: str, **env: str) -> Result | str:
        try:
            out = args.out / f"{trees[name].name}-{ckpt}{'-triton' if env else ''}.json"
            return judge.run(args.ckpts.absolute() / ckpt, trees[name], out, **env)
        except LabError as e:
            return str(e).splitlines()[-1][:160]

    def run_layers(name: str) -> tuple[str, list[str]]:
        log = args.out / f"layers-{trees[name].name}.log"
        with open(log, "w") as f:
            subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/quantization/quark"],
                cwd=ROOT,
                stdout=f,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": make_pythonpath(trees[name])},
            )
        text = log.read_text()
        summary = re.findall(r"^.*\b(?:passed|failed|error).* in .*$", text, re.M)
        return summary[-1] if summary else "did not run", re.findall(r"^(?:FAILED|ERROR) \S+/(\S+)", text, re.M)

    with ThreadPoolExecutor(args.jobs) as pool:
        runs: dict[tuple[str, str], Future] = {}
        for name, ckpts in ENGINE.items():
            for ckpt in ckpts:
                runs[name, ckpt] = pool.submit(run_engine, name, ckpt)
        disabled = "CutlassInt8ScaledMMLinearKernel"
        runs[TRITON] = pool.submit(run_engine, "series", TRITON[1], VLLM_DISABLED_KERNELS=disabled)
        tests = {name: pool.submit(run_layers, name) for name in LAYERS if not args.engines_only}
        emulated = {c: judge.emulate(args.ckpts / c) for c in ("quark", "quark-all")}
    table = {"reference BF16": vars(judge.reference), **{f"emulation {c}": vars(r) for c, r in emulated.items()}}
    print(f"\n| {'vLLM':9} | {'checkpoint':22} | perplexity | top-1 | text |\n|---|---|---|---|---|")
    references = {"float reference": judge.reference} | {f"W8A8 emulation, {c}": r for c, r in emulated.items()}
    for name, result in references.items():
        print(f"| {name} | | {result.perplexity_text} | {result.agreement:.1%} | `{result.text!r}` |")
    for (name, ckpt), future in runs.items():
        result = future.result()
        if isinstance(result, str):
            print(f"| {name:9} | {ckpt:22} | fails: {result} | | |")
        else:
            print(f"| {name:9} | {ckpt:22} | {result.perplexity_text} | {result.agreement:.1%} | `{result.text!r}` |")
            table[f"{name} {ckpt}"] = vars(result)
    if tests:
        print("\n| vLLM | tests/quantization/quark |\n|---|---|")
    for name, future in tests.items():
        summary, failed = future.result()
        print(f"| {name} | {summary.strip('= ')} |")
        table[f"layers {name}"] = failed
    (args.out / "results.json").write_text(json.dumps(table, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
