# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The tests that travel with the series: red where their patch is missing, green where it stands alone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.step3p5_nano.lab import ROOT, make_pythonpath
from tests.processor import lacks_vnni
from vllm_quark.locate import find_installed
from vllm_quark.series import load_series
from vllm_quark.tree import Tree

# What the installed release does not have is not tested on it.
AVAILABLE = [v.patch for v in Tree(find_installed()).status(load_series(ROOT)) if v.status != "absent"]
PATCHES = pytest.mark.parametrize("patch", AVAILABLE, ids=lambda p: p.name[:4])


def run(vllm, *tests: str) -> tuple[int, str]:
    """(exit code, output) of pytest over `tests` with the vLLM in `vllm`."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    env = {**os.environ, "PYTHONPATH": make_pythonpath(vllm), "VLLM_QUARK_MUTANTS": "50"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    return result.returncode, result.stdout[-5000:]


def find_tests(patch) -> list[str]:
    return [f for f in patch.files if Path(f).name.startswith("test_")]


@PATCHES
def test_red_without(patch, without):
    code, output = run(without(patch.name[:4]), "-x", *find_tests(patch))
    assert code == 1 and re.search(r"\d+ failed", output), output


@PATCHES
def test_green_alone(patch, vllm):
    """Cherry-picked, a patch passes the tests it brings."""
    if lacks_vnni() and patch.name.startswith("0002"):
        pytest.skip("without 0007 linear layers are oneDNN's, which are wrong on a CPU without VNNI")
    code, output = run(vllm([patch.name[:4]]), *find_tests(patch))
    assert code == 0 and re.search(r"\d+ passed", output), output
