# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Cells of architecture and variant: made, run through the engine, judged."""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from examples.step3p5_nano.lab import make_pythonpath
from tests.e2e.jobs import read_logprobs

from .architectures import ARCHITECTURES, VOCABULARY
from .export import ADAPTER, export, save
from .variants import VARIANTS

IN_PROCESS = Path(__file__).parents[1] / "in_process.py"
# What the yardstick may be exceeded by, and what is left for layers whose BF16 error is nearly none.
FACTOR, FLOOR = 1.5, 0.01
# The variant that is not quantized: whether vLLM itself serves the architecture right.
BF16 = "bf16"
Cell = tuple[str, str]


@dataclass(frozen=True)
class Verdict:
    """what: "right", "wrong", "refused" (by the Quark INT8 code), "stops" (anywhere else) or "dies".

    distance: the median over positions of |p - exact| / |exact|, centred log-probabilities; yardstick: that of the
    emulation in BF16. said: the error, and file the last one in its traceback.
    """

    what: str
    distance: float | None = None
    yardstick: float | None = None
    said: str = ""
    file: str = ""


def cells() -> list[Cell]:
    """Every architecture with every variant that means something for it."""
    return [
        (name, variant)
        for name, architecture in ARCHITECTURES.items()
        for variant in (BF16, *VARIANTS)
        if variant == BF16 or VARIANTS[variant].fits(architecture.is_moe, bool(architecture.text))
    ]


def make(cell: Cell, folder: Path) -> Path:
    """The checkpoint of a cell below `folder`, made once."""
    import transformers

    name, variant = cell
    source, out = folder / name / BF16, folder / name / variant
    if not (out / "expected.json").exists():
        warnings.filterwarnings("ignore")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if not (source / "expected.json").exists():
            with _complete_folder(source) as unfinished:
                save(ARCHITECTURES[name], unfinished)
        if variant != BF16:
            with _complete_folder(out) as unfinished:
                export(ARCHITECTURES[name], VARIANTS[variant], source, unfinished)
    return out


@contextlib.contextmanager
def _complete_folder(folder: Path) -> Iterator[Path]:
    """A new folder that becomes `folder` once it is complete."""
    unfinished = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def run(checkpoints: Iterable[Path], results: Path, vllm: str, at_once: int = 12, patience: int = 900) -> None:
    """Serve each checkpoint with the vLLM on the path `vllm`; `results`/ARCHITECTURE-VARIANT.json.

    Several in a process, one after the other; one that ends the process is noted, and the next goes on.
    """
    results.mkdir(parents=True, exist_ok=True)
    jobs = []
    for folder in checkpoints:
        out = results / f"{folder.parent.name}-{folder.name}.json"
        if not out.exists():
            ids = json.loads((folder / "expected.json").read_text())["ids"]
            job = {"ckpt": str(folder), "out": str(out), "ids": ids, "logprobs": VOCABULARY, "tokens": 4}
            if ARCHITECTURES[folder.parent.name].text:
                job["options"] = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
            if (folder / ADAPTER).is_dir():
                job["adapter"] = str(folder / ADAPTER)
            jobs.append(job)
    while jobs:
        batch, log = results / "jobs.json", results / "log"
        batch.write_text(json.dumps(jobs[:at_once]))
        env = {**os.environ, "PYTHONPATH": make_pythonpath(Path(vllm))}
        timeout = ""
        with open(log, "w") as f:
            try:
                subprocess.run([sys.executable, IN_PROCESS, batch], stdout=f, stderr=f, env=env, timeout=patience)
            except subprocess.TimeoutExpired:
                timeout = f"no answer within {patience} s"
        remaining = [job for job in jobs if not Path(job["out"]).exists()]
        if any(job in remaining for job in jobs[:at_once]):
            last_line = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
            died = {"error": timeout or "".join(last_line), "type": "died", "file": ""}
            Path(remaining[0]["out"]).write_text(json.dumps(died))
            remaining = remaining[1:]
        jobs = remaining


def judge(checkpoint: Path, result: Path) -> Verdict:
    """What came of a checkpoint."""
    served, expected = json.loads(result.read_text()), json.loads((checkpoint / "expected.json").read_text())
    if "error" in served:
        message, file = served["error"], served["file"]
        if served["type"] == "died":
            return Verdict("dies", said=message)
        # What is said when the config is made comes out of pydantic.
        _, _, config_message = message.partition("Value error, ")
        if "/quantization/quark/int8/" in served["origin"]:
            return Verdict("refused", said=config_message.partition(" [type=")[0] or message)
        return Verdict("stops", said=f"{served['type']}: {message}", file=file)
    out = read_logprobs(served, VOCABULARY)
    exact, bf16 = (torch.tensor(expected[reading])[:, :-1] for reading in ("exact", "bf16"))
    distance, yardstick = measure(out, exact), measure(bf16, exact)
    right = math.isfinite(distance) and distance <= FACTOR * yardstick + FLOOR
    return Verdict("right" if right else "wrong", distance, yardstick)


def measure(out: torch.Tensor, exact: torch.Tensor) -> float:
    """Median over positions of the relative distance of two [B, T, V] of log-probabilities.

    The median, since an expert chosen otherwise at a near tie says nothing about the others.
    """
    out, exact = (x - x.mean(-1, keepdim=True) for x in (out, exact))
    return ((out - exact).norm(dim=-1) / exact.norm(dim=-1)).flatten().median().item()
