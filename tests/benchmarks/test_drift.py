# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The drift benchmark judges rightly: what it makes is Python, and what the series makes of it is right."""

import ast
import random

import pytest

from benchmarks.compatibility import drift


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> drift.Bench:
    return drift.prepare(tmp_path_factory.mktemp("drift"))


def test_a_drift_of_lines_is_patched_right(bench, tmp_path):
    files = drift.drift(bench.original, bench.near, "lines", "3-0")
    drift.write(tmp_path, files | bench.beside | {"pyproject.toml": ""})
    assert bench.outcome(tmp_path, "vllm-quark") == "right"


def test_a_moved_class_of_the_command_line_is_patched_right(bench, tmp_path):
    """Found at 304 drifts: 0006 was absent without a word where the class of `vllm run-batch` had moved."""
    name = "vllm/entrypoints/cli/run_batch.py"
    moved = drift.Drifter(random.Random(0), bench.near[name], count=0).moved(name, bench.original[name])
    assert "vllm/entrypoints/cli/run_batch_subcommand.py" in moved
    files = bench.original | moved
    drift.write(tmp_path, files | bench.beside | {"pyproject.toml": ""})
    assert bench.outcome(tmp_path, "vllm-quark") == "right"


@pytest.mark.parametrize("kind", drift.KINDS)
def test_what_drifts_is_python(bench, kind):
    for number in range(3):
        for name, text in drift.drift(bench.original, bench.near, kind, f"3-{number}").items():
            ast.parse(text, name)
