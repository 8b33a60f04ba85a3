# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Small random INT8 checkpoints as AMD Quark writes them, one layer each: built,
loaded and run through vLLM's classes, and read by a float64 reference that
shares nothing with vLLM.
"""

import copy
import fnmatch
import importlib
import importlib.util
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import regex as re
import torch

from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig

from . import quantization_config
from .utils import DEVICE, apply_experts, emulate_activation, make_experts

WEIGHTS = ("per_channel", "per_tensor")
ACTIVATIONS = (
    "static_sym",
    "static_asym",
    "token_sym",
    "token_asym",
    "tensor_dynamic",
)
LINEAR = ("plain", "qkv", "gate_up", "row")
EXPERTS = ("moe_stacked", "moe_per_expert")
PACKED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
INT8 = "vllm.model_executor.layers.quantization.quark.int8"
K = 128  # input features
E, I, TOP_K = 8, 64, 2  # experts, their width, experts a token  # noqa: E741
# vLLM's layer name, and the checkpoint's modules with their output sizes
_LINEAR = {
    "plain": ("mlp.up_proj", {"mlp.up_proj": 192}),
    "row": ("self_attn.o_proj", {"self_attn.o_proj": 192}),
    "gate_up": ("mlp.gate_up_proj", {"mlp.gate_proj": 96, "mlp.up_proj": 96}),
    "qkv": (
        "self_attn.qkv_proj",
        {"self_attn.q_proj": 128, "self_attn.k_proj": 64, "self_attn.v_proj": 64},
    ),
}
_EXPERT = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_layers = itertools.count()


class MalformedError(Exception):
    """What no reading of the checkpoint makes a layer of."""


@dataclass(frozen=True)
class Case:
    kind: str
    weight: str = "per_channel"
    activation: str = "token_sym"
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kind}-{self.weight}-{self.activation}-{dtype}"


@dataclass
class Checkpoint:
    """A `quantization_config`, the tensors of one layer, its name in vLLM."""

    case: Case
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    prefix: str
    # Modules of the checkpoint, in the order of the layer's outputs.
    modules: dict[str, tuple[int, int]]


def inputs_for(case: Case, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """[T, K]; tokens and channels differ by orders of magnitude."""
    x = torch.randn(tokens, K, generator=generator)
    x *= 10 ** (torch.rand(tokens, 1, generator=generator) * 3 - 2)
    x *= 10 ** (torch.rand(1, K, generator=generator) * 1.5 - 1)
    # An offset that asymmetric schemes have to follow.
    x += 0.3 * x.abs().amax(-1, keepdim=True)
    if case.dtype == torch.float16:
        x *= 0.05
    return x.to(case.dtype)


def draw_checkpoint(
    case: Case, x: torch.Tensor, generator: torch.Generator
) -> Checkpoint:
    """A random checkpoint of `case`, static scales calibrated on `x` [T, K]."""
    number = next(_layers)
    layer = f"model.layers.{number}"
    config = quantization_config(case.weight, case.activation, ["lm_head"])
    tensors = {}
    static = case.activation.startswith("static")

    def add(module: str, n: int, k: int, inputs: torch.Tensor | None) -> None:
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
        shape = (n,) if case.weight == "per_channel" else ()
        scale = 10 ** (torch.rand(shape, generator=generator) * 2 - 4)
        tensors[f"{module}.weight"] = weight
        tensors[f"{module}.weight_scale"] = scale
        if static and inputs is not None:
            low, high = inputs.float().min(), inputs.float().max()
            if case.activation == "static_asym":
                step = (high - low) / 255
                zero = (-128 - low / step).round().clamp(-128, 127)
            else:
                step, zero = torch.maximum(-low, high) / 127, torch.zeros(())
            tensors[f"{module}.input_scale"] = step
            tensors[f"{module}.input_zero_point"] = zero.to(torch.int8)

    if case.kind in LINEAR:
        name, parts = _LINEAR[case.kind]
        modules = {f"{layer}.{part}": (n, K) for part, n in parts.items()}
        for module, (n, k) in modules.items():
            add(module, n, k, x)
        return Checkpoint(case, config, tensors, f"{layer}.{name}", modules)
    sizes = {"gate_proj": (I, K), "up_proj": (I, K), "down_proj": (K, I)}
    modules = {
        f"{layer}.moe.experts.{e}.{proj}": size
        for e in range(E)
        for proj, size in sizes.items()
    }
    for module, (n, k) in modules.items():
        seen = x
        if module.endswith("down_proj"):
            stem = module.removesuffix("down_proj")
            gate, up = (
                x.float()
                @ (
                    tensors[f"{stem}{p}.weight"].float()
                    * tensors[f"{stem}{p}.weight_scale"].reshape(-1, 1)
                ).t()
                for p in ("gate_proj", "up_proj")
            )
            seen = emulate_activation("silu", torch.cat((gate, up), -1))
        add(module, n, k, seen)
    if case.kind == "moe_stacked":
        stacked = {}
        for proj in sizes:
            first = f"{layer}.moe.experts.0.{proj}."
            for kind in [t.rpartition(".")[2] for t in tensors if t.startswith(first)]:
                stacked[f"{layer}.moe.{proj}.{kind}"] = torch.stack(
                    [
                        tensors[f"{layer}.moe.experts.{e}.{proj}.{kind}"]
                        for e in range(E)
                    ]
                )
        tensors = stacked
    return Checkpoint(case, config, tensors, f"{layer}.moe.experts", modules)


def make_checkpoint(kind: str, activation: str = "token_sym") -> Checkpoint:
    """A checkpoint of `kind`, but for its layer's number the same each time."""
    generator = torch.Generator().manual_seed(0)
    case = Case(kind, activation=activation)
    return draw_checkpoint(case, inputs_for(case, 9, generator), generator)


def quark_config(checkpoint: Checkpoint) -> QuarkConfig:
    config = QuarkConfig.from_config(copy.deepcopy(checkpoint.config))
    config.packed_modules_mapping = PACKED
    return config


def build(checkpoint: Checkpoint, config: QuarkConfig | None = None) -> torch.nn.Module:
    """The layer that vLLM builds, its parameters not loaded yet."""
    case = checkpoint.case
    config = config or quark_config(checkpoint)
    common = {"bias": False, "quant_config": config, "prefix": checkpoint.prefix}
    common["params_dtype"] = case.dtype
    if case.kind == "plain":
        return ColumnParallelLinear(K, 192, **common)
    if case.kind == "row":
        return RowParallelLinear(K, 192, reduce_results=False, **common)
    if case.kind == "gate_up":
        return MergedColumnParallelLinear(K, [96, 96], **common)
    if case.kind == "qkv":
        return QKVParallelLinear(K, 32, 4, 2, **common)
    return make_experts(
        num_experts=E,
        top_k=TOP_K,
        hidden_size=K,
        intermediate_size=I,
        params_dtype=case.dtype,
        renormalize=True,
        quant_config=config,
        prefix=checkpoint.prefix,
    )


def forget(prefix: str) -> None:
    """Let another layer take the name `prefix`."""
    names = get_current_vllm_config().compilation_config.static_forward_context
    for name in [n for n in names if n.startswith(prefix)]:
        del names[name]


def load(layer: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Hand tensors to the parameters' loaders as vLLM's models do; those that no
    parameter takes are dropped, as Step-3.5's loader drops them."""
    params = dict(layer.named_parameters())
    shards = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1}
    for name, tensor in weights:
        module, _, kind = name.rpartition(".")
        stem, _, proj = module.rpartition(".")
        if "w13_weight" in params:
            if proj not in _EXPERT:
                continue
            param_name = f"{'w2' if proj == 'down_proj' else 'w13'}_{kind}"
            if param_name not in params or ".moe" not in stem:
                continue
            expert = re.search(r"\.experts\.(\d+)$", stem)
            single = [(int(expert[1]), tensor)] if expert else enumerate(tensor)
            param = params[param_name]
            for e, part in single:
                param.weight_loader(
                    param, part, param_name, shard_id=_EXPERT[proj], expert_id=e
                )
        elif kind in params and stem == layer.prefix.rpartition(".")[0]:
            param = params[kind]
            if isinstance(layer, (QKVParallelLinear, MergedColumnParallelLinear)):
                if proj in shards:
                    param.weight_loader(param, tensor, shards[proj])
            elif proj in ("up_proj", "o_proj"):
                param.weight_loader(param, tensor)


def build_loaded(
    checkpoint: Checkpoint, config: QuarkConfig | None = None
) -> torch.nn.Module:
    """The layer with the checkpoint's tensors, as they are before `finish`."""
    torch.set_default_dtype(checkpoint.case.dtype)
    layer = build(checkpoint, config)
    load(layer, checkpoint.tensors.items())
    return layer


def finish(layer: torch.nn.Module) -> None:
    layer.quant_method.process_weights_after_loading(layer)


def routing(
    tokens: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = torch.rand(tokens, E, generator=generator).topk(TOP_K)
    return weights / weights.sum(-1, keepdim=True), ids.int()


def run(
    layer: torch.nn.Module,
    x: torch.Tensor,
    routes: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """[T, K] -> the layer's output on its device."""
    x = x.to(DEVICE)
    if not hasattr(layer, "moe_config"):
        return layer(x)[0].cpu()
    weights, ids = (r.to(DEVICE) for r in routes)
    return apply_experts(layer, x, weights, ids).cpu()


def _unquantized_experts(
    layer: torch.nn.Module, x: torch.Tensor, routes: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """float64 output of experts that were loaded in high precision."""
    out = torch.zeros(x.shape, dtype=torch.float64, device="cpu")
    for t, (weights, ids) in enumerate(zip(*routes)):
        for weight, e in zip(weights, ids):
            w13, w2 = (w[e].double().cpu() for w in (layer.w13_weight, layer.w2_weight))
            h = emulate_activation("silu", x[t : t + 1].double() @ w13.t())
            out[t] += weight.double() * (h @ w2.t())[0]
    return out


def needs_kernel(kind: str) -> None:
    """Skip the test where this vLLM has no kernel for layers of `kind`."""
    spec = importlib.util.find_spec("vllm.model_executor.layers.fused_moe.cpu_int8_moe")
    if kind in EXPERTS and DEVICE == "cpu" and spec is None:
        pytest.skip("this vLLM has no INT8 experts for CPU")


def look_at_files(
    config: QuarkConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> None:
    """Hold the headers of `tensors`, as if they lay in files, against `config`, as
    vLLM does when it makes the config. Raises ValueError naming a tensor."""
    if getattr(config, "int8", None) is None:
        return  # no INT8 layers, or a vLLM without patch 0007
    if not importlib.util.find_spec(f"{INT8}.checkpoint"):
        return
    checkpoint = importlib.import_module(f"{INT8}.checkpoint")
    names = {torch.int8: "I8", torch.bfloat16: "BF16", torch.float32: "F32"}
    names |= {torch.float16: "F16", torch.float64: "F64"}
    contents = checkpoint.Contents(
        checkpoint.Entry(n, "file", names.get(t.dtype, str(t.dtype)), tuple(t.shape))
        for n, t in tensors
    )
    for problem in checkpoint.find_problems(contents, config.int8.names):
        raise ValueError(str(problem))
    config.int8.expect(contents)


def serve(
    checkpoint: Checkpoint,
    x: torch.Tensor,
    routes: tuple[torch.Tensor, torch.Tensor],
    again: list[tuple[str, torch.Tensor]] = (),
    files: bool = True,
) -> torch.Tensor:
    """The output of the checkpoint's layer, loaded as the default loader does.

    files: the tensors lie in files, whose headers are looked at first.
    """
    vllm_config = get_current_vllm_config()
    config = quark_config(checkpoint)
    vllm_config.quant_config = config
    old_dtype = torch.get_default_dtype()
    torch.set_default_dtype(checkpoint.case.dtype)
    try:
        weights = [*checkpoint.tensors.items(), *again]
        if files:
            look_at_files(config, weights)
        with torch.device(DEVICE):
            layer = build(checkpoint, config)
            load(layer, weights)
            if hasattr(layer, "w13_weight") and layer.w13_weight.is_floating_point():
                return _unquantized_experts(layer, x, routes)
            finish(layer)
            return run(layer, x, routes)
    finally:
        vllm_config.quant_config = None
        torch.set_default_dtype(old_dtype)
        forget(checkpoint.prefix)


def quantize(
    x: torch.Tensor,
    activation: str,
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
) -> torch.Tensor:
    """float64 `x` [T, K] on the INT8 grid of `activation`.

    Scales and zero points as Quark's min-max observers choose them: amax / 127,
    or (max - min) / 255 with the range widened to hold 0.
    """
    x = x.double()
    if activation.startswith("static"):
        s, z = scale.double(), zero.double()
    elif not x.numel():
        return x
    elif activation == "token_asym":
        low = x.amin(-1, keepdim=True).clamp(max=0)
        high = x.amax(-1, keepdim=True).clamp(min=0)
        s = (high - low) / 255
        s = torch.where(s > 0, s, 1)
        z = (-128 - low / s).round()
    else:
        s = x.abs().amax(None if activation == "tensor_dynamic" else -1, keepdim=True)
        s = torch.where(s > 0, s / 127, 1)
        z = torch.zeros(())
    return ((x / s).round() + z).clamp(-128, 127).sub(z) * s


def _listed(pattern: str, module: str) -> bool:
    names = {module, module.removeprefix("model.")}
    if pattern.startswith("re:"):
        return any(re.match(pattern[3:], n) for n in names)
    if any(c in pattern for c in "*?["):
        return any(fnmatch.fnmatchcase(n, pattern) for n in names)
    return pattern in names


def activation_of(config: dict[str, Any], module: str) -> str | None:
    """How the config quantizes a module's activations; None: it is excluded.

    Raises MalformedError where it is no INT8 W8A8 scheme with symmetric weights.
    """
    names = [module]
    if name_match := re.match(r"(.*\.moe)\.experts\.\d+\.(\w+)$", module):
        # A checkpoint with stacked experts has one name for all of them.
        names += [f"{name_match[1]}.{name_match[2]}", f"{name_match[1]}.experts"]
    try:
        if any(_listed(p, n) for p in config.get("exclude") or [] for n in names):
            return None
        scheme = config["global_quant_config"]
        for pattern, layer_scheme in (config.get("layer_quant_config") or {}).items():
            if any(_listed(pattern, n) for n in names):
                scheme = layer_scheme
                break
        if config["export"] is None:
            raise MalformedError("export")
        weight, inputs = scheme["weight"], scheme["input_tensors"]
        sound = (
            weight["dtype"] == inputs["dtype"] == "int8"
            and weight["symmetric"] is True
            and weight["qscheme"] in WEIGHTS
            and not weight.get("is_dynamic")
            and (weight["qscheme"] == "per_tensor" or not weight.get("ch_axis"))
            and not scheme.get("output_tensors")
            and not scheme.get("bias")
            and isinstance(inputs["symmetric"], bool)
            and isinstance(inputs["is_dynamic"], bool)
        )
        qscheme, dynamic = inputs["qscheme"], inputs["is_dynamic"]
    except (KeyError, TypeError, AttributeError, re.error) as e:
        raise MalformedError(f"config: {e!r}") from e
    sign = "sym" if inputs["symmetric"] else "asym"
    if sound and qscheme == "per_tensor":
        return "tensor_dynamic" if dynamic else f"static_{sign}"
    tokens = dynamic and inputs.get("ch_axis") in (None, 0, 1)
    if sound and qscheme == "per_channel" and tokens:
        return f"token_{sign}"
    raise MalformedError(f"{module}: scheme")


def _tensor(checkpoint: Checkpoint, module: str, kind: str) -> torch.Tensor | None:
    """A module's tensor, an expert's from its own name or from a stacked one."""
    if name_match := re.match(r"(.*\.moe)\.experts\.(\d+)\.(\w+)$", module):
        stacked = checkpoint.tensors.get(f"{name_match[1]}.{name_match[3]}.{kind}")
        if stacked is not None:
            if stacked.dim() == 0 or stacked.size(0) not in (1, E):
                raise MalformedError(f"{module}.{kind} is not stacked")
            return stacked[int(name_match[2]) if stacked.size(0) == E else 0]
    return checkpoint.tensors.get(f"{module}.{kind}")


def _matrix(checkpoint: Checkpoint, module: str, quantized: bool) -> torch.Tensor:
    """float64 weight [N, K] of a module.

    Raises MalformedError where the tensors are no such layer."""
    n, k = checkpoint.modules[module]
    weight, scale, zero = (
        _tensor(checkpoint, module, f"weight{s}") for s in ("", "_scale", "_zero_point")
    )
    if weight is None or weight.shape != (n, k):
        raise MalformedError(f"{module}.weight")
    if not quantized:
        if not weight.is_floating_point():
            raise MalformedError(f"{module}.weight is not quantized")
        return weight.double()
    if weight.dtype != torch.int8:
        raise MalformedError(f"{module}.weight")
    if scale is None or not scale.is_floating_point():
        raise MalformedError(f"{module}.weight_scale")
    if max(scale.shape, default=1) != scale.numel() or scale.numel() not in (1, n):
        raise MalformedError(f"{module}.weight_scale {tuple(scale.shape)}")
    if zero is not None and zero.ne(0).any():
        raise MalformedError(f"{module}.weight_zero_point")
    scale = scale.double().reshape(-1, 1)
    dead = (weight == 0).all(1, keepdim=True)
    if not torch.isfinite(scale).all() or ((scale <= 0) & ~((scale == 0) & dead)).any():
        raise MalformedError(f"{module}.weight_scale value")
    return weight.double() * scale


def reference(
    checkpoint: Checkpoint,
    x: torch.Tensor,
    routes: tuple[torch.Tensor, torch.Tensor],
    activation: str | None = None,
) -> torch.Tensor:
    """float64 output [T, N] that the checkpoint's numbers say.

    activation: another scheme of the activations than the checkpoint's.
    Raises MalformedError where the checkpoint says nothing sound.
    """

    def product(x: torch.Tensor, module: str) -> torch.Tensor:
        scheme = activation_of(checkpoint.config, module)
        weight = _matrix(checkpoint, module, scheme is not None)
        if scheme is None:
            return x.double() @ weight.t()
        scheme = activation or scheme
        scale = zero = None
        if scheme.startswith("static"):
            scale = _tensor(checkpoint, module, "input_scale")
            zero = _tensor(checkpoint, module, "input_zero_point")
            if scale is None or scale.numel() != 1 or not scale.is_floating_point():
                raise MalformedError(f"{module}.input_scale")
            if not (torch.isfinite(scale).all() and scale > 0):
                raise MalformedError(f"{module}.input_scale value")
            if zero is None and scheme == "static_sym":
                zero = torch.zeros(())
            if zero is None or zero.numel() != 1:
                raise MalformedError(f"{module}.input_zero_point")
            if scheme == "static_sym" and zero != 0:
                raise MalformedError(f"{module}.input_zero_point value")
            scale, zero = scale.reshape(()), zero.reshape(())
        return quantize(x, scheme, scale, zero) @ weight.t()

    if checkpoint.case.kind in LINEAR:
        return torch.cat([product(x, m) for m in checkpoint.modules], -1)

    def store(h: torch.Tensor) -> torch.Tensor:
        # The GPU kernels store in the model's dtype between the two products.
        return h.to(checkpoint.case.dtype).double() if DEVICE == "cuda" else h

    out = torch.zeros(x.shape[0], K, dtype=torch.float64)
    stem = checkpoint.prefix
    for e in range(E):
        tokens, slots = (routes[1] == e).nonzero(as_tuple=True)
        gate_up = [product(x[tokens], f"{stem}.{e}.{p}_proj") for p in ("gate", "up")]
        h = store(emulate_activation("silu", store(torch.cat(gate_up, -1))))
        h = product(h, f"{stem}.{e}.down_proj")
        out[tokens] += h * routes[0][tokens, slots].double().unsqueeze(-1)
    return out


def deviation(out: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Error over the norm, and the worst token's over its own norm (at least a
    thousandth of the largest token's: below that a static grid holds zeros)."""
    error = out.double() - expected
    if not torch.isfinite(error).all():
        return float("inf"), float("inf")
    norms = expected.norm(dim=-1)
    floor = (1e-3 * norms.max()).clamp(min=1e-30)
    relative = error.norm() / expected.norm().clamp(min=1e-30)
    return relative.item(), (error.norm(dim=-1) / norms.clamp(min=floor)).max().item()


def is_right(out: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within 1 % of the norm, the worst token within 3 %."""
    error, worst = deviation(out, expected)
    return error <= 0.01 and worst <= 0.03


@dataclass
class Cell:
    """How a case is served: right, "per token" (right for per-token activations,
    and said so), refused (by name, at load), stops (any other error), garbage."""

    status: str
    error: float = 0.0
    worst: float = 0.0
    detail: str = ""


def serve_case(case: Case, seed: int = 1, tokens: int = 33) -> Cell:
    """Serve a random checkpoint of `case` and judge the output."""
    generator = torch.Generator().manual_seed(seed)
    x = inputs_for(case, tokens, generator)
    checkpoint = draw_checkpoint(case, x, generator)
    routes = routing(tokens, generator)
    try:
        out = serve(checkpoint, x, routes)
    except Exception as e:
        named = checkpoint.prefix.rpartition(".")[0] in str(e)
        detail = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        return Cell("refused" if named else "stops", detail=detail)
    expected = reference(checkpoint, x, routes)
    exact = deviation(out, expected)
    if case.activation != "token_sym":
        for served in ("token_sym", "token_asym"):
            token = reference(checkpoint, x, routes, served)
            nearer = 2 * deviation(out, token)[0] < exact[0]
            if is_right(out, token) and (nearer or not is_right(out, expected)):
                # Right numbers of another scheme than the checkpoint's.
                return Cell("per token", *deviation(out, token), detail=served)
    right = exact[0] <= 0.01 and exact[1] <= 0.03
    return Cell("right" if right else "garbage", *exact)
