# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Serve a nano checkpoint with the vLLM on PYTHONPATH and judge it on held-out text.

    python -m examples.step3p5_nano.run CKPT --out RESULT.json [--windows 20] [--tokens 48]
        [--tp 1] [--pp 1] [--ep] [--speculate 1]

Writes perplexity per byte, the top-1 token at every position and a greedy continuation. NaN logits
make the perplexity infinite: that, too, is a result.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from examples.step3p5_nano.text import BOS, held_out_windows, text_of  # noqa: E402

PROMPT = "class Stack:\n    def __init__(self"


def count_drafts(llm: Any) -> tuple[float, float]:
    """Draft tokens proposed and accepted so far."""
    metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    drafted, accepted = (metrics.get(f"vllm:spec_decode_num_{kind}_tokens", 0) for kind in ("draft", "accepted"))
    return drafted, accepted


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("ckpt")
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--windows", type=int, default=20)
    ap.add_argument("--tokens", type=int, default=48)
    ap.add_argument("--dtype", default="bfloat16")
    ap.add_argument("--tp", type=int, default=1)
    ap.add_argument("--stdlib", type=Path, default=None, help="folder with the library's sources")
    ap.add_argument("--pp", type=int, default=1)
    ap.add_argument("--ep", action="store_true", help="expert parallel over the tensor-parallel ranks")
    ap.add_argument("--speculate", type=int, default=0, help="tokens that the MTP layers draft at a time")
    ap.add_argument("--compile", action="store_true", help="with torch.compile instead of eager")
    args = ap.parse_args()
    import torch
    from vllm import LLM, SamplingParams, TokensPrompt

    # On a GPU a fixed, small cache: runs beside each other do not disturb each other's profiling.
    settings: dict[str, Any] = (
        {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30} if torch.cuda.is_available() else {}
    )
    if args.speculate:
        settings["speculative_config"] = {"method": "mtp", "num_speculative_tokens": args.speculate}
    start = time.time()
    llm: Any = LLM(
        args.ckpt,
        dtype=args.dtype,
        enforce_eager=not args.compile,
        max_model_len=1024,
        max_num_seqs=8,
        tensor_parallel_size=args.tp,
        pipeline_parallel_size=args.pp,
        enable_expert_parallel=args.ep,
        seed=0,
        disable_log_stats=False,
        **settings,
    )
    load_seconds = time.time() - start
    windows = held_out_windows(args.stdlib)
    windows = windows[:: max(1, len(windows) // args.windows)][: args.windows]
    scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    loss, count, nan_count, top = 0.0, 0, 0, []
    for result in llm.generate([TokensPrompt(prompt_token_ids=w) for w in windows], scoring, use_tqdm=False):
        top_tokens = []
        for token, position in zip(result.prompt_token_ids[1:], result.prompt_logprobs[1:], strict=True):
            value = position[token].logprob
            loss, count = loss - value, count + 1
            nan_count += not math.isfinite(value)
            top_tokens.append(next((t for t, p in position.items() if p.rank == 1), token))
        top.append(top_tokens)
    greedy = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True, logprobs=1)
    prompt = [BOS, *PROMPT.encode()]
    out = llm.generate([TokensPrompt(prompt_token_ids=prompt)], greedy, use_tqdm=False)[0].outputs[0]
    # Greedy continuations of the windows' first halves: many prompts, so that an acceptance rate says something.
    halves = [TokensPrompt(prompt_token_ids=w[: len(w) // 2]) for w in windows]
    earlier = count_drafts(llm)
    continuing = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    outputs = llm.generate(halves, continuing, use_tqdm=False)
    drafted, accepted = (a - b for a, b in zip(count_drafts(llm), earlier, strict=True))
    result = {
        "ckpt": args.ckpt,
        "perplexity": math.exp(min(loss / count, 700)) if not nan_count else None,
        "nan_positions": nan_count,
        "top": top,
        "tokens": list(out.token_ids),
        "continuations": [list(o.outputs[0].token_ids) for o in outputs],
        "drafted": drafted,
        "accepted": accepted,
        "text": text_of(list(out.token_ids)),
        "load_s": load_seconds,
        "total_s": time.time() - start,
    }
    unfinished = args.out.with_suffix(".new")
    unfinished.write_text(json.dumps(result))
    unfinished.rename(args.out)


if __name__ == "__main__":
    main()
