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
from vllm.model_executor.layers.fused_moe.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    int8_w8a8_moe_quant_config,
)
from vllm.model_executor.warmup import kernel_warmup
from vllm.platforms import current_platform

from .utils import DEVICE, DTYPE, apply_experts, make_experts, quark_config

needs_gpu = pytest.mark.skipif(not current_platform.is_cuda_alike(), reason="no GPU")

E, TOP_K, WIDTH, HIDDEN = 48, 4, 128, 256
STEADY = E // TOP_K  # from here on only what divides the rows tells kernels apart
# Counts of tokens that have a config of their own, and its BLOCK_SIZE_M and _N. Some
# are taken by few counts, one by a few tokens only.
BLOCKS = {
    1: (16, 64),
    8: (16, 32),
    24: (16, 128),
    28: (32, 64),
    32: (32, 128),
    512: (64, 64),
    4096: (128, 64),
}
CONFIGS = {
    tokens: {
        "BLOCK_SIZE_M": rows,
        "BLOCK_SIZE_N": columns,
        "BLOCK_SIZE_K": 64,
        "GROUP_SIZE_M": 1,
        "num_warps": 4,
        "num_stages": 3,
    }
    for tokens, (rows, columns) in BLOCKS.items()
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The file of CONFIGS, under every name that is looked for."""
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

    def __init__(self, kernel: object = None, per_token: bool = True, **parallel):
        self.moe_quant_config = int8_w8a8_moe_quant_config(
            w1_scale=torch.ones(E, 2 * WIDTH, 1),
            w2_scale=torch.ones(E, HIDDEN, 1),
            a1_scale=None,
            a2_scale=None,
            per_act_token_quant=per_token,
        )
        self.moe_kernel = kernel and SimpleNamespace(fused_experts=kernel)
        settings = {"dp_size": 1, "use_all2all_kernels": False} | parallel
        self.moe = SimpleNamespace(moe_parallel_config=SimpleNamespace(**settings))
        self.launches: list[tuple[tuple, int]] = []

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts_input):
        assert x.shape == (len(topk_ids), HIDDEN) and x.dtype == DTYPE
        assert topk_ids.shape == topk_weights.shape == (len(x), TOP_K)
        # The order counts: Triton tells kernels apart by it.
        self.launches.append((tuple(get_config().items()), len(x)))


def make_layer(method: object, experts: int = E, mapped: bool = False):
    layer = torch.nn.Module()
    layer.quant_method = method
    for name, shape in (("w13", (2 * WIDTH, HIDDEN)), ("w2", (HIDDEN, WIDTH))):
        weight = torch.empty(E, *shape, dtype=torch.int8)
        param = torch.nn.Parameter(weight, requires_grad=False)
        layer.register_parameter(f"{name}_weight", param)
    layer.top_k, layer.global_num_experts = TOP_K, experts
    layer.expert_map = torch.arange(experts) if mapped else None
    layer.apply_router_weight_on_input = False
    return layer


def launches_of(method: RecordingMethod, key: int) -> set[int]:
    """Counts of tokens that were launched with the config of CONFIGS at `key`."""
    config = tuple(CONFIGS[key].items())
    return {tokens for launched, tokens in method.launches if launched == config}


def test_each_config_in_reach_is_launched(files):
    method = RecordingMethod()
    warm_up(make_worker(make_layer(method), most=2048))
    assert {config for config, _ in method.launches} == {
        tuple(config.items()) for tokens, config in CONFIGS.items() if tokens <= 512
    }
    # Few tokens are launched as they are; of more, each remainder of 16.
    many = set(range(STEADY, STEADY + 16))
    assert launches_of(method, 1) == {1, 2, 3, 4}
    assert launches_of(method, 8) == {*range(5, STEADY), *many}
    for key in (24, 28, 32, 512):
        assert launches_of(method, key) == many
    assert get_config() is None


def test_a_batch_of_few_tokens_bounds_it(files):
    method = RecordingMethod()
    warm_up(make_worker(make_layer(method), most=6))
    assert [tokens for _, tokens in method.launches] == [*range(1, 7)]


def test_layers_that_are_compiled_alike_are_launched_once(files):
    methods = [RecordingMethod(), RecordingMethod()]
    warm_up(make_worker(*map(make_layer, methods)))
    assert methods[0].launches and not methods[1].launches


@pytest.mark.parametrize(
    "experts, mapped, per_token",
    [(2 * E, False, True), (E, True, True), (E, False, False)],
    ids=["experts", "map", "scheme"],
)
def test_layers_that_are_not_are_launched_each(files, experts, mapped, per_token):
    methods = [RecordingMethod(), RecordingMethod(per_token=per_token)]
    other = make_layer(methods[1], experts, mapped)
    warm_up(make_worker(make_layer(methods[0]), other))
    assert methods[0].launches and methods[1].launches


@pytest.mark.parametrize(
    "settings",
    [{"kernel": object()}, {"use_all2all_kernels": True}, {"dp_size": 2}],
    ids=["another kernel", "all-to-all", "data parallel"],
)
def test_others_are_left_alone(files, settings):
    method = RecordingMethod(**settings)
    warm_up(make_worker(make_layer(method), torch.nn.Linear(1, 1)))
    assert not method.launches


def test_what_is_not_int8_is_left_alone(files):
    method = RecordingMethod()
    method.moe_quant_config = FUSED_MOE_UNQUANTIZED_CONFIG
    warm_up(make_worker(make_layer(method)))
    assert not method.launches


def test_weights_in_host_memory_are_left_alone(files):
    method = RecordingMethod()
    layer = make_layer(method)
    layer.w2_weight = torch.nn.Parameter(layer.w2_weight.to("meta"), False)
    warm_up(make_worker(layer))
    assert not method.launches


def test_a_vllm_without_the_setting_warms_up(files):
    method = RecordingMethod()
    worker = make_worker(make_layer(method), most=1)
    del worker.vllm_config.kernel_config.enable_jit_warmup
    warm_up(worker)
    assert method.launches


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
