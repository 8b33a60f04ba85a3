# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The plugin that names the wheel's CPU operator to a vLLM with the series."""

import os

import pytest

from vllm_quark import operator


@pytest.fixture
def library(tmp_path, monkeypatch):
    """The wheel's library, and no word of it in the environment."""
    from vllm import envs

    monkeypatch.setattr(operator, "LIBRARY", tmp_path / "_int8_moe_C.abi3.so")
    monkeypatch.setattr(envs, "environment_variables", dict(envs.environment_variables))
    envs.environment_variables[operator.VARIABLE] = lambda: os.getenv(operator.VARIABLE)
    monkeypatch.setenv(operator.VARIABLE, "")
    monkeypatch.delenv(operator.VARIABLE)
    operator.LIBRARY.touch()
    return operator.LIBRARY


def test_the_library_is_named(library):
    operator.name_library()
    assert os.environ[operator.VARIABLE] == str(library)


def test_the_users_own_stays(library, monkeypatch):
    monkeypatch.setenv(operator.VARIABLE, "")
    operator.name_library()
    assert os.environ[operator.VARIABLE] == ""


def test_a_stock_vllm_is_told_nothing(library):
    """It would warn of a variable that it does not know."""
    from vllm import envs

    del envs.environment_variables[operator.VARIABLE]
    operator.name_library()
    assert operator.VARIABLE not in os.environ


def test_without_a_library_nothing_is_named(library):
    library.unlink()
    operator.name_library()
    assert operator.VARIABLE not in os.environ
