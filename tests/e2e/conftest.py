# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Checkpoints, patched vLLMs and the float reference, once for all engine tests."""

import os
import sys
from pathlib import Path

import pytest

from examples.step3p5_nano.lab import QUARK_PYTHON, ROOT, Judge, call, make_checkpoints, make_pythonpath, shadow
from tests.e2e.jobs import run_jobs
from vllm_quark.series import load_series

PATCHES = load_series(ROOT).patches


def pytest_collection_finish(session):
    """Fail where a group's tests would run on several workers at once: its fixtures share folders below build/."""
    if getattr(session.config.option, "loadgroup", False):
        lost = [i.nodeid for i in session.items if i.get_closest_marker("xdist_group") and "@" not in i.nodeid]
        if lost:
            raise pytest.UsageError(f"pytest-xdist lost the group of {lost[0]}: install pytest<9.2")


@pytest.fixture(scope="session")
def ckpts() -> dict[str, Path]:
    """Every export and layout of the nano model, made by AMD Quark."""
    return make_checkpoints(ROOT / "build/ckpts")


@pytest.fixture(scope="session")
def exports() -> Path:
    """Calibrated static exports, made by AMD Quark. Tests that take them are in the group "exports"."""
    out, script = ROOT / "build/static", Path(__file__).with_name("static_exports.py")
    last = out / "dense-tensor-asym/expected.json"
    if not last.exists() or last.stat().st_mtime < script.stat().st_mtime:
        path = os.pathsep.join([str(QUARK_PYTHON.parent), os.environ["PATH"]])
        call(ROOT / "build/static.log", QUARK_PYTHON, script, out, PATH=path)
    return out


@pytest.fixture(scope="session")
def judge() -> Judge:
    return Judge()


@pytest.fixture(scope="session")
def vllm(tmp_path_factory):
    """`vllm(only)`: the installed vLLM with those patches (None: the series)."""
    shadows: dict[str, Path] = {}
    base = tmp_path_factory.mktemp("vllm")

    def make(only: list[str] | None = None) -> Path:
        name = "series" if only is None else "-".join(only) or "stock"
        if name not in shadows:
            shadows[name] = shadow(base / name, only)
        return shadows[name]

    return make


@pytest.fixture
def without(vllm):
    """`without("0002")`: the series less that patch and those that require it."""

    def make(*names: str) -> Path:
        dropped = set(names)
        for p in PATCHES:
            if dropped & set(p.requires):
                dropped.add(p.name[:4])
        return vllm([p.name[:4] for p in PATCHES if p.name[:4] not in dropped])

    return make


@pytest.fixture(scope="session")
def in_process(vllm, tmp_path_factory):
    """`in_process(jobs)`: run in_process.py over `jobs` with the series; the results, in order."""

    def run(jobs: list[dict]) -> list[dict]:
        return run_jobs(jobs, tmp_path_factory.mktemp("jobs"), sys.executable, PYTHONPATH=make_pythonpath(vllm()))

    return run
