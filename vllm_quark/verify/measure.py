# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Layer by layer: how far vLLM's output is from what the checkpoint's numbers say."""

import gc
import importlib.util
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_quark.checkpoint import Checkpoint
from vllm_quark.verify.build import TOP_K, Builder, name_kernel
from vllm_quark.verify.emulate import Numbers, emulate_experts, emulate_linear
from vllm_quark.verify.layers import Layer

# Of the norm of a layer's output, and of a token's own (at least a thousandth of the largest token's).
LIMIT, TOKEN_LIMIT = 0.01, 0.03
TOKENS = 32
RIGHT, OTHER, OFF, STOPS = "right", "right, other activations", "off", "stops"


@dataclass
class Row:
    """What one layer came to.

    error: of the output, over its norm (infinite where that has no number); worst: the worst token's, over its own.
    status: RIGHT; OTHER: right for other activations than the checkpoint's, which vLLM says when it serves; OFF;
    STOPS: vLLM raised an error.
    """

    layer: str
    kind: str
    shape: str
    scheme: str
    status: str = STOPS
    error: float | None = None
    worst: float | None = None
    kernel: str = ""
    detail: str = ""
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        return self.status in (RIGHT, OTHER)


def describe_machine(device: str) -> dict[str, str]:
    """What a report says of where it was made."""
    import vllm

    name = platform.processor() or platform.machine()
    if device != "cpu":
        name = getattr(torch, device).get_device_name()
    else:
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    has_series = importlib.util.find_spec("vllm.model_executor.layers.quantization.quark.int8") is not None
    machine = {"vLLM": f"{vllm.__version__}, {'with' if has_series else 'without'} vllm-quark's series"}
    machine |= {"torch": torch.__version__, "device": f"{device}: {name}"}
    machine["ROCm or CUDA"] = str(getattr(torch.version, "hip", None) or torch.version.cuda or "none")
    try:
        import triton

        machine["triton"] = triton.__version__
    except ImportError:
        machine["triton"] = "none"
    return machine | {"Python": platform.python_version(), "system": platform.platform()}


def make_inputs(layer: Layer, numbers: Numbers, dtype: torch.dtype) -> torch.Tensor:
    """[T, K]; tokens and channels differ by orders of magnitude, within what a static scale can say."""
    generator = torch.Generator().manual_seed(1)
    tokens, columns = TOKENS, layer.shape[-1]
    if layer.kind == "experts":
        tokens = max(TOKENS, math.ceil(layer.shape[0] / min(TOP_K, layer.shape[0])))
    x = torch.randn(tokens, columns, generator=generator)
    x *= 10 ** (torch.rand(tokens, 1, generator=generator) * 3 - 2)
    x *= 10 ** (torch.rand(1, columns, generator=generator) * 1.5 - 1)
    # An offset that zero points have to follow.
    x += 0.3 * x.abs().amax(-1, keepdim=True)
    scale = None
    if layer.scheme is not None and layer.scheme.static:
        scale = numbers.get(0, "input_scale", 0 if layer.kind == "experts" else None)
        zero = numbers.get(0, "input_zero_point", 0 if layer.kind == "experts" else None)
    if scale is not None:
        step = scale.float().max().item()
        zero_value = 0.0 if layer.scheme.symmetric or zero is None else zero.float().reshape(-1)[0].item()
        low, high = (-127 - zero_value) * step, (127 - zero_value) * step
        x = (x / max(x.max().item() / high, x.min().item() / low, 1e-30)) if low < 0 < high else x * step
        # A value between two steps may go to either: some kernels add an odd zero point before they round.
        quotients = x.to(dtype).double() / step
        x[((quotients - quotients.floor()) - 0.5).abs() < 1e-3] = 0
    elif dtype == torch.float16:
        x *= 0.05
    return x.to(dtype)


def make_routes(layer: Layer, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids [T, top_k] of experts: all of them are used."""
    experts = layer.shape[0] if layer.kind == "experts" else 1
    top_k = min(TOP_K, experts)
    generator = torch.Generator().manual_seed(2)
    order = torch.randperm(experts, generator=generator)
    ids = order[torch.arange(tokens * top_k) % experts].reshape(tokens, top_k)
    weights = torch.rand(tokens, top_k, generator=generator) + 0.1
    return weights / weights.sum(-1, keepdim=True), ids.int()


def deviate(out: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Error over the norm, and the worst token's over its own norm."""
    error = out.double() - expected
    if not torch.isfinite(error).all():
        return math.inf, math.inf
    norms = expected.norm(dim=-1)
    floor = (1e-3 * norms.max()).clamp(min=1e-30)
    relative_error = error.norm() / expected.norm().clamp(min=1e-30)
    return relative_error.item(), (error.norm(dim=-1) / norms.clamp(min=floor)).max().item()


def _read_schemes(layer: Layer) -> Iterator[tuple[str, Any]]:
    """How a layer's activations may be quantized: as the checkpoint says, then as kernels serve that."""
    scheme = layer.scheme
    yield RIGHT, scheme
    if scheme is not None:
        served = scheme.for_experts() if layer.kind == "experts" else scheme.for_linear()
        # Kernels without zero points (Triton's) take symmetric ones, per token.
        for other in (served, replace(served, static=False, per_token=True, symmetric=True)):
            if other != scheme:
                yield OTHER, other


def measure_layers(checkpoint: Checkpoint, layers: list[Layer], builder: Builder) -> Iterator[Row]:
    """A row for each layer, in memory for one."""
    for layer in layers:
        start = time.perf_counter()
        shape = " × ".join(map(str, layer.shape))
        row = Row(layer.name, layer.kind, shape, "in `exclude`" if layer.scheme is None else str(layer.scheme))
        try:
            _measure(checkpoint, layer, builder, row)
        except Exception as e:  # whatever vLLM and its kernels raise is the answer
            row.detail = " ".join(f"{type(e).__name__}: {e}".split())[:500]
        finally:
            builder.forget(layer)
            gc.collect()
            if builder.device != "cpu":
                getattr(torch, builder.device).empty_cache()
        row.seconds = round(time.perf_counter() - start, 2)
        yield row


def _measure(checkpoint: Checkpoint, layer: Layer, builder: Builder, row: Row) -> None:
    numbers = Numbers(layer, checkpoint.modules)
    x = make_inputs(layer, numbers, builder.dtype).to(builder.device)
    weights, ids = (t.to(builder.device) for t in make_routes(layer, len(x)))
    module = builder.build(layer, numbers)
    row.kernel = name_kernel(module)
    out = builder.run(module, x, (weights, ids))
    del module
    # Kernels of GPUs keep the steps between an expert's two products in the model's dtype.
    store = builder.dtype if builder.device != "cpu" else None
    for status, scheme in _read_schemes(layer):
        if layer.kind == "experts":
            expected = emulate_experts(x, numbers, scheme, weights, ids, store)
        else:
            expected = emulate_linear(x, numbers, scheme)
        error, worst = deviate(out, expected)
        if row.error is None or (error <= LIMIT and worst <= TOKEN_LIMIT):
            row.error, row.worst, row.status = error, worst, OFF
        if error <= LIMIT and worst <= TOKEN_LIMIT:
            row.status = status
            if status == OTHER:
                row.detail = f"served with {scheme.inputs()} activations"
            return
    if not torch.isfinite(out).all():
        row.detail = "its output has NaN or infinite values"
