# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Fixtures: a synthetic tree and series, and the real vLLM 0.21.0."""

import shutil
from pathlib import Path

import pytest
from trees import BROUGHT, PATCHES, RELEASE, ROOT, make_tree, write

from vllm_quark.locate import find_installed
from vllm_quark.release import fetch
from vllm_quark.series import Series, load_series
from vllm_quark.shadow import make_shadow


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A checkout of the tool with the synthetic series; `run` works on it."""
    home = tmp_path / "home"
    shutil.copytree(ROOT / "vllm_quark", home / "vllm_quark", ignore=shutil.ignore_patterns("__pycache__"))
    write(home, {f"patches/{name}.yaml": text for name, text in PATCHES.items()} | BROUGHT)
    return home


@pytest.fixture
def series(home: Path) -> Series:
    return load_series(home)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree")


@pytest.fixture(scope="session")
def real_series() -> Series:
    return load_series(ROOT)


@pytest.fixture
def installed(tmp_path: Path, real_series: Series) -> Path:
    """The installed vLLM 0.21.0 as a tree of links that may be patched."""
    return make_shadow(tmp_path / "site", real_series, [], find_installed())


@pytest.fixture(scope="session")
def sdist() -> Path:
    return fetch(RELEASE, Path.home() / ".cache/vllm-quark")


@pytest.fixture
def unpacked(tmp_path: Path, sdist: Path) -> Path:
    """The unpacked source distribution of vLLM 0.21.0."""
    shutil.unpack_archive(sdist, tmp_path / "sdist", filter="data")
    return tmp_path / "sdist" / f"vllm-{RELEASE}"
