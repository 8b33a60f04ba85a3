# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of an engine in this process, on a GPU or on CPU."""

import random
import statistics
import time

STEPS = 128


def took_for(llm, vocabulary: int, batch: int, prompt: int, out: int) -> float:
    """Seconds to generate `out` tokens for each of `batch` random prompts of `prompt` tokens."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": random.choices(range(2, vocabulary), k=prompt)} for _ in range(batch)]
    params = SamplingParams(temperature=0.0, max_tokens=out, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start


def decode_speed(llm, vocabulary: int, batch: int, prompt: int = 32, steps: int = STEPS, repeats: int = 5) -> float:
    """Tokens per second over `steps` steps after `prompt` tokens, the median of `repeats` runs."""
    took_for(llm, vocabulary, batch, prompt, 4)
    runs = [
        took_for(llm, vocabulary, batch, prompt, steps + 1) - took_for(llm, vocabulary, batch, prompt, 1)
        for _ in range(repeats)
    ]
    return batch * steps / statistics.median(runs)
