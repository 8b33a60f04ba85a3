# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The series on the installed vLLM 0.21.0, and the style of what it makes."""

import ast
import difflib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from trees import NEWER, RELEASE, ROOT, cli, one_line, snapshot, visible

from vllm_quark.locate import find_installed
from vllm_quark.series import load_series
from vllm_quark.tree import Tree


def test_installed_vllm_is_found_without_importing_it():
    code = "import sys; from vllm_quark.locate import *; print(find_installed()); assert 'vllm' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert Path(result.stdout.strip()) == find_installed()
    assert Tree(find_installed()).version == RELEASE


def test_apply_and_revert(installed):
    site = find_installed()
    before, cached = snapshot(installed), snapshot(site / "vllm/model_executor/layers/quantization/quark")
    assert cli(ROOT, "apply", installed).returncode == 0
    data = json.loads(cli(ROOT, "status", installed, "--json").stdout)
    statuses = {p["name"][:4]: p["status"] for p in data["patches"]}
    assert {n for n, status in statuses.items() if status != "applied"} == NEWER
    assert {statuses[n] for n in NEWER} == {"absent"}
    assert snapshot(site / "vllm/model_executor/layers/quantization/quark") == cached
    assert cli(ROOT, "revert", installed).returncode == 0
    assert snapshot(installed) == before


def test_revert_of_what_others_build_on(installed):
    assert cli(ROOT, "apply", installed).returncode == 0
    for name, dependents in (("0007", ("0008", "0014")), ("0005", ("0015",))):
        line = one_line(cli(ROOT, "revert", installed, "--only", name), f"{name}-", "--with-dependents")
        assert all(f"{d}-" in line for d in dependents)
    result = cli(ROOT, "revert", installed, "--only", "0014")
    assert result.returncode == 0 and result.stdout == "reverted 0014-step3p5-stacked-loading\n"
    result = cli(ROOT, "revert", installed, "--only", "0007", "--with-dependents")
    assert [line[9:13] for line in result.stdout.splitlines()] == ["0007", "0008"], result.stderr
    data = json.loads(cli(ROOT, "status", installed, "--json").stdout)
    remaining = {p["name"][:4] for p in data["patches"] if p["status"] == "applies"}
    assert remaining == {"0007", "0008", "0014"}


def test_every_patch_applies_alone(installed, real_series):
    for patch in [p for p in real_series.patches if p.name[:4] not in NEWER]:
        before = snapshot(installed)
        assert cli(ROOT, "apply", installed, "--only", patch.name).returncode == 0
        changed = {k for k, v in visible(installed).items() if before.get(k) != v}
        applied = real_series.select([patch.name])  # with what it requires
        edited, files = {e.file for p in applied for e in p.edits}, {f for p in applied for f in p.files}
        assert changed - edited - files <= {str(Path(f).parent) for f in files}
        assert cli(ROOT, "revert", installed).returncode == 0
        assert snapshot(installed) == before


def find_fixtures(source: bytes) -> set[str]:
    """Names of the functions that a conftest.py makes fixtures."""
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {f.name for f in functions if any("fixture" in ast.unparse(d) for d in f.decorator_list)}


def test_what_a_patch_brings_stands_alone(real_series):
    """A cherry-picked patch has all that its tests take from beside them: modules, and fixtures of conftest.py."""
    for patch in real_series.patches:
        files = {f for p in real_series.select([patch.name]) for f in p.files}
        for file in patch.files:
            for node in ast.walk(ast.parse(real_series.content(file))) if file.endswith(".py") else ():
                if isinstance(node, ast.ImportFrom) and node.level == 1:
                    folder = Path(file).parent
                    modules = {f"{node.module}.py"} if node.module else {f"{n.name}.py" for n in node.names}
                    if not node.module:  # what is no module is the package's own
                        modules = {name for name in modules if (real_series.home / folder / name).is_file()}
                    assert {str(folder / name) for name in modules | {"__init__.py"}} <= files, (patch.name, file)
                conftest = str(Path(file).parent / "conftest.py")
                if isinstance(node, ast.FunctionDef) and (real_series.home / conftest).is_file():
                    fixtures = find_fixtures(real_series.content(conftest))
                    if fixtures & {a.arg for a in node.args.args}:
                        assert conftest in files, (patch.name, file, node.name)


def test_style_is_vllms_own(unpacked, tmp_path):
    """ruff with that release's settings; no trailing blanks; a diff that a reviewer would write."""
    stock = shutil.copytree(unpacked, tmp_path / "stock")
    assert cli(ROOT, "apply", unpacked).returncode == 0
    before, after = visible(stock), visible(unpacked)
    touched = sorted(k for k, v in after.items() if before.get(k) != v and v[0] == "file")
    data, touched = [k for k in touched if k.endswith(".json")], [k for k in touched if not k.endswith(".json")]
    python = [k for k in touched if k.endswith(".py")]
    assert all(json.loads((unpacked / name).read_text()) for name in data)
    ruff = shutil.which("ruff", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    for words in (["check"], ["format", "--check"]):
        result = subprocess.run([ruff, *words, "--no-cache", *python], cwd=unpacked, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    for name in touched:
        text = (unpacked / name).read_text()
        old = (stock / name).read_text().splitlines() if name in before else []
        assert not [line for line in text.splitlines() if line != line.rstrip() and line not in old], name
        if name in python:
            compile(text, name, "exec")
    changed = 0
    for name in filter(before.__contains__, touched):
        old, new = ((t / name).read_text().splitlines() for t in (stock, unpacked))
        changed += sum(line[0] in "+-" for line in list(difflib.unified_diff(old, new, n=0))[2:])
    assert 0 < changed < 15 * len(load_series(ROOT).patches)
    for name in touched:
        if name.startswith("tests/") or name not in before:
            head = (unpacked / name).read_text().splitlines()
            assert not head or head[0].lstrip("/# ") == "SPDX-License-Identifier: Apache-2.0", name


SCHEME = "vllm/model_executor/layers/quantization/quark/schemes/quark_w8a8_int8.py"
LIFT = """
        def lift(param, loaded_weight):
            return given(param, loaded_weight.reshape(-1, 1))

        given, weight_loader = weight_loader, lift
"""


def test_a_fork_with_columns_and_a_loader_that_does_not_lift(installed, real_series):
    """[N, 1] alone is half of 0002: checkpoints that store [N] would not load."""
    path, real = installed / SCHEME, find_installed() / SCHEME
    half = real.read_text()
    for name in ("weight_scale", "weight_zero_point"):
        start = half.index("sum(output_partition_sizes)", half.index(f"            {name} = Channel"))
        end = start + len("sum(output_partition_sizes)")
        if half[start - 1] == "(" and half[end] == ")":
            start, end = start - 1, end + 1
        half = f"{half[:start]}(sum(output_partition_sizes), 1){half[end:]}"
    path.unlink()
    path.write_text(half)
    patches = real_series.select(["0002"])
    assert [v.status for v in Tree(installed).status(real_series, patches)] == ["applies"]
    Tree(installed).apply(real_series, patches)
    applied = path.read_text()
    Tree(installed).revert(real_series, patches)
    path.write_text(real.read_text())
    Tree(installed).apply(real_series, patches)
    assert path.read_text() == applied
    Tree(installed).revert(real_series, patches)
    weight = "        # WEIGHT\n"
    path.write_text(half.replace(weight, f"{LIFT}{weight}"))
    assert path.read_text() != half
    assert [v.status for v in Tree(installed).status(real_series, patches)] == ["upstream"]


@pytest.mark.parametrize("patches", ["stock", "0001"])
def test_shadow(tmp_path, patches):
    out = tmp_path / "shadow"
    words = ["--stock"] if patches == "stock" else ["--only", patches]
    assert cli(ROOT, "shadow", "-o", out, *words).returncode == 0
    real = [p for p in (out / "vllm").rglob("*.py") if not p.is_symlink()]
    assert [p.name for p in real] == ([] if patches == "stock" else ["step3p5.py"])
    env = {**os.environ, "PYTHONPATH": str(out)}
    code = "import importlib.util; print(importlib.util.find_spec('vllm').origin)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path, check=True
    )
    assert result.stdout.strip() == str(out / "vllm/__init__.py")
