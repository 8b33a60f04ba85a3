# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The tests that travel with the series: red where a patch is missing, in the tests that belong to it."""

import os
import re
import subprocess
import sys

import pytest
from lab import ROOT, before

TESTS = ["tests/quantization", "tests/entrypoints"]
OWN = {
    "0001": {"test_exclude.py"},
    "0002": {"test_int8_linear.py"},
    "0003": {"test_int8_moe.py"},
    "0004": {"test_cpu_routing.py"},
    "0005": {"test_cpu_moe.py"},
    "0006": {"test_cli_version.py"},
}


@pytest.mark.parametrize("patch", OWN)
def test_red_without(patch, without, tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    env = {**os.environ, "PYTHONPATH": before(without(patch))}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    failed = set(re.findall(r"^FAILED \S*/(\w+\.py)::", done.stdout, re.M))
    assert done.returncode == 1, done.stdout[-3000:]
    assert failed == OWN[patch], done.stdout[-3000:]
    assert re.search(r"\d+ passed", done.stdout)
