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
            "perplexity": result.perplexity_text,
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
    reference = judge.reference
    assert reference.perplexity is not None
    references = [("BF16", "(float reference)", reference), ("INT8", "(W8A8 emulation)", emulated)]
    for layout, name, result in references:
        table.add_row(layout, name, result.perplexity_text, f"{result.agreement:.1%}", escape(repr(result.text)))
    table.add_section()
    failures = []
    for layout, name, result in rows:
        perplexity = result.perplexity_text
        table.add_row(layout, name, perplexity, f"{result.agreement:.1%}", escape(repr(result.text)))
        if name == "series":
            if result.perplexity is None or abs(result.perplexity / reference.perplexity - 1) > RIGHT:
                limit = f"within {RIGHT:.0%} of {reference.perplexity_text}"
                failures.append(f"{layout}, series: {perplexity} is not {limit}")
        elif result.perplexity is not None and result.perplexity < GARBAGE * reference.perplexity:
            expected = f"{GARBAGE:g} times {reference.perplexity_text}"
            failures.append(f"{layout}, {name}: {perplexity} is no garbage, expected {expected}")
    console.print(table)
    if args.json:
        write_rows(args.json, judge, emulated, rows)
    for line in failures:
        console.print(f"[red]not as expected:[/] {line}")
    if not failures:
        console.print(
            '"CPU only" is what lets vLLM 0.21.0 run the model on CPU at all (0004, 0005), without the fixes.'
        )
        console.print("With a checkpoint of your own:  [bold]vllm-quark apply && vllm serve CKPT[/]")
    return bool(failures)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LabError as e:
        sys.exit(f"demo: {e}")
