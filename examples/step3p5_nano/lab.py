# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""What the demo and the end-to-end tests share: checkpoints, patched vLLMs beside each other, runs."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from examples.step3p5_nano.model import evaluate, generate, load
from examples.step3p5_nano.run import PROMPT
from examples.step3p5_nano.text import BOS, held_out_windows, text_of

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
QUARK_PYTHON = ROOT / "build/quark-env/bin/python"
CPU_PATCHES = ["0004", "0005"]
# Within 2 % of the reference's perplexity, or at least three times as large.
RIGHT, GARBAGE = 0.02, 3.0


class LabError(Exception):
    """A step that failed; the text holds its last words and where the log lies."""


@dataclass(frozen=True)
class Result:
    """One row: perplexity per byte (None: NaN logits), share of equal top-1 tokens, greedy text."""

    perplexity: float | None
    agreement: float
    tokens: list[int]
    text: str

    @property
    def perplexity_text(self) -> str:
        return "NaN" if self.perplexity is None else f"{self.perplexity:.4g}"


def call(log: Path, *words: str | Path, cwd: Path = HERE, **env: str) -> None:
    """Run a command, output to `log`. Raises LabError where it fails.

    vLLM looks for a free port and binds it later: where another process took it, the command runs again.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command, environment = [str(w) for w in words], {**os.environ, **env}
    for _ in range(3):
        with open(log, "w") as f:
            result = subprocess.run(command, stdout=f, stderr=subprocess.STDOUT, cwd=cwd, env=environment)
        text = log.read_text(errors="replace")
        if not result.returncode:
            return
        if "EADDRINUSE" not in text:
            break
    last_lines = [line for line in text.splitlines() if line.strip()][-3:]
    raise LabError(f"{' '.join(str(w) for w in words[1:3])} failed ({log}):\n" + "\n".join(last_lines))


def find_port() -> int:
    """A free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def call_module(log: Path, python: str | Path, name: str, *words: str | Path, **env: str) -> None:
    """Run a module of this folder as a program, from the repository's root."""
    call(log, python, "-m", f"examples.step3p5_nano.{name}", *words, cwd=ROOT, **env)


def _is_current(file: Path, sources: list[Path]) -> bool:
    """Whether `file` is there and no older than its `sources`."""
    return file.exists() and file.stat().st_mtime >= max(s.stat().st_mtime for s in sources)


def export(out: Path, *flags: str) -> Path:
    """The nano model as AMD Quark exports it (made once for each source); `flags` of export.py."""
    if not QUARK_PYTHON.exists():
        raise LabError("AMD Quark's environment is missing: make quark-env")
    files = ("model.safetensors", "export.py", "config.json", "tokenizer_config.json")
    sources = [*(HERE / name for name in files), QUARK_PYTHON]
    config_file = out / "config.json"
    if not _is_current(config_file, sources):
        # Quark compiles an extension when first imported, with the ninja of its own environment.
        path = os.pathsep.join([str(QUARK_PYTHON.parent), os.environ["PATH"]])
        call_module(out.with_suffix(".log"), QUARK_PYTHON, "export", HERE, out.absolute(), *flags, PATH=path)
        config_file.touch()
    return out


def convert(layout: str, src: Path, out: Path) -> Path:
    """Another layout of an export: "stacked" or "compressed-tensors" (made once for each source)."""
    if not _is_current(out / "config.json", [src / "config.json", HERE / "convert.py"]):
        call_module(out.with_suffix(".log"), sys.executable, "convert", layout, src.absolute(), out.absolute())
    return out


def shadow(out: Path, only: list[str] | None) -> Path:
    """The installed vLLM with the patches `only` (None: the whole series; empty: stock)."""
    from vllm_quark.series import load_series
    from vllm_quark.shadow import make_shadow

    series = load_series(ROOT)
    return make_shadow(out, series, [p.name for p in series.patches] if only is None else only)


def make_pythonpath(vllm: Path) -> str:
    """PYTHONPATH that puts `vllm` first."""
    return os.pathsep.join([str(vllm), *filter(None, [os.environ.get("PYTHONPATH")])])


class Judge:
    """Held-out windows and what the float reference makes of them."""

    def __init__(self, windows: int = 20, tokens: int = 48, stdlib: Path | None = None):
        self.stdlib = ["--stdlib", str(stdlib.absolute())] if stdlib else []
        all_windows = held_out_windows(stdlib)
        self.windows = all_windows[:: max(1, len(all_windows) // windows)][:windows]
        self.tokens = tokens
        model = load(HERE)
        perplexity, self.top = evaluate(model, torch.tensor(self.windows))
        greedy = generate(model, [BOS, *PROMPT.encode()], tokens)
        self.reference = Result(perplexity, 1.0, greedy, text_of(greedy))

    def emulate(self, ckpt: Path, dtype: torch.dtype = torch.float32) -> Result:
        """What the INT8 numbers in `ckpt` say, by the reference's emulation of W8A8."""
        model = load(ckpt, dtype)
        perplexity, top = evaluate(model, torch.tensor(self.windows))
        greedy = generate(model, [BOS, *PROMPT.encode()], self.tokens)
        return Result(perplexity, (top == self.top).float().mean().item(), greedy, text_of(greedy))

    def run(self, ckpt: Path, vllm: Path, out: Path, *flags: str, **env: str) -> Result:
        """Serve `ckpt` with the vLLM in `vllm`; `out`: result file, its log beside it."""
        out.parent.mkdir(parents=True, exist_ok=True)
        out.unlink(missing_ok=True)
        sizes = ["--windows", str(len(self.windows)), "--tokens", str(self.tokens)]
        words: list[str | Path] = [ckpt.absolute(), "--out", out.absolute(), *sizes, *self.stdlib, *flags]
        call_module(out.with_suffix(".log"), sys.executable, "run", *words, PYTHONPATH=make_pythonpath(vllm), **env)
        served = json.loads(out.read_text())
        agreement = (torch.tensor(served["top"]) == self.top).float().mean().item()
        return Result(served["perplexity"], agreement, served["tokens"], served["text"])

    def gaps(self, ckpt: Path, texts: list[list[int]], other_texts: list[list[int]]) -> list[float]:
        """`gap` of each pair of greedy texts after the windows' first halves, of those that part, sorted."""
        model = load(ckpt)
        halves = [w[: len(w) // 2] for w in self.windows]
        gaps = [gap(model, prompt, a, b) for prompt, a, b in zip(halves, texts, other_texts, strict=True)]
        return sorted(g for g in gaps if g is not None)


def gap(model: torch.nn.Module, prompt: list[int], tokens: list[int], other_tokens: list[int]) -> float | None:
    """Where two texts part, the tokens' difference in log-probability (nats) by `model`; None where they do not."""
    split = next((i for i, (a, b) in enumerate(zip(tokens, other_tokens, strict=True)) if a != b), None)
    if split is None:
        return None
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *tokens[:split]]]))[0, -1]
    return abs(logits[tokens[split]] - logits[other_tokens[split]]).item()


def make_checkpoints(out: Path) -> dict[str, Path]:
    """Every export and layout below `out`, by name."""
    folders = {}
    folders["quark-mtp"] = export(out / "quark-mtp", "--mtp")
    for name, flags in (("", []), ("-all", ["--all-linear"])):
        folders[f"quark{name}"] = src = export(out / f"quark{name}", *flags)
        for layout in ("stacked", "compressed-tensors"):
            folders[f"{layout}{name}"] = convert(layout, src, out / f"{layout}{name}")
    return folders
