# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The CLI of a vLLM that was installed under another distribution name."""

import importlib.metadata
import sys

import pytest

import vllm
from vllm.entrypoints.cli.main import main


@pytest.fixture
def other_name(monkeypatch):
    find = importlib.metadata.version

    def version(name: str) -> str:
        if name == "vllm":
            raise importlib.metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_version(other_name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vllm", "--version"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == vllm.__version__
