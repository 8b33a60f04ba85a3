# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The command that docs/speed-cpu.md quotes times the operator that `make env` built."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_quark.locate import find_installed
from vllm_quark.operator import LIBRARY, VARIABLE
from vllm_quark.series import load_series
from vllm_quark.shadow import make_shadow

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not LIBRARY.is_file(), reason="the native operator is not built here")
def test_the_operator_of_this_tree_is_timed(tmp_path):
    series = load_series(ROOT)
    shadow = make_shadow(tmp_path / "series", series, [p.name for p in series.patches], find_installed())
    env = {k: v for k, v in os.environ.items() if k != VARIABLE} | {"PYTHONPATH": str(shadow)}
    words = ["-m", "benchmarks.speed.cpu_experts", "--shapes", "nano", "--tokens", "1", "--rounds", "1"]
    words += ["--without", "BF16;oneDNN;upstream INT8"]
    process = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    assert "nano, 1 tokens: native" in process.stdout
