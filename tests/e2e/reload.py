# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Weights that come into an engine in other ways than once, from a checkpoint's files.

    PYTHONPATH=VLLM python -m tests.e2e.reload CKPT_A [CKPT_B] [--cases reload dummy ...] [--compile] [--stdlib DIR]

CKPT_B has other weights of the same model; without one it is made from CKPT_A. Prints a JSON line per case: "right"
where every answer is that of a fresh engine on the checkpoint last loaded (with --compile: has its perplexity), with
the largest "gap" between log-probabilities of prompt tokens (0 on CPU) and the perplexities of both, or "error", its
"type" and the "file" that raised it.
"""

import argparse
import contextlib
import json
import math
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.e2e.engines import answer, engine

Answer = tuple[list[float], list[int]]
# Between log-probabilities of the same weights. Other weights are tenths apart.
NOISE = 1e-3
# Between perplexities of the same weights in compiled engines, whose kernels are chosen by timing them: on stock, too,
# single tokens of two such engines are tenths apart (0.33.0, H200). Other weights are 5 % apart.
COMPILED_NOISE = 5e-3


def other(src: Path, dst: Path) -> Path:
    """A checkpoint whose matrices all differ from those of `src`, in INT8 values and in scales."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(src, dst)
    tensors = load_file(dst / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("weight_scale"):
            steps = torch.arange(tensor.shape[-1], dtype=torch.float32)
            tensors[name] = tensor * (1 + 0.2 * torch.sin(steps))
        elif tensor.dtype == torch.int8:
            tensor[..., ::8] //= 2
        elif name.endswith("proj.weight"):
            tensors[name] = (tensor.float() * 0.97).to(tensor.dtype)
    (dst / "model.safetensors").unlink()
    save_file({k: v.contiguous() for k, v in tensors.items()}, dst / "model.safetensors", {"format": "pt"})
    return dst


def perplexity(served: Answer) -> float | None:
    mean = -sum(served[0]) / len(served[0])
    return round(math.exp(min(mean, 700)), 4) if math.isfinite(mean) else None


class Cases:
    """Each method is a case: it yields, step by step, an engine's answer and the one it has to give."""

    def __init__(self, a: Path, b: Path, settings: dict[str, Any], folder: Path, stdlib: Path | None = None):
        from examples.step3p5_nano.text import held_out_windows

        self.ids = [w[:200] for w in held_out_windows(stdlib)[:6]]
        self.a, self.b, self.folder = a, b, folder
        self.settings = settings
        self.fresh: dict[Path, Answer] = {}

    def engine(self, ckpt: Path, **settings):
        from vllm.model_executor.layers import rotary_embedding

        # Engines share them, and a reload (of 0.21) turns their tables into weights, which dummy weights fill.
        rotary_embedding._ROPE_DICT.clear()
        return engine(ckpt, **self.settings, **settings)

    def answer(self, llm) -> Answer:
        return answer(llm, self.ids, tokens=32)

    def of(self, ckpt: Path) -> Answer:
        if ckpt not in self.fresh:
            with self.engine(ckpt) as llm:
                self.fresh[ckpt] = self.answer(llm)
                del llm
        return self.fresh[ckpt]

    def reload(self) -> Iterator[tuple[Answer, Answer]]:
        """From one checkpoint to the other and back."""
        expected = self.of(self.a), self.of(self.b)
        with self.engine(self.a) as llm:
            yield self.answer(llm), expected[0]
            for ckpt, fresh in ((self.b, expected[1]), (self.a, expected[0])):
                llm.collective_rpc("reload_weights", kwargs={"weights_path": str(ckpt)})
                yield self.answer(llm), fresh
            del llm

    def again(self) -> Iterator[tuple[Answer, Answer]]:
        """A reload that stops in the middle, and the next one."""
        expected = self.of(self.b)
        with self.engine(self.a) as llm:
            with contextlib.suppress(ConnectionError):
                llm.collective_rpc("reload_weights", kwargs={"weights_iterator": half(self.b)})
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(self.b)})
            yield self.answer(llm), expected
            del llm

    def dummy(self) -> Iterator[tuple[Answer, Answer]]:
        """Dummy weights answer, and real ones take their place."""
        expected = self.of(self.b)
        with self.engine(self.a, load_format="dummy") as llm:
            served = self.answer(llm)
            yield served, served  # any answer
            llm.collective_rpc("update_config", args=({"load_config": {"load_format": "auto"}},))
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(self.b)})
            yield self.answer(llm), expected
            del llm

    def sharded_state(self) -> Iterator[tuple[Answer, Answer]]:
        """What vLLM saved of its workers' state, loaded again."""
        expected = self.of(self.a)
        state = self.folder / "state"
        shutil.copytree(self.a, state, ignore=shutil.ignore_patterns("*.safetensors*"))
        with self.engine(self.a) as llm:
            llm.collective_rpc("save_sharded_state", kwargs={"path": str(state)})
            del llm
        with self.engine(state, load_format="sharded_state") as llm:
            yield self.answer(llm), expected
            del llm

    def sleep(self) -> Iterator[tuple[Answer, Answer]]:
        """Level 1 keeps the weights, level 2 drops them and is followed by a reload. On GPUs only."""
        expected = self.of(self.a), self.of(self.b)
        with self.engine(self.a, enable_sleep_mode=True) as llm:
            yield self.answer(llm), expected[0]
            llm.sleep(level=1)
            llm.wake_up()
            yield self.answer(llm), expected[0]
            for ckpt, fresh in ((self.b, expected[1]), (self.a, expected[0])):
                llm.sleep(level=2)
                llm.wake_up(tags=["weights"])
                llm.collective_rpc("reload_weights", kwargs={"weights_path": str(ckpt)})
                llm.wake_up(tags=["kv_cache"])
                yield self.answer(llm), fresh
            del llm


def half(ckpt: Path) -> Iterator:
    """The first half of a checkpoint's tensors, then an error."""
    from safetensors.torch import load_file

    tensors = load_file(ckpt / "model.safetensors")
    yield from list(tensors.items())[: len(tensors) // 2]
    raise ConnectionError("the weights' source is gone")


def judge(case: Callable[[], Iterator[tuple[Answer, Answer]]], compiled: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    verdict: dict[str, Any] = {"case": case.__name__, "steps": steps}
    try:
        for served, expected in case():
            gaps = [abs(x - y) for x, y in zip(served[0], expected[0], strict=True)]
            figures = perplexity(served), perplexity(expected)
            if compiled:
                right = None not in figures and abs(figures[0] / figures[1] - 1) <= COMPILED_NOISE
            else:
                right = all(gap <= NOISE for gap in gaps) and served[1] == expected[1]
            steps.append(
                {
                    "right": right,
                    "gap": max(gaps) if all(map(math.isfinite, gaps)) else None,
                    "perplexity": figures[0],
                    "expected": figures[1],
                }
            )
    except Exception as e:
        frame = traceback.extract_tb(e.__traceback__)[-1]
        verdict |= {"error": str(e), "type": type(e).__name__, "file": frame.filename, "line": frame.lineno}
    return {**verdict, "right": "error" not in verdict and all(s["right"] for s in steps)}


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("a", type=Path, metavar="CKPT_A")
    ap.add_argument("b", type=Path, nargs="?", metavar="CKPT_B")
    every = ["reload", "again", "dummy", "sharded_state", "sleep"]
    ap.add_argument("--cases", nargs="+", choices=every, help="default: all that this platform has")
    ap.add_argument("--compile", action="store_true", help="with torch.compile and CUDA graphs instead of eager")
    ap.add_argument("--stdlib", type=Path, help="folder with the held-out modules of Python 3.11's library")
    args = ap.parse_args()
    import torch

    if args.cases is None:
        args.cases = every if torch.cuda.is_available() else every[:-1]
    with tempfile.TemporaryDirectory() as folder:
        b = args.b or other(args.a, Path(folder) / "other")
        cases = Cases(args.a, b, {"enforce_eager": not args.compile}, Path(folder), args.stdlib)
        for name in args.cases:
            print(json.dumps(judge(getattr(cases, name), args.compile)), flush=True)


if __name__ == "__main__":
    main()
