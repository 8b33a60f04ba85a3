# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""A tiny model as a Quark INT8 checkpoint, and what its numbers say, by Transformers' own model in float32.

The layout is written by hand after AMD Quark 0.13's (1-D `weight_scale`, no zero points for symmetric weights, experts
split, `exclude` in full names); tests/e2e/static_exports.py has Quark's own exports.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from .architectures import VOCABULARY, Architecture
from .variants import Scheme, Variant, matches

Tensors = dict[str, torch.Tensor]
# The folder of a checkpoint's LoRA adapter; its rank and scale (https://arxiv.org/abs/2106.09685, section 4.1).
ADAPTER = "adapter"
_RANK, _ALPHA = 4, 8


def prompts() -> torch.Tensor:
    """Token ids [4, 48]."""
    return torch.randint(3, VOCABULARY, (4, 48), generator=torch.Generator().manual_seed(2))


def read(folder: Path) -> Tensors:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def split_experts(tensors: Tensors) -> Tensors:
    """Experts' stacked tensors one by one, as AMD Quark's SplitFusedExperts does; others as they are."""
    result = {}
    for name, tensor in tensors.items():
        stem, _, leaf = name.removesuffix(".weight").rpartition(".")
        if tensor.dim() != 3 or not stem.endswith(".experts") or leaf not in ("gate_up_proj", "down_proj"):
            result[name] = tensor
            continue
        for number, matrix in enumerate(tensor):
            if leaf == "down_proj":
                result[f"{stem}.{number}.down_proj.weight"] = matrix.t()
                continue
            for part, half in zip(("gate_proj", "up_proj"), matrix.t().chunk(2), strict=True):
                result[f"{stem}.{number}.{part}.weight"] = half
    return {name: t.contiguous() for name, t in result.items()}


def linear_modules(tensors: Tensors) -> list[str]:
    """Modules whose weight AMD Quark quantizes: matrices, but for embeddings."""
    names = [n.removesuffix(".weight") for n, t in tensors.items() if n.endswith(".weight") and t.dim() == 2]
    return [n for n in names if "embed" not in n.rpartition(".")[2]]


def quantize(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [N, K], INT8 or FP8, and its scales, float32 [N], [1] or [N, K / 32]: round(w / s), s = max |w| / 127."""
    rows, columns = weight.shape
    groups = {"per_tensor": (1, -1), "per_channel": (rows, -1), "per_group": (rows * columns // 32, -1)}[scheme.weight]
    weight = weight.float().reshape(groups)
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / (127 if scheme.dtype == "int8" else 448)
    parts = weight / scale
    parts = parts.round().clamp(-127, 127).to(torch.int8) if scheme.dtype == "int8" else parts.to(torch.float8_e4m3fn)
    return parts.reshape(rows, columns), scale.reshape(rows, -1) if scheme.weight == "per_group" else scale.flatten()


def dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The inverse of `quantize`, float32 [N, K]."""
    return (weight.float().reshape(scale.numel(), -1) * scale.reshape(-1, 1)).reshape(weight.shape)


class Products(TorchFunctionMode):
    """Calls `look(x, weight)` for the input of each product with a weight, and goes on with what it returns."""

    def __init__(self, look: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.look = look

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.linear, torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__):
            x, weight, *rest = args
            args = (self.look(x, weight), weight, *rest)
        return func(*args, **(kwargs or {}))


def fake_quantize(x: torch.Tensor, scheme: Scheme, scale: float, zero: int) -> torch.Tensor:
    """x through INT8 and back: one scale per token, or the static `scale` and zero point."""
    if scheme.activation == "none":
        return x
    if scheme.activation == "static":
        return (((x / scale).round() + zero).clamp(-128, 127) - zero) * scale
    if scheme.dtype != "int8":
        token_scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 448
        return (x / token_scale).to(torch.float8_e4m3fn).float() * token_scale
    if scheme.symmetric:
        token_scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
        return (x / token_scale).round() * token_scale
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    token_scale = ((high - low) / 255).clamp(min=1e-9)
    offset = (-128 - low / token_scale).round()
    return (((x / token_scale).round() + offset).clamp(-128, 127) - offset) * token_scale


class Reference:
    """Transformers' model of a checkpoint in the published layout; which of its weights are which modules'."""

    def __init__(self, folder: Path, architecture: Architecture, tensors: Tensors, work: Path) -> None:
        """tensors: of the checkpoint, in any dtype."""
        self.architecture = architecture
        self.work, self.folder, self.layout = work, folder, tensors
        self.split = split_experts if architecture.splits else dict
        self.modules = linear_modules(self.split(tensors))
        numbers = {module: float(number) for number, module in enumerate(self.modules, 1)}
        marks = {
            name: torch.full_like(t, numbers.get(name.removesuffix(".weight"), 0), dtype=torch.float32)
            for name, t in self.split(tensors).items()
        }
        self.names = {
            name: [self.modules[int(n) - 1] for n in param.unique().tolist() if n > 0]
            for name, param in self.load(marks).named_parameters()
        }

    def load(self, tensors: Tensors, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """The model with these `tensors`, experts one by one or stacked."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        for file in self.folder.glob("*.json"):
            if file.name not in ("expected.json", "model.safetensors.index.json"):
                shutil.copy(file, self.work)
        save_file(_stack_as(tensors, self.layout), self.work / "model.safetensors", {"format": "pt"})
        model_class = getattr(transformers, self.architecture.model)
        model, info = model_class.from_pretrained(
            self.work, dtype=dtype, experts_implementation="eager", output_loading_info=True
        )
        assert not info["missing_keys"] and not info["mismatched_keys"], info
        return model.eval()

    def run(
        self,
        model: torch.nn.Module,
        look: Callable[[str, torch.Tensor], torch.Tensor],
        adapter: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> torch.Tensor:
        """Log-probabilities [B, T, V]; `look(module, x)` sees the input of each linear module.

        adapter: A [rank, K] and B [N, rank] of modules whose output B A x is added to.
        """
        for name, modules in self.names.items() if adapter else ():
            if pair := adapter.get(modules[0] if modules else ""):
                down, up = (t.to(model.dtype) for t in pair)
                model.get_submodule(name.removesuffix(".weight")).register_forward_hook(
                    lambda _, inputs, out, down=down, up=up: out + inputs[0] @ down.t() @ up.t() * (_ALPHA / _RANK)
                )
        owners = {p.untyped_storage().data_ptr(): self.names[name] for name, p in model.named_parameters()}

        def by_weight(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            modules = owners.get(weight.untyped_storage().data_ptr())
            return look(modules, x) if modules else x

        with torch.no_grad(), Products(by_weight):
            return model(input_ids=prompts()).logits.float().log_softmax(-1)


def _stack_as(tensors: Tensors, layout: Tensors) -> Tensors:
    """The inverse of `split_experts` for those that `layout` has stacked."""
    result = {name: t for name, t in tensors.items() if name in layout}
    for name in layout.keys() - result.keys():
        stem, _, leaf = name.removesuffix(".weight").rpartition(".")
        parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
        matrices = [
            torch.cat([tensors[f"{stem}.{number}.{part}.weight"] for part in parts]).t()
            for number in range(len(layout[name]))
        ]
        result[name] = torch.stack(matrices)
    return {name: t.contiguous() for name, t in result.items()}


def save(architecture: Architecture, out: Path) -> None:
    """Write `out`: the BF16 model, and expected.json with what it computes in float32 and in BF16."""
    architecture.build().bfloat16().save_pretrained(out)
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | architecture.published, indent=1))
    tensors = read(out)
    reference = Reference(out, architecture, tensors, out / "work")
    _write_expected(reference, tensors, lambda modules, x: x, out)


def _write_expected(
    reference: "Reference", tensors: Tensors, look: Callable, out: Path, adapter: dict | None = None
) -> None:
    page = {"ids": prompts().tolist()}
    for reading, dtype in (("exact", torch.float32), ("bf16", torch.bfloat16)):
        page[reading] = reference.run(reference.load(tensors, dtype), look, adapter).tolist()
    shutil.rmtree(reference.work)
    (out / "expected.json").write_text(json.dumps(page))


def export(architecture: Architecture, variant: Variant, source: Path, out: Path) -> None:
    """Write `out`: the INT8 checkpoint of the BF16 one in `source`, and expected.json beside it.

    expected.json: token `ids` [B, T], and log-probabilities [B, T, V] of `exact` (the float32 model whose quantized
    layers compute what the exported numbers say) and `bf16` (the same in BF16: the yardstick).
    """
    published = read(source)
    reference = Reference(source, architecture, published, out / "work")
    tensors = reference.split(published)
    kept = [m for m in reference.modules if variant.stays(m, architecture.router)]
    quantized = [m for m in reference.modules if m not in kept]
    ranges = _calibrate(reference, tensors)
    result, dequantized, inputs = dict(tensors), {n: t.float() for n, t in tensors.items()}, {}
    for module in quantized:
        scheme = variant.scheme_of(module)
        if scheme.weight == "none":
            continue
        weight, scale = quantize(tensors[f"{module}.weight"], scheme)
        result[f"{module}.weight"], result[f"{module}.{variant.scale}"] = weight, scale
        dequantized[f"{module}.weight"] = dequantize(weight, scale)
        static_scale, zero = 0.0, 0
        if scheme.activation == "static":
            low, high = ranges.get(module, (-1.0, 1.0))  # as Quark's default for experts that saw no token
            static_scale = max(-low, high) / 127 if scheme.symmetric else max((high - low) / 255, 1e-6)
            zero = 0 if scheme.symmetric else round(-128 - low / static_scale)
            result[f"{module}.input_scale"] = torch.tensor(static_scale)
            if not scheme.symmetric:
                result[f"{module}.input_zero_point"] = torch.tensor(zero, dtype=torch.int8)
        if matches(module, variant.rotated):
            result[f"{module}.input_rotation"] = torch.eye(weight.shape[1], dtype=torch.bfloat16)
        if matches(module, variant.kv):
            result[f"{module}.output_scale"] = torch.tensor(0.02)
        if ".experts." in module and scheme.activation != "none":  # served per token
            scheme = Scheme(scheme.weight)
        inputs[module] = (scheme, static_scale, zero)

    def look(modules: list[str], x: torch.Tensor) -> torch.Tensor:
        tensors = {inputs.get(m) for m in modules}
        assert len(tensors) == 1 or all(".experts." in m for m in modules), modules
        first = inputs.get(modules[0])
        return x if first is None else fake_quantize(x.float(), *first).to(x.dtype)

    for file in source.glob("*.json"):
        if file.name not in ("expected.json", "model.safetensors.index.json"):
            shutil.copy(file, out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = variant.to_config(kept, architecture.router)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    save_file({n: t.contiguous() for n, t in result.items()}, out / "model.safetensors", {"format": "pt"})
    adapter = {m: tensors[f"{m}.weight"].shape for m in quantized if matches(m, variant.adapter)}
    _write_expected(reference, dequantized, look, out, _save_adapter(adapter, out / ADAPTER) if adapter else None)


def _save_adapter(shapes: dict[str, torch.Size], out: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Write a random LoRA adapter in PEFT's layout for modules [N, K]; their A and B."""
    generator, result, tensors = torch.Generator().manual_seed(3), {}, {}
    for module, (rows, columns) in shapes.items():
        down = torch.randn(_RANK, columns, generator=generator).bfloat16() * columns**-0.5
        up = torch.randn(rows, _RANK, generator=generator).bfloat16() * 0.25
        result[module] = (down, up)
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": _ALPHA, "bias": "none"}
    config["target_modules"] = sorted({module.rpartition(".")[2] for module in shapes})
    (out / "adapter_config.json").write_text(json.dumps(config))
    return result


def _calibrate(reference: Reference, tensors: Tensors) -> dict[str, tuple[float, float]]:
    """Smallest and largest input of each linear module over the prompts."""
    ranges: dict[str, tuple[float, float]] = {}

    def look(modules: list[str], x: torch.Tensor) -> torch.Tensor:
        for module in modules if x.numel() else ():
            low, high = ranges.get(module, (0.0, 0.0))
            ranges[module] = (min(low, x.min().item()), max(high, x.max().item()))
        return x

    reference.run(reference.load({n: t.float() for n, t in tensors.items()}), look)
    return ranges
