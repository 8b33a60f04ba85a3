# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The main job: an AMD Quark INT8 checkpoint in vLLM 0.21.0, before and after the series, on CPU."""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples.step3p5_nano.lab import (
    CPU_PATCHES,
    GARBAGE,
    RIGHT,
    ROOT,
    Judge,
    LabError,
    Result,
    convert,
    export,
    shadow,
)

console = Console(width=None if sys.stdout.isatty() else 150)


def write_rows(out: Path, judge: Judge, emulated: Result, rows: list[tuple[str, str, Result]]) -> None:
    """Store the table for benchmarks/plot_docs.py, which makes the README's picture of it."""
    served = {"CPU only": ("before", "0.21.0, 0004 and 0005"), "series": ("after", "0.21.0, all patches")}
    contestants = [("BF16", "reference", "float reference", judge.reference)]
    contestants.append(("INT8", "reference", "emulation of W8A8", emulated))
    contestants += [(f"INT8, {layout}", *served[patches], result) for layout, patches, result in rows]
    table = [
        {
            "checkpoint": checkpoint,
            "kind": kind,
            "served by": server,
            "perplexity": result.shown,
            "agreement": f"{result.agreement:.1%}",
            "text": repr(result.text),
        }
        for checkpoint, kind, server, result in contestants
    ]
    out.write_text(json.dumps({"rows": table}, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the table in FILE as well")
    args = parser.parse_args()
    build = ROOT / "build/demo"
    started = time.time()

    def step(text: str) -> None:
        console.print(f"[dim]{time.time() - started:5.0f} s[/]  {text}")

    step("float reference on the held-out text")
    judge = Judge()
    step("AMD Quark exports the model to INT8 (per-channel weights, dynamic per-token activations)")
    per_expert = export(build / "quark")
    ckpts = {"per expert": per_expert, "stacked": convert("stacked", per_expert, build / "stacked")}
    emulated = judge.emulate(per_expert)
    rows: list[tuple[str, str, Result]] = []
    with tempfile.TemporaryDirectory(prefix="vllm-quark-") as temp:
        for name, only in (("CPU only", CPU_PATCHES), ("series", None)):
            vllm = shadow(Path(temp) / name.replace(" ", "-"), only)
            for layout, ckpt in ckpts.items():
                step(f"vLLM 0.21.0, {name} patches, {layout} layout")
                out = build / f"{ckpt.name}-{vllm.name}.json"
                rows.append((layout, name, judge.run(ckpt, vllm, out)))

    table = Table(title="Step-3.5-nano, INT8 by AMD Quark, served by vLLM 0.21.0 on CPU", title_justify="left")
    for name in ("layout", "patches", "perplexity per byte", "top-1 as reference", "generated text"):
        table.add_column(name)
    best = judge.reference
    assert best.perplexity is not None
    table.add_row("BF16", "(float reference)", best.shown, "100.0%", escape(repr(best.text)))
    table.add_row("INT8", "(W8A8 emulation)", emulated.shown, f"{emulated.agreement:.1%}", escape(repr(emulated.text)))
    table.add_section()
    failed = []
    for layout, name, r in rows:
        table.add_row(layout, name, r.shown, f"{r.agreement:.1%}", escape(repr(r.text)))
        if name == "series":
            if r.perplexity is None or abs(r.perplexity / best.perplexity - 1) > RIGHT:
                failed.append(f"{layout}, series: {r.shown} is not within {RIGHT:.0%} of {best.shown}")
        elif r.perplexity is not None and r.perplexity < GARBAGE * best.perplexity:
            failed.append(f"{layout}, {name}: {r.shown} is no garbage, expected {GARBAGE:g} times {best.shown}")
    console.print(table)
    if args.json:
        write_rows(args.json, judge, emulated, rows)
    for line in failed:
        console.print(f"[red]not as expected:[/] {line}")
    if not failed:
        console.print(
            '"CPU only" is what lets vLLM 0.21.0 run the model on CPU at all (0004, 0005), without the fixes.'
        )
        console.print("With a checkpoint of your own:  [bold]vllm-quark apply && vllm serve CKPT[/]")
    return bool(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LabError as e:
        sys.exit(f"demo: {e}")
