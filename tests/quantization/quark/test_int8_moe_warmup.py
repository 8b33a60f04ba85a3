# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""INT8 experts' launch configs are compiled before the first request.

Run `pytest tests/quantization/quark/test_int8_moe_warmup.py`. Compilation needs a GPU.
"""

import json
from types import SimpleNamespace

import pytest
import torch

from vllm.model_executor.layers.fused_moe import fused_moe, get_config
from vllm.model_executor.layers.fused_moe.config import int8_w8a8_moe_quant_config
from vllm.model_executor.warmup import kernel_warmup
from vllm.platforms import current_platform

from .utils import DEVICE, DTYPE, apply_experts, make_experts, quark_config

needs_gpu = pytest.mark.skipif(not current_platform.is_cuda_alike(), reason="no GPU")

E, TOP_K, WIDTH, HIDDEN = 48, 4, 128, 256
# Few tokens, some hundreds, and more: each has a config of its own.
KEYS = {1: 16, 64: 32, 512: 64, 4096: 128}
CONFIGS = {
    tokens: {
        "BLOCK_SIZE_M": block,
        "BLOCK_SIZE_N": 64,
        "BLOCK_SIZE_K": 64,
        "GROUP_SIZE_M": 1,
        "num_warps": 4,
        "num_stages": 3,
    }
    for tokens, block in KEYS.items()
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A launch config for each count of KEYS, under every name that is looked for."""
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    for dtype in (None, "int8_w8a8"):
        name = fused_moe.get_config_file_name(E, WIDTH, dtype)
        (tmp_path / name).write_text(json.dumps(CONFIGS))
    fused_moe.get_moe_configs.cache_clear()
    yield
    fused_moe.get_moe_configs.cache_clear()


def make_worker(*layers: torch.nn.Module, most: int = 8192, **more) -> SimpleNamespace:
    """What int8_moe_warmup reads of a worker whose model has these layers."""
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(layers)
    settings = {"eager": False, "enable_jit_warmup": True, "lora": None} | more
    kernel_config = SimpleNamespace(enable_jit_warmup=settings["enable_jit_warmup"])
    return SimpleNamespace(
        vllm_config=SimpleNamespace(
            kernel_config=kernel_config, lora_config=settings["lora"]
        ),
        model_config=SimpleNamespace(dtype=DTYPE, enforce_eager=settings["eager"]),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=most),
        device=layers[0].w13_weight.device if layers else torch.device("cpu"),
        get_model=lambda: model,
    )


def warm_up(worker: SimpleNamespace) -> None:
    from vllm.model_executor.warmup.int8_moe_warmup import int8_moe_warmup

    int8_moe_warmup(worker)


class RecordingMethod:
    """The method of a layer of INT8 experts; keeps each launch's config and tokens."""

    def __init__(self, kernel: object = None, all2all: bool = False):
        self.moe_quant_config = int8_w8a8_moe_quant_config(
            w1_scale=torch.ones(E, 2 * WIDTH, 1),
            w2_scale=torch.ones(E, HIDDEN, 1),
            a1_scale=None,
            a2_scale=None,
            per_act_token_quant=True,
        )
        self.moe_kernel = kernel and SimpleNamespace(fused_experts=kernel)
        parallel = SimpleNamespace(use_all2all_kernels=all2all)
        self.moe = SimpleNamespace(moe_parallel_config=parallel)
        self.launches: list[tuple[int, int]] = []

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts_input):
        assert x.shape == (len(topk_ids), HIDDEN) and x.dtype == DTYPE
        assert topk_ids.shape == topk_weights.shape == (len(x), TOP_K)
        self.launches.append((get_config()["BLOCK_SIZE_M"], len(x)))


def make_layer(method: RecordingMethod) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.quant_method = method
    layer.w13_weight = torch.empty(E, 2 * WIDTH, HIDDEN, dtype=torch.int8)
    layer.w2_weight = torch.empty(E, HIDDEN, WIDTH, dtype=torch.int8)
    layer.top_k, layer.global_num_experts, layer.expert_map = TOP_K, E, None
    return layer


def test_each_config_in_reach_is_launched(files):
    method = RecordingMethod()
    warm_up(make_worker(make_layer(method), most=1024))
    assert {block for block, _ in method.launches} == {16, 32, 64}
    # Few rows are launched as they are; of more, each remainder of 16.
    assert [m for block, m in method.launches if block == 16][:11] == [*range(1, 12)]
    for block in (16, 32, 64):
        tokens = {m for b, m in method.launches if b == block}
        assert {m % 16 for m in tokens} == set(range(16))
        assert max(tokens) < 32
    assert get_config() is None


def test_a_batch_of_few_tokens_bounds_it(files):
    method = RecordingMethod()
    warm_up(make_worker(make_layer(method), most=8))
    assert method.launches == [(16, m) for m in range(1, 9)]


def test_layers_of_one_shape_are_launched_once(files):
    methods = [RecordingMethod(), RecordingMethod()]
    warm_up(make_worker(*map(make_layer, methods)))
    assert methods[0].launches and not methods[1].launches


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(RecordingMethod(kernel=object()), marks=needs_gpu),
        RecordingMethod(all2all=True),
        SimpleNamespace(moe_quant_config=None),
        None,
    ],
    ids=["another kernel", "all-to-all", "not quantized", "no method"],
)
def test_others_are_left_alone(files, method):
    layer = make_layer(method)
    warm_up(make_worker(layer))
    assert not getattr(method, "launches", [])


def test_weights_in_host_memory_are_left_alone(files):
    method = RecordingMethod()
    worker = make_worker(make_layer(method))
    worker.device = torch.device("cuda:0")
    warm_up(worker)
    assert not method.launches


@pytest.mark.parametrize(
    "setting", [{"eager": True}, {"enable_jit_warmup": False}, {"lora": object()}]
)
def test_no_warmup_with(files, setting):
    method = RecordingMethod()
    warm_up(make_worker(make_layer(method), **setting))
    assert not method.launches


def test_the_worker_calls_it(monkeypatch):
    class Called(Exception):
        pass

    def call(worker):
        raise Called

    monkeypatch.setattr(kernel_warmup, "int8_moe_warmup", call)
    with pytest.raises(Called):
        kernel_warmup.kernel_warmup(make_worker())


@needs_gpu
@pytest.mark.parametrize("has_files", [True, False], ids=["files", "default"])
def test_nothing_compiles_later(layer_environment, request, monkeypatch, has_files):
    from triton import knobs

    if has_files:
        request.getfixturevalue("files")
    # The kernel object keeps what other tests compiled.
    fused_moe.fused_moe_kernel.device_caches.clear()
    with torch.device(DEVICE):
        layer = make_experts(
            num_experts=E,
            top_k=TOP_K,
            hidden_size=HIDDEN,
            intermediate_size=WIDTH,
            quant_config=quark_config(),
        )
        for name, param in layer.named_parameters():
            param.data.copy_(torch.ones_like(param) if "scale" in name else 1)
        layer.quant_method.process_weights_after_loading(layer)

    def run(tokens: int) -> None:
        with torch.device(DEVICE):
            ids = torch.rand(tokens, E).argsort(dim=1)[:, :TOP_K].contiguous()
            x = torch.randn(tokens, HIDDEN, dtype=DTYPE)
            weights = torch.rand(tokens, TOP_K, dtype=torch.float32)
        apply_experts(layer, x, weights, ids.to(torch.int32))

    run(8192)  # as the profile run does
    warm_up(make_worker(layer))
    compiled = []
    monkeypatch.setattr(
        knobs.runtime, "jit_post_compile_hook", lambda **info: compiled.append(info)
    )
    for tokens in (*range(1, 100), 333, 512, 513, 1000, 2303, 2304, 2305, 4097, 8191):
        run(tokens)
        assert not compiled, f"{tokens} tokens compile {compiled[0]['fn'].name}"
