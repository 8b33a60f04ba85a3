# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Models that people publish, and the ways in which they quantize them: right, or refused by name.

The cells here are those that take the most paths; `make models` runs all of them and writes docs/models.md.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import save_file

from examples.step3p5_nano.lab import ROOT
from tests.e2e.models.export import Tensors, read
from tests.e2e.models.judge import BF16, judge, make, run
from tests.processor import lacks_avx512
from tests.quantization.quark import activation_config

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("models")]
FOLDER = ROOT / "build/models"
RIGHT = [
    ("llama", "asym"),
    ("llama", "lora"),
    ("llama-tied", "template"),
    ("stablelm", "kv-fp8"),
    ("qwen3-moe", "router-unlisted"),
    ("mixtral", "per-tensor-down"),
    ("granite-moe", "names"),
    ("phimoe", "static"),
    ("llama-4-stacked", "no-attention-globs"),
    ("qwen3-next", "re"),
    ("qwen3.5-moe", "no-attention-names"),
    ("qwen3.5", "static-asym"),
    ("gemma-4", "globs"),
    ("gemma-4-shared", "no-attention-names"),
]
# Those whose exports leave a layer's experts in BF16.
WITH_BF16_EXPERTS = ("granite-moe", "llama-4-stacked")


@dataclass(frozen=True)
class Refusal:
    """said: the message. repair: the advice carried out on a checkpoint's tensors and its `quantization_config`, with
    the unquantized model's tensors at hand. becomes: the variant whose numbers the repaired checkpoint has."""

    said: str
    repair: Callable[[Tensors, dict, Tensors], None]
    becomes: str


def rename_scales(tensors: Tensors, config: dict, published: Tensors) -> None:
    for name in [n for n in tensors if "_quantizer.scale" in n]:
        tensors[name.replace("_quantizer.scale", "_scale")] = tensors.pop(name)


def drop_rotation(tensors: Tensors, config: dict, published: Tensors) -> None:
    for name in [n for n in tensors if n.endswith("input_rotation")]:  # identities here
        del tensors[name]


def set_inputs(tensors: Tensors, config: dict, published: Tensors) -> None:
    config["global_quant_config"]["input_tensors"] = activation_config("token_sym")


def leave_out(glob: str) -> Callable[[Tensors, dict, Tensors], None]:
    def repair(tensors: Tensors, config: dict, published: Tensors) -> None:
        for name in [n for n in tensors if re.fullmatch(glob + r"\.weight", n)]:
            module = name.removesuffix(".weight")
            tensors[name] = published[name]
            tensors.pop(f"{module}.weight_scale")
            config["exclude"].append(module)

    return repair


REFUSED = {
    ("qwen3.5-moe", "lm-head-int8"): Refusal(
        "lm_head.weight is int8, .* add it to `exclude`", leave_out(".*lm_head"), "names"
    ),
    ("mixtral", "router-int8"): Refusal(
        r"block_sparse_moe.gate.weight is int8, .* add it to `exclude`", leave_out(r".*moe\.gate"), "names"
    ),
    ("llama", "other-scale-names"): Refusal(
        r"down_proj.weight is int8, .*rename \*_quantizer.scale", rename_scales, "other-scale-names"
    ),
    ("qwen3-moe", "rotated"): Refusal(
        "down_proj.input_rotation lies beside an INT8 weight", drop_rotation, "rotated"
    ),
    ("llama", "weight-only"): Refusal("null .weight-only.: .*input_tensors into config.json", set_inputs, "names"),
}  # fmt: skip


def write_repaired(cell: tuple[str, str], refusal: Refusal, out: Path) -> Path:
    """The checkpoint of a refused cell after its repair, ARCHITECTURE/VARIANT below `out`."""
    name, variant = cell
    source, becomes, folder = FOLDER / name / variant, make((name, refusal.becomes), FOLDER), out / name / variant
    tensors, page = read(source), json.loads((source / "config.json").read_text())
    refusal.repair(tensors, page["quantization_config"], read(FOLDER / name / BF16))
    shutil.copytree(source, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(page))
    shutil.copy(becomes / "expected.json", folder)
    return folder


@pytest.fixture(scope="module")
def results(vllm, tmp_path_factory):
    cells = [*RIGHT, *REFUSED]
    checkpoints = {cell: make(cell, FOLDER) for cell in cells}
    out, repaired = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("repaired")
    checkpoints |= {(*cell, "repaired"): write_repaired(cell, how, repaired) for cell, how in REFUSED.items()}
    for folder, group in ((out, cells), (repaired, [c for c in checkpoints if c not in cells])):
        run([checkpoints[cell] for cell in group], folder, str(vllm()), at_once=len(cells))
    return {
        cell: judge(folder, (repaired if cell[2:] else out) / f"{'-'.join(cell[:2])}.json")
        for cell, folder in checkpoints.items()
    }


@pytest.mark.parametrize("cell", RIGHT, ids="-".join)
def test_right(cell, results):
    print(cell, results[cell])
    if cell[0] in WITH_BF16_EXPERTS and lacks_avx512() and "vLLM config is not set" in results[cell].said:
        pytest.skip("vLLM 0.21.0's BF16 experts stop on a CPU without AVX-512")
    assert results[cell].what == "right", results[cell]


@pytest.mark.parametrize("cell", REFUSED, ids="-".join)
def test_refused(cell, results):
    verdict = results[cell]
    assert verdict.what == "refused", verdict
    assert re.search(REFUSED[cell].said, verdict.said), verdict.said


@pytest.mark.parametrize("cell", REFUSED, ids="-".join)
def test_way_out_of_a_refusal(cell, results):
    verdict = results[(*cell, "repaired")]
    print(cell, verdict)
    assert verdict.what == "right", verdict
