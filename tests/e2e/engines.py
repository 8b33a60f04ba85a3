# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Engines one after the other in this process, and what each leaves behind.

    PYTHONPATH=VLLM python engines.py CKPT [CKPT ...] [--count 20]

Prints a JSON line an engine: memory in MB after it had answered and was deleted and collected. Ends with code 1 at the
first engine after which the process holds 3 % more, or 1 MB more on the GPU, than after the second: what the first two
bring, libraries and caches, may stay.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

KV_CACHE = 64 << 20
# Of every engine of these tests, here and in in_process.py.
SETTINGS = {"dtype": "bfloat16", "max_model_len": 256, "max_num_seqs": 8, "seed": 0, "skip_tokenizer_init": True}


@contextlib.contextmanager
def engine(ckpt: Path | str, **settings) -> Iterator:
    """An `LLM` in this process, gone afterwards as far as vLLM lets it go."""
    # It would be a GiB at least.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    from vllm import LLM
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    llm = None
    try:
        # GPUs are shared with whatever else runs there.
        settings = {"enforce_eager": True, "gpu_memory_utilization": 0.1, **settings}
        llm = LLM(
            str(ckpt),
            **SETTINGS,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=KV_CACHE,
            distributed_executor_backend=UniProcExecutor,
            **settings,
        )
        yield llm
    finally:
        del llm
        clean()


def clean() -> None:
    """Collect what a deleted engine leaves behind."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def answer(llm, ids: list[list[int]], tokens: int = 8) -> tuple[list[float], list[int]]:
    """Log-probability of each prompt token after the first, and the greedy tokens after the first prompt."""
    from vllm import SamplingParams, TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=i) for i in ids]
    judge = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    answers = [
        at[token].logprob
        for out in llm.generate(prompts, judge, use_tqdm=False)
        for token, at in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:], strict=True)
    ]
    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    out = llm.generate(prompts[:1], greedy, use_tqdm=False)[0].outputs[0]
    return answers, list(out.token_ids)


def measure_memory() -> dict[str, float]:
    """MB: resident, and allocated on the GPU where there is one."""
    import torch

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    sizes = {"resident": pages * os.sysconf("SC_PAGE_SIZE") / 1e6}
    if torch.cuda.is_available():
        sizes["gpu"] = torch.cuda.memory_allocated() / 1e6
    return {kind: round(value, 1) for kind, value in sizes.items()}


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("ckpts", nargs="+", type=Path, help="checkpoints, served in turns")
    ap.add_argument("--count", type=int, default=20, help="engines in all")
    args = ap.parse_args()
    ids = [[i % 256 for i in range(128)]]
    second: dict[str, float] = {}
    for i in range(args.count):
        ckpt = args.ckpts[i % len(args.ckpts)]
        with engine(ckpt) as llm:
            answer(llm, ids)
            del llm
        sizes = measure_memory()
        print(json.dumps({"engine": i + 1, "ckpt": ckpt.name, **sizes}), flush=True)
        if i < 2:
            second = sizes
        for kind, allowed in (("resident", 0.03 * second["resident"]), ("gpu", 1.0)):
            if sizes.get(kind, 0) - second.get(kind, 0) > allowed:
                rise = f"{kind} memory rose from {second[kind]} MB to {sizes[kind]} MB in {i - 1} engines"
                print(json.dumps({"excess": rise}), flush=True)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
