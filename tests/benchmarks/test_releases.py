# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""What the series changes in a release has to be called there."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from releases import uncalled  # noqa: E402

BEFORE = {
    "vllm/router.py": b"def old(x):\n    return x\n\n\ndef new(x):\n    return x\n",
    "vllm/layer.py": b"from vllm.router import new\n\nnew(1)\n",
}


def test_a_changed_function_that_is_called():
    after = BEFORE | {"vllm/router.py": BEFORE["vllm/router.py"] + b"    # no change\n"}
    assert uncalled(BEFORE, after) == []
    after["vllm/router.py"] = after["vllm/router.py"].replace(b"def new(x):", b"def new(x):\n    x += 1")
    assert uncalled(BEFORE, after) == []


def test_a_changed_function_that_a_release_stopped_calling():
    after = BEFORE | {"vllm/router.py": BEFORE["vllm/router.py"].replace(b"def old(x):", b"def old(x):\n    x += 1")}
    assert uncalled(BEFORE, after) == ["vllm/router.py: nothing calls old"]


def test_a_class_that_comes_new():
    after = BEFORE | {"vllm/ours.py": b"class Ours:\n    pass\n"}
    assert uncalled(BEFORE, after) == ["vllm/ours.py: nothing calls Ours"]
    after["vllm/layer.py"] += b"\nNAMES = ['vllm.ours.Ours']\n"
    assert uncalled(BEFORE, after) == []
