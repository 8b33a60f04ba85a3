# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Expert load balancing (EPLB) of INT8 experts over two GPUs, through the engine.

    PYTHONPATH=VLLM python -m tests.e2e.eplb CKPT [--redundant 2] [--asynchronous] [--compile] [--stdlib DIR]

Prints a JSON line: perplexities of an engine before and after at least ten rearrangements of its experts, after a
reload of another checkpoint, and after ten more, and which experts were where on the way. "right" where each is within
half a percent of what the same engine gives that does not balance: an expert computes the same everywhere, but sums
over experts are rounded in another order. With --asynchronous the reload begins while experts are on their way, and
has to end that first.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")

from tests.e2e.engines import clean
from tests.e2e.reload import other, perplexity

INTERVAL = 8
NOISE = 5e-3


def watch(worker: Any) -> None:
    """Count a worker's rearrangements."""
    state = worker.model_runner.eplb_state
    rearrange = state.rearrange
    state.counted = 0

    def count(*args, **kwargs):
        state.counted += 1
        return rearrange(*args, **kwargs)

    state.rearrange = count


def look(worker: Any) -> tuple[int, list, bool]:
    """How often a worker rearranged its experts, the expert at each place, by layer, and whether any is on its way."""
    state = worker.model_runner.eplb_state
    (model,) = state.model_states.values()
    return state.counted, model.physical_to_logical_map.tolist(), model.rebalanced


class Engine:
    """An engine on two GPUs whose ranks have experts of their own."""

    def __init__(self, ckpt: Path, windows: list[list[int]], args: argparse.Namespace, balanced: bool) -> None:
        from vllm import LLM

        self.windows = windows
        more: dict[str, Any] = {}
        if balanced:
            settings = {"window_size": INTERVAL, "step_interval": INTERVAL, "use_async": args.asynchronous}
            settings["num_redundant_experts"] = args.redundant
            more = {"enable_eplb": True, "eplb_config": settings}
        self.llm = LLM(
            str(ckpt),
            dtype="bfloat16",
            max_model_len=512,
            max_num_seqs=8,
            seed=0,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            gpu_memory_utilization=0.1,
            kv_cache_memory_bytes=64 << 20,
            tensor_parallel_size=2,
            enable_expert_parallel=True,
            enforce_eager=not args.compile,
            **more,
        )
        if balanced:
            self.llm.collective_rpc(watch)

    def perplexity(self) -> float | None:
        from vllm import SamplingParams, TokensPrompt

        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outs = self.llm.generate([TokensPrompt(prompt_token_ids=w) for w in self.windows], params, use_tqdm=False)
        values = [
            at[token].logprob
            for out in outs
            for token, at in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:], strict=True)
        ]
        return perplexity((values, []))

    def rearrange(self, times: int) -> dict[str, Any]:
        """Generate until the experts were rearranged so often; where they were."""
        from vllm import SamplingParams, TokensPrompt

        params = SamplingParams(temperature=0.8, seed=1, max_tokens=INTERVAL, ignore_eos=True, detokenize=False)
        first = self.llm.collective_rpc(look)[0][0]
        maps, count, step = [], 0, 0
        while count < times and step < 20 * times:
            prompt = TokensPrompt(prompt_token_ids=self.windows[step % len(self.windows)][step % 50 :])
            self.llm.generate([prompt], params, use_tqdm=False)
            (total, experts, is_moving), other_rank = self.llm.collective_rpc(look)
            assert experts == other_rank[1]
            count, step = total - first, step + 1
            maps.append(json.dumps(experts))
        arrangements = {"arrangements": len(set(maps)), "last": json.loads(maps[-1])[0]}
        return {"rearrangements": count, "moving": is_moving, **arrangements}

    def is_moving(self, tries: int) -> bool:
        """Whether experts are on their way after one of so many steps."""
        from vllm import SamplingParams, TokensPrompt

        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        for step in range(tries):
            self.llm.generate([TokensPrompt(prompt_token_ids=self.windows[0][step:])], params, use_tqdm=False)
            if self.llm.collective_rpc(look)[0][2]:
                return True
        return False

    def close(self) -> None:
        del self.llm
        clean()


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("ckpt", type=Path)
    ap.add_argument("--redundant", type=int, default=2)
    ap.add_argument("--times", type=int, default=10)
    ap.add_argument("--asynchronous", action="store_true")
    ap.add_argument("--compile", action="store_true", help="with torch.compile and CUDA graphs instead of eager")
    ap.add_argument("--stdlib", type=Path, help="folder with the held-out modules of Python 3.11's library")
    args = ap.parse_args()
    from examples.step3p5_nano.text import held_out_windows

    windows = [w[:300] for w in held_out_windows(args.stdlib)[:8]]
    result: dict[str, Any] = {"ckpt": args.ckpt.name, "redundant": args.redundant, "async": args.asynchronous}
    with tempfile.TemporaryDirectory() as folder:
        b = other(args.ckpt, Path(folder) / "other")
        expected = []
        for ckpt in (args.ckpt, b):
            engine = Engine(ckpt, windows, args, balanced=False)
            expected.append(engine.perplexity())
            engine.close()
        engine = Engine(args.ckpt, windows, args, balanced=True)
        steps = [("before", engine.perplexity(), expected[0], {})]
        moves = engine.rearrange(args.times)
        steps.append(("after", engine.perplexity(), expected[0], moves))
        was_moving = engine.is_moving(tries=50 if args.asynchronous else 1)
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(b)})
        steps.append(("reloaded", engine.perplexity(), expected[1], {"moving before": was_moving}))
        moves = engine.rearrange(args.times)
        steps.append(("after that", engine.perplexity(), expected[1], moves))
        engine.close()
    result["steps"] = [
        {"step": name, "perplexity": value, "not balanced": wanted, **where} for name, value, wanted, where in steps
    ]
    near = all(value is not None and abs(value / wanted - 1) <= NOISE for _, value, wanted, _ in steps)
    result["right"] = near and was_moving is args.asynchronous
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
