# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Launch configs of INT8 experts: where they are looked for, and those that ship.

Run `pytest tests/quantization/quark/test_int8_launch_configs.py`.
"""

import inspect
import json
import os
import re
from pathlib import Path

import pytest
import torch

from vllm.model_executor.layers.fused_moe import config as moe_config
from vllm.model_executor.layers.fused_moe import fused_moe

E, N, K = 4, 32, 64
INT8, BF16 = {"BLOCK_SIZE_M": 48}, {"BLOCK_SIZE_M": 24}
CONFIGS = Path(fused_moe.__file__).parent / "configs"
# Experts and their width. Tensor parallel 1 to 8 parts the width, expert parallel 2
# to 8 the experts.
MODELS = {
    "Step-3.5-Flash": (288, 1280),
    "Qwen3.6-35B-A3B": (256, 512),
    "MiniMax-M2": (256, 1536),
    "DeepSeek-V3": (256, 2048),
    "Qwen3-235B-A22B": (128, 1536),
    "Qwen3-30B-A3B": (128, 768),
    "GLM-4.5": (160, 1536),
    "GLM-4.5-Air": (128, 1408),
}


def shares(experts: int, width: int) -> list[tuple[int, int]]:
    """A rank's experts and their width."""
    widths = [width // ranks for ranks in (1, 2, 4, 8)]
    return [
        # What no tile fits has no file; 160 is Step-3.5-Flash's.
        *((experts, n) for n in widths if n % 64 == 0 or n == 160),
        *((experts // ranks, width) for ranks in (2, 4, 8)),
    ]


SHIPPED = [
    *((e, n, "NVIDIA_H100_80GB_HBM3") for e, n in shares(*MODELS["Step-3.5-Flash"])),
    *dict.fromkeys(
        (e, n, "NVIDIA_H200") for model in MODELS.values() for e, n in shares(*model)
    ),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """VLLM_TUNED_CONFIG_FOLDER; call it to put a config file there."""
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    fused_moe.get_moe_configs.cache_clear()

    def put(dtype: str | None, config: dict[str, int]) -> None:
        name = fused_moe.get_config_file_name(E, N, dtype)
        (tmp_path / name).write_text(json.dumps({"1": config}))

    yield put
    fused_moe.get_moe_configs.cache_clear()


def taken(quant_config) -> dict[str, int]:
    """The config that the kernel is launched with, per-token INT8 experts'."""
    dtype = quant_config.config_name(torch.bfloat16)
    return fused_moe.try_get_optimal_moe_config((E, 2 * N, K), (E, K, N), 2, dtype, 1)


def int8_config():
    return moe_config.int8_w8a8_moe_quant_config(
        w1_scale=torch.ones(E, 2 * N, 1),
        w2_scale=torch.ones(E, K, 1),
        a1_scale=None,
        a2_scale=None,
        per_act_token_quant=True,
    )


def test_int8_experts_take_int8_files(folder):
    folder("int8_w8a8", INT8)
    folder(None, BF16)
    assert taken(int8_config()) == INT8
    assert taken(moe_config.FUSED_MOE_UNQUANTIZED_CONFIG) == BF16


def test_without_a_file_of_their_own_they_take_what_they_took(folder):
    folder(None, BF16)
    assert taken(int8_config()) == BF16


@pytest.fixture
def warned(monkeypatch):
    """Texts of warnings, with what is filled in."""
    texts = []
    for name in ("warning", "warning_once"):
        monkeypatch.setattr(
            fused_moe.logger, name, lambda text, *args, **_: texts.append(text % args)
        )
    return texts


def test_no_default_is_told_of_where_there_is_a_file(folder, warned):
    folder(None, BF16)
    assert taken(int8_config()) == BF16 and not warned


def test_without_any_file_they_take_the_default(folder, warned):
    default = taken(moe_config.FUSED_MOE_UNQUANTIZED_CONFIG)
    warned.clear()
    assert taken(int8_config()) == default
    name = fused_moe.get_config_file_name(E, N, "int8_w8a8")
    assert len(warned) == 1 and name in warned[0], warned


def test_a_users_folder_goes_before_vllms(folder, monkeypatch):
    """Also with the name that INT8 experts had before they had one of their own."""
    experts, width, device = SHIPPED[0]
    monkeypatch.setattr(
        fused_moe.current_platform, "get_device_name", lambda *_: device
    )
    # Newer releases keep the name from call to call.
    monkeypatch.setattr(
        fused_moe, "get_device_name_as_file_name", lambda: device, raising=False
    )
    assert fused_moe.get_moe_configs(experts, width, "int8_w8a8") not in (
        None,
        {1: BF16},
    )
    user = Path(os.environ["VLLM_TUNED_CONFIG_FOLDER"])
    (user / fused_moe.get_config_file_name(experts, width, None)).write_text(
        json.dumps({"1": BF16})
    )
    fused_moe.get_moe_configs.cache_clear()
    assert fused_moe.get_moe_configs(experts, width, "int8_w8a8") == {1: BF16}


def test_block_shapes_stay_in_the_name(folder):
    user = Path(os.environ["VLLM_TUNED_CONFIG_FOLDER"])
    (user / fused_moe.get_config_file_name(E, N, None, [128, 128])).write_text(
        json.dumps({"1": BF16})
    )
    folder(None, INT8)
    assert fused_moe.get_moe_configs(E, N, "int8_w8a8", 128, 128) == {1: BF16}


@pytest.mark.parametrize("is_int8", [True, False])
def test_fused_experts_asks_for_its_dtype(monkeypatch, is_int8):
    class Asked(Exception):
        pass

    def ask(w1_shape, w2_shape, top_k, dtype, M, block_shape=None):
        raise Asked(dtype)

    monkeypatch.setattr(fused_moe, "try_get_optimal_moe_config", ask)
    kind = torch.int8 if is_int8 else torch.bfloat16
    impl = fused_moe.fused_experts_impl
    takes_inplace = "inplace" in inspect.signature(impl).parameters
    with pytest.raises(Asked) as asked:
        impl(
            torch.zeros(1, K, dtype=torch.bfloat16),
            torch.zeros(E, 2 * N, K, dtype=kind),
            torch.zeros(E, K, N, dtype=kind),
            torch.ones(1, 2),
            torch.zeros(1, 2, dtype=torch.int32),
            **({"inplace": False} if takes_inplace else {}),
            use_int8_w8a8=is_int8,
            per_channel_quant=is_int8,
        )
    assert asked.value.args == ("int8_w8a8" if is_int8 else None,)


@pytest.mark.parametrize("experts, width, device", SHIPPED)
def test_shipped_files_are_found_and_launch(monkeypatch, experts, width, device):
    name_here = fused_moe.get_config_file_name

    def name_there(*args) -> str:
        here = name_here(*args)
        return re.sub(r"(device_name=).*?(,|\.json)", rf"\1{device}\2", here)

    monkeypatch.setattr(fused_moe, "get_config_file_name", name_there)
    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    fused_moe.get_moe_configs.cache_clear()
    configs = fused_moe.get_moe_configs(experts, width, "int8_w8a8")
    fused_moe.get_moe_configs.cache_clear()
    assert configs is not None
    assert {1, 64, 1024, 8192} <= configs.keys()
    for config in configs.values():
        m, n, k = (config[f"BLOCK_SIZE_{axis}"] for axis in "MNK")
        # what is loaded ahead fits the 227 KiB of shared memory, and the
        # accumulators half of a thread's registers
        assert (m + n) * k * config["num_stages"] <= 227 * 1024
        assert m * n <= 128 * 32 * config["num_warps"]
        assert m % 16 == n % 16 == k % 32 == 0 and config["GROUP_SIZE_M"] >= 1
