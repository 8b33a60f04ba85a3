# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Twenty engines one after the other in a process: none leaves anything behind."""

import json
import sys
from pathlib import Path

import pytest

from examples.step3p5_nano.lab import call, make_pythonpath

COUNT = 20


@pytest.mark.engine
def test_memory_is_flat(ckpts, vllm, tmp_path):
    log = tmp_path / "log"
    # Fails at the first engine after which more is held than engines.py allows.
    call(
        log,
        sys.executable,
        Path(__file__).with_name("engines.py"),
        ckpts["stacked"],
        ckpts["quark-all"],
        "--count",
        str(COUNT),
        PYTHONPATH=make_pythonpath(vllm()),
    )
    rows = [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"engine"')]
    assert len(rows) == COUNT
    print(f"\nMB after each of {COUNT} engines: {[h['resident'] for h in rows]}")
