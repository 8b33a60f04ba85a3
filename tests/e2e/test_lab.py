# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""How the scripts of examples/step3p5_nano run vLLM."""

import sys
from pathlib import Path

import pytest

from examples.step3p5_nano.lab import LabError, call

# Fails with a line the first time, works the second time.
ONCE = """
import pathlib, sys
ran = pathlib.Path(sys.argv[1])
if not ran.exists():
    ran.touch()
    sys.exit(sys.argv[2])
"""


def test_a_port_that_is_taken_is_tried_again(tmp_path: Path):
    call(tmp_path / "log", sys.executable, "-c", ONCE, tmp_path / "ran", "DistNetworkError: name: EADDRINUSE")
    assert (tmp_path / "ran").exists()


def test_other_errors_are_told_at_once(tmp_path: Path):
    with pytest.raises(LabError, match="out of memory"):
        call(tmp_path / "log", sys.executable, "-c", ONCE, tmp_path / "ran", "out of memory")
