# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Perplexity of nano checkpoints on held-out text through `LLM`, in this Python's vLLM.

    PYTHONPATH=VLLM python -m benchmarks.compatibility.nano_engine CKPT [CKPT ...] --out RESULT.json
        [--compile] [--tp 2] [--windows 20]

RESULT.json is {checkpoint's name: perplexity, null where logits were NaN}.
"""

import argparse
import gc
import json
import math
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from benchmarks.pages import write_file
from examples.step3p5_nano.text import held_out_windows


def perplexity(ckpt: Path, windows: list[list[int]], compiled: bool, ranks: int) -> float | None:
    """Of the tokens of `windows` after each one's first; None where a logit is NaN."""
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        str(ckpt),
        dtype="bfloat16",
        enforce_eager=not compiled,
        max_model_len=1024,
        max_num_seqs=8,
        seed=0,
        tensor_parallel_size=ranks,
    )
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    losses = [
        -at[token].logprob
        for out in llm.generate([TokensPrompt(prompt_token_ids=w) for w in windows], params, use_tqdm=False)
        for token, at in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:], strict=True)
    ]
    mean = sum(losses) / len(losses)
    return math.exp(mean) if math.isfinite(mean) and mean < 700 else None


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("ckpts", nargs="+", type=Path)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--compile", action="store_true", help="with torch.compile, vLLM's default")
    ap.add_argument("--tp", type=int, default=1, help="ranks of tensor parallelism")
    ap.add_argument("--windows", type=int, default=20)
    args = ap.parse_args()
    every = held_out_windows()
    windows = every[:: max(1, len(every) // args.windows)][: args.windows]
    perplexities = {}
    for ckpt in args.ckpts:
        perplexities[ckpt.name] = perplexity(ckpt, windows, args.compile, args.tp)
        print(ckpt.name, perplexities[ckpt.name], flush=True)
        gc.collect()
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
    write_file(args.out, json.dumps(perplexities))


if __name__ == "__main__":
    main()
