# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Import statements where ruff wants them: ruff itself is the judge."""

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_quark.imports import add_import

SOURCE = '''\
# SPDX-License-Identifier: Apache-2.0
"""What it is."""

import os
from typing import Any

import torch

import vllm.envs as envs
from vllm.config import CacheConfig, ModelConfig  # noqa: E501
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    fp8_w8a8_moe_quant_config,  # a comment
    ocp_mx_moe_quant_config,
)

from .utils import helper

x = 1
'''
STATEMENTS = [
    "import abc",
    "import sys",
    "from functools import wraps",
    "from typing import TYPE_CHECKING, Any, cast",
    "import numpy as np",
    "from transformers import PretrainedConfig",
    "import vllm.ir",
    "from vllm.config import VllmConfig",
    "from vllm.aaa import b",
    "from vllm.zzz import FIRST, Second, third",
    "from vllm.model_executor.layers.fused_moe.config import int8_w8a8_moe_quant_config",
    "from vllm.model_executor.layers.fused_moe.config import AConfig, zconfig",
    "from vllm.a_module_with_a_long_name.and_another_one import a_function_with_a_long_name, another_one",
]


def ruff(text: str) -> str:
    """`text` as ruff's isort and formatter leave it, with vLLM's settings."""
    tool, words = Path(sys.executable).with_name("ruff"), ["--isolated", "--line-length", "88", "-"]
    sort = ["check", "--select", "I", "--fix", "-q", "--config", 'lint.isort.known-first-party=["vllm"]', *words]
    for command in (sort, ["format", "-q", *words]):
        text = subprocess.run([tool, *command], input=text, capture_output=True, text=True, check=True).stdout
    return text


@pytest.mark.parametrize("statement", STATEMENTS)
def test_sorted_as_ruff_sorts(statement):
    new = add_import(SOURCE, statement)
    assert new != SOURCE and ruff(SOURCE) == SOURCE
    assert new == ruff(SOURCE.replace("\nx = 1", f"{statement}\n\nx = 1")), "as where ruff sorts it in"
    assert new == ruff(new), "nothing is left for ruff to do"
    assert add_import(new, statement) == new, "a second time changes nothing"


def test_all_together():
    new = SOURCE
    for statement in STATEMENTS:
        new = add_import(new, statement)
    assert new == ruff(new)
    for line in SOURCE.splitlines():
        assert line in new or "typing" in line or "CacheConfig" in line, "no other line changes"


@pytest.mark.parametrize("text", ["", "# a comment\n", '"""Doc."""\n', "x = 1\n", "def f(): pass\n"])
def test_files_without_imports(text):
    new = add_import(text, "from vllm.a import b")
    compile(new, "new", "exec")
    assert "from vllm.a import b" in new and all(line in new for line in text.splitlines())


def test_a_fork_s_package_is_first_party():
    text = "import torch\n\nfrom acme_vllm.b import c\n"
    assert add_import(text, "from acme_vllm.a import b", "acme_vllm") == text.replace(
        "from acme_vllm.b", "from acme_vllm.a import b\nfrom acme_vllm.b"
    )
