# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""`vllm-quark configs`: vLLM finds the launch configs that it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tool.trees import cli, one_line
from vllm_quark.locate import find_installed
from vllm_quark.series import load_series
from vllm_quark.shadow import make_shadow

ROOT = Path(__file__).resolve().parents[2]
# Files of 0013; those of 0016 are of its own kernel.
SHIPPED = len([*(ROOT / "vllm/model_executor/layers/fused_moe/configs").glob("*dtype=int8_w8a8.json")])
# What INT8 experts, per token, are launched with on an H200 that is not there.
LAUNCH = """
import json, torch
from vllm.model_executor.layers.fused_moe import config, fused_moe
fused_moe.current_platform.get_device_name = lambda *_: "NVIDIA H200"
int8 = config.int8_w8a8_moe_quant_config(
    w1_scale=torch.ones(1), w2_scale=torch.ones(1), a1_scale=None, a2_scale=None, per_act_token_quant=True)
print(json.dumps(fused_moe.get_moe_configs(288, 1280, int8.config_name(torch.bfloat16))))
"""


def launch(vllm: Path, folder: Path) -> dict | None:
    env = {**os.environ, "PYTHONPATH": str(vllm), "VLLM_TUNED_CONFIG_FOLDER": str(folder)}
    result = subprocess.run([sys.executable, "-c", LAUNCH], env=env, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("stock", [False, True])
def test_vllm_finds_them(stock, tmp_path):
    """A vLLM whose lookup is patched or not, and that ships no such file itself."""
    out, vllm = tmp_path / "tuned", tmp_path / "vllm"
    make_shadow(vllm, load_series(ROOT), [] if stock else ["0013-int8-moe-launch-configs"], find_installed())
    for file in (vllm / "vllm/model_executor/layers/fused_moe/configs").glob("*int8_w8a8*"):
        file.unlink()
    assert launch(vllm, tmp_path) is None
    result = cli(ROOT, "configs", "-o", out, *(["--stock"] if stock else []), "--json")
    assert result.returncode == 0, result.stderr
    files = [Path(f) for f in json.loads(result.stdout)["files"]]
    assert sorted(files) == sorted(out.iterdir()) and len(files) == SHIPPED
    shipped = "vllm/model_executor/layers/fused_moe/configs/E=288,N=1280,device_name=NVIDIA_H200,dtype=int8_w8a8.json"
    expected = json.loads((ROOT / shipped).read_text())
    expected.pop("triton_version", None)
    assert launch(vllm, out) == expected


def test_files_of_ones_own_stay(tmp_path):
    own = tmp_path / "E=288,N=640,device_name=NVIDIA_H200,dtype=int8_w8a8.json"
    other = tmp_path / "E=8,N=14336,device_name=NVIDIA_H200.json"
    own.write_text("{}")
    other.write_text("{}")
    one_line(cli(ROOT, "configs", "-o", tmp_path), own.name, "other content", "another folder")
    assert sorted(tmp_path.iterdir()) == sorted([own, other]) and own.read_text() == "{}"
    own.unlink()
    for _ in range(2):  # again is the same
        result = cli(ROOT, "configs", "-o", tmp_path)
        assert result.returncode == 0 and f"VLLM_TUNED_CONFIG_FOLDER={tmp_path}" in result.stdout
    assert len(list(tmp_path.iterdir())) == SHIPPED + 1 and other.read_text() == "{}"


def test_bad_input(tmp_path):
    (tmp_path / "file").touch()
    one_line(cli(ROOT, "configs", "-o", tmp_path / "file"), "file", "cannot be written")


def test_a_folder_with_a_space(tmp_path):
    result = cli(ROOT, "configs", "-o", tmp_path / "my configs")
    assert f"\nVLLM_TUNED_CONFIG_FOLDER='{tmp_path}/my configs', for " in result.stdout, result
