# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Checkpoints, patched vLLMs and the float reference, once for all engine tests."""

from pathlib import Path

import pytest
from lab import ROOT, Judge, checkpoints, shadow

from vllm_quark.series import load_series

EVERY = [p.name[:4] for p in load_series(ROOT).patches]


@pytest.fixture(scope="session")
def ckpts() -> dict[str, Path]:
    """Every export and layout of the nano model, made by AMD Quark."""
    return checkpoints(ROOT / "build/ckpts")


@pytest.fixture(scope="session")
def judge() -> Judge:
    return Judge()


@pytest.fixture(scope="session")
def vllm(tmp_path_factory):
    """`vllm(only)`: the installed vLLM with those patches (None: the series)."""
    made: dict[str, Path] = {}
    base = tmp_path_factory.mktemp("vllm")

    def make(only: list[str] | None = None) -> Path:
        name = "series" if only is None else "-".join(only) or "stock"
        if name not in made:
            made[name] = shadow(base / name, only)
        return made[name]

    return make


@pytest.fixture
def without(vllm):
    """`without("0002")`: the series less that patch."""
    return lambda *names: vllm([n for n in EVERY if n not in names])
