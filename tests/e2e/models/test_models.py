# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Models that people publish, and the ways in which they quantize them: right, or refused by name.

The cells here are those that take the most paths; `make models` runs all of them and writes docs/models.md.
"""

import re

import pytest
from lab import ROOT

from tests.e2e.models.judge import judge, make, run

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("models")]
FOLDER = ROOT / "build/models"
RIGHT = [
    ("llama", "asym"),
    ("llama-tied", "template"),
    ("qwen3-moe", "router-unlisted"),
    ("mixtral", "per-tensor-down"),
    ("granite-moe", "names"),
    ("llama-4-stacked", "no-attention-globs"),
    ("qwen3-next", "re"),
    ("qwen3.5-moe", "no-attention-names"),
    ("qwen3.5", "static-asym"),
    ("gemma-4", "globs"),
]
REFUSED = {
    ("qwen3.5-moe", "lm-head-int8"): "lm_head.weight is int8, .* add it to `exclude`",
    ("llama", "other-scale-names"): r"down_proj.weight is int8, .*rename \*_quantizer.scale",
    ("qwen3-moe", "rotated"): "down_proj.input_rotation lies beside an INT8 weight",
}


@pytest.fixture(scope="module")
def results(vllm, tmp_path_factory):
    cells = [*RIGHT, *REFUSED]
    checkpoints = {cell: make(cell, FOLDER) for cell in cells}
    out = tmp_path_factory.mktemp("models")
    run(checkpoints.values(), out, str(vllm()), at_once=len(cells))
    return {cell: judge(folder, out / f"{'-'.join(cell)}.json") for cell, folder in checkpoints.items()}


@pytest.mark.parametrize("cell", RIGHT, ids="-".join)
def test_right(cell, results):
    print(cell, results[cell])
    assert results[cell].what == "right", results[cell]


@pytest.mark.parametrize("cell", REFUSED, ids="-".join)
def test_refused(cell, results):
    found = results[cell]
    assert found.what == "refused", found
    assert re.search(REFUSED[cell], found.said), found.said
