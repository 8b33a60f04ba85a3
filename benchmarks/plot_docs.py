# SPDX-License-Identifier: Apache-2.0
"""Every plot of README.md and docs/, from the stored measurements.

    python -m benchmarks.plot_docs [NAME…]

Each title is computed from the figures, so that it cannot say more than they do. A test compares the committed plots
with what this script makes, byte for byte.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.plots import COLOURS, Bars, Line, draw_bars, draw_lines, draw_table

DOCS = Path(__file__).resolve().parents[1] / "docs"
MEASURED = DOCS / "performance"
TOKENS = {1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 8192}


def _read(name: str) -> dict:
    return json.loads((MEASURED / name).read_text())


def _one_layer(name: str) -> list[dict]:
    return [row for row in _read(name)["rows"] if row["tokens"] in TOKENS]


def _lines(rows: list[dict], names: dict[str, str], scale: float) -> list[Line]:
    """A line for each contestant of a measurement; INT8 is narrow and last, so that what it covers can be seen."""
    lines = []
    for key, name in names.items():
        points = {row["tokens"]: row["us"][key] / scale for row in rows if key in row["us"]}
        if points:
            lines.append(Line(name, points, 2 if name == "INT8" else 5))
    return lines


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def plot_layer_h100() -> str:
    rows = _one_layer("moe-h100.json")
    early = [row["us"] for row in rows if row["tokens"] <= 1024]
    late = [row["us"] for row in rows if row["tokens"] == 8192]
    bf16 = _span([us["bf16"] / us["int8"] for us in early if us["int8"]])
    fp8 = _span([us["fp8"] / us["int8"] for us in early])
    lines = _lines(rows, {"bf16": "BF16", "default": "INT8, stock config", "fp8": "FP8", "int8": "INT8"}, 1e3)
    limit = Line("limit", {row["tokens"]: row["limit"]["us"] / 1e3 for row in rows}, 1.5, dashed=True)
    title = (
        f"H100: up to 1024 tokens INT8 experts are {bf16} times as fast as BF16 and {fp8} times as fast as FP8; "
        f"at 8192 they have {late[0]['fp8'] / late[0]['int8']:.2f} of FP8's speed"
    )
    description = (
        "Time of one layer of 288 experts over the number of tokens, both axes logarithmic. INT8 runs along FP8 and "
        "along the limit of memory up to 1024 tokens, below BF16 everywhere."
    )
    return draw_lines(title, description, [*lines[:-1], limit, lines[-1]], "ms for one layer")


def plot_layer_h200() -> str:
    rows = _one_layer("moe-h200.json")
    ratios = [row["us"]["default"] / row["us"]["int8"] for row in rows if row["tokens"] >= 1024]
    lines = _lines(rows, {"default": "INT8, stock config", "int8": "INT8"}, 1e3)
    limit = Line("limit", {row["tokens"]: row["limit"]["us"] / 1e3 for row in rows}, 1.5, dashed=True)
    title = f"H200: with launch configs INT8 experts are {_span(ratios)} times as fast from 1024 tokens on"
    description = (
        "Time of one layer of 288 experts over the number of tokens, both axes logarithmic. With launch configs INT8 "
        "runs along the limit of memory up to 512 tokens; with vLLM's config for BF16 it leaves it at 96 tokens."
    )
    return draw_lines(title, description, [*lines[:-1], limit, lines[-1]], "ms for one layer")


ENGINE = {
    "quark-series": "INT8",
    "quark-stock": "INT8, stock vLLM",
    "compressed-tensors": "INT8, compressed-tensors",
    "bf16": "BF16",
}
FIGURES = {
    "prefill tokens/s": "prefill",
    "decode tokens/s, batch 1": "decode, batch 1",
    "decode tokens/s, batch 32": "decode, batch 32",
    "decode tokens/s, batch 128": "decode, batch 128",
}


def _engine(file: str, depth: str) -> str:
    runs = _read(file)["runs"]
    panels = []
    for figure, heading in FIGURES.items():
        values = {}
        for run, name in ENGINE.items():
            if measured := [one[figure] for one in runs.get(run, [])]:
                values[name] = (statistics.median(measured), min(measured), max(measured))
        panels.append(Bars(f"{heading}, tokens/s", values))
    ratios = [panel.values["INT8"][0] / panel.values["BF16"][0] for panel in panels]
    title = (
        f"H200, {depth} MoE layers: INT8 decodes {ratios[2]:.2f} and {ratios[3]:.2f} times as many tokens as BF16 at "
        f"batch 32 and 128, and prefills {ratios[0]:.2f} times as many"
    )
    description = (
        "Tokens per second of each checkpoint through the engine, in four panels. The series is ahead of BF16 in each "
        "and of the compressed-tensors twin most in prefill and at batch 128."
    )
    return draw_bars(title, description, panels)


def plot_engine_4() -> str:
    return _engine("depth-h200.json", "four")


def plot_engine_8() -> str:
    return _engine("depth8-h200.json", "eight")


def plot_loading() -> str:
    ranks = _read("shards-h200.json")["ranks"]
    panels = []
    for rank, timings in ranks.items():
        names = {"INT8": "at once", "INT8, expert by expert": "expert by expert"}
        panels.append(Bars(rank, {name: (1e3 * timings[key],) * 3 for name, key in names.items()}))
    ratios = [timings["expert by expert"] / timings["at once"] for timings in ranks.values()]
    title = f"Stacked experts load {_span(ratios)} times as fast with one copy per tensor (ms for a layer of 4.5 GB)"
    description = (
        "Milliseconds to load one rank's experts on an H200, one copy per tensor and expert by expert, six ranks."
    )
    return draw_bars(title, description, panels)


def _cpu(file: str, machine: str, names: dict[str, str], against: list[str]) -> str:
    rows = [row for row in _read(file)["rows"] if row["shape"].startswith("E=32")]
    lines = _lines(rows, {**names, "native": "INT8"}, 1e3)
    spans = []
    for key, says in zip(names, against, strict=True):
        spans.append(f"{_span([r['us'][key] / r['us']['native'] for r in rows])} times as fast as {says}")
    title = f"{machine}: the operator is " + ", ".join(spans)
    description = (
        "Time of one layer of 32 experts over the number of tokens, both axes logarithmic. The operator is lowest."
    )
    return draw_lines(title, description, lines, "ms for one layer")


def plot_cpu() -> str:
    return _cpu("cpu-moe.json", "AMD EPYC, 2 cores", {"BF16": "BF16", "oneDNN": "INT8, oneDNN"}, ["BF16", "oneDNN"])


def plot_cpu_amx() -> str:
    names = {"BF16": "BF16", "oneDNN": "INT8, oneDNN", "upstream INT8": "INT8, fused_experts_cpu"}
    against = ["BF16", "oneDNN", "upstream's INT8"]
    return _cpu("cpu-moe-amx-2.json", "Intel Xeon with AMX, 2 threads", names, against)


def plot_cpu_engine() -> str:
    panels = []
    for file, how in (("cpu-engine.json", "compiled"), ("cpu-engine-eager.json", "eager")):
        stored = _read(file)
        for figure in ("prefill", "decode, batch 1", "decode, batch 16"):
            values = {}
            for key, name in (("native", "INT8"), ("oneDNN", "INT8, oneDNN")):
                runs = [run[figure] for run in stored[key]]
                values[name] = (statistics.median(runs), min(runs), max(runs))
            panels.append(Bars(f"{figure}, {how}", values))
    ratios = [panel.values["INT8"][0] / panel.values["INT8, oneDNN"][0] for panel in panels]
    title = f"Through the engine on an AMD EPYC the operator gives {_span(ratios)} times as many tokens per second"
    description = "Tokens per second of Step-3.5-nano, six panels; in each the operator is ahead of oneDNN."
    return draw_bars(title, description, panels)


def plot_demo() -> str:
    """The table of `make demo`, stored by examples/step3p5_nano/demo.py --json."""
    stored = json.loads((DOCS / "demo.json").read_text())
    columns = [("checkpoint", 16), ("vLLM", 22), ("perplexity per byte", 19), ("same top-1", 10), ("text", 40)]
    kinds = {"reference": "#666666", "before": COLOURS["BF16"], "after": COLOURS["INT8"]}
    rows = []
    for row in stored["rows"]:
        text = row["text"] if len(row["text"]) <= 40 else row["text"][:39] + "…"
        cells = [row["checkpoint"], row["served by"], row["perplexity"], row["agreement"], text]
        rows.append((kinds[row["kind"]], cells))
    worst = max(float(row["perplexity"]) for row in stored["rows"] if row["kind"] == "after")
    best = stored["rows"][0]["perplexity"]
    title = f"The same INT8 checkpoints: garbage before, perplexity {worst:g} after; BF16 has {best}"
    description = "; ".join(
        f"{r['checkpoint']}, {r['served by']}: perplexity {r['perplexity']}" for r in stored["rows"]
    )
    return draw_table(title, description, columns, rows)


PLOTS: dict[str, Callable[[], str]] = {
    "demo.svg": plot_demo,
    "performance/moe-h100.svg": plot_layer_h100,
    "performance/moe-h200.svg": plot_layer_h200,
    "performance/depth-h200.svg": plot_engine_4,
    "performance/depth8-h200.svg": plot_engine_8,
    "performance/shards-h200.svg": plot_loading,
    "performance/cpu-moe.svg": plot_cpu,
    "performance/cpu-moe-amx.svg": plot_cpu_amx,
    "performance/cpu-engine.svg": plot_cpu_engine,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"plots to write, of {', '.join(PLOTS)} (default: all)")
    args = parser.parse_args()
    for name in args.names or PLOTS:
        if name not in PLOTS:
            parser.error(f"no plot is called {name}")
        (DOCS / name).write_text(PLOTS[name](), encoding="utf-8")
        print(DOCS / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
