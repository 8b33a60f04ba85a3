# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Checkpoints through in_process.py, and the log-probabilities that come back."""

import json
from pathlib import Path

import torch

from examples.step3p5_nano.lab import call


def run_jobs(jobs: list[dict], folder: Path, python: str | Path, **env: str) -> list[dict]:
    """The results of `jobs` (of in_process.py, without "out") in order; files and log go to `folder`."""
    jobs = [job | {"out": str(folder / f"{i}.json")} for i, job in enumerate(jobs)]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    call(folder / "log", python, Path(__file__).with_name("in_process.py"), folder / "jobs.json", **env)
    return [json.loads(Path(job["out"]).read_text()) for job in jobs]


def read_logprobs(result: dict, vocabulary: int) -> torch.Tensor:
    """Log-probabilities [B, T - 1, V] of prompts' tokens from the second on, from a result of in_process.py."""
    tokens = [str(token) for token in range(vocabulary)]
    return torch.tensor([[[at[token] for token in tokens] for at in prompt] for prompt in result["logprobs"]])


def relative_distance(out: torch.Tensor, expected: torch.Tensor) -> float:
    """|out - expected| / |expected| of two [B, T, V] of log-probabilities, each position's mean taken off."""
    out, expected = (y - y.mean(-1, keepdim=True) for y in (out, expected))
    return ((out - expected).norm() / expected.norm()).item()
