# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""What a layer's numbers say, in float64. Nothing of vLLM: torch's own products alone."""

from typing import Any

import torch
import torch.nn.functional as F

from vllm_quark.verify.layers import Layer
from vllm_quark.verify.tensors import read_tensor

# Rows whose float64 weights are made at once, in elements.
CHUNK = 1 << 24
# Step-3.5's limit of routed experts.
LIMIT = 7.0


class Numbers:
    """The tensors of one layer, read when they are asked for."""

    def __init__(self, layer: Layer, modules: Any) -> None:
        self.layer = layer
        self._modules = modules.contents.modules
        self._is_stacked = modules.is_stacked

    def get(self, part: int, kind: str, expert: int | None = None) -> torch.Tensor | None:
        """A tensor of a part of the layer (of one expert's), or None: there is none."""
        modules = self.layer.parts[part]
        is_stacked = expert is not None and self._is_stacked(modules[0])
        entry = self._modules[modules[0] if is_stacked or expert is None else modules[expert]].get(kind)
        return None if entry is None else read_tensor(entry, expert if is_stacked and entry.shape else None)

    def rows(self, part: int) -> int:
        """Rows of the weight of a part of a linear layer."""
        rows: int = self._modules[self.layer.parts[part][0]]["weight"].shape[0]
        return rows

    def kinds(self, part: int, expert: int | None = None) -> list[str]:
        """What there is beside a weight, and that."""
        modules = self.layer.parts[part]
        return list(self._modules[modules[0] if expert is None or self._is_stacked(modules[0]) else modules[expert]])


def quantize(x: torch.Tensor, scheme: Any, scale: torch.Tensor | None, zero: torch.Tensor | None) -> torch.Tensor:
    """float64 `x` [T, K] on the INT8 grid that `scheme` has for activations.

    scale, zero: of static ones. Dynamic ones are chosen as Quark's min-max observers do: amax / 127, or
    (max - min) / 255 with the range widened to hold 0; of a token, or of all of `x`.
    """
    if not x.numel():
        return x
    z = torch.zeros((), dtype=torch.float64, device=x.device)
    if scheme.static:
        if scale is None:
            raise ValueError("the scheme is static, and there is no input_scale")
        s = scale.double().reshape(()).to(x.device)
        if zero is not None and not scheme.symmetric:
            z = zero.double().reshape(()).to(x.device)
    else:
        dims = (-1,) if scheme.per_token else (0, 1)
        if scheme.symmetric:
            s = x.abs().amax(dims, keepdim=True) / 127
        else:
            low, high = x.amin(dims, keepdim=True).clamp(max=0), x.amax(dims, keepdim=True).clamp(min=0)
            s = (high - low) / 255
        s = torch.where(s > 0, s, 1)
        if not scheme.symmetric:
            z = (-128 - low / s).round()
    return ((x / s).round() + z).clamp(-128, 127).sub(z) * s


def _multiply(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """float64 x [T, K] by weight [N, K] with scales [N], [N, 1] or one value (None: it is no INT8) -> [T, N]."""
    step = max(1, CHUNK // max(1, weight.shape[1]))
    outs = []
    scales = None if scale is None else scale.double().reshape(-1, 1).expand(weight.shape[0], 1).to(x.device)
    for start in range(0, weight.shape[0], step):
        part = weight[start : start + step].to(x.device).double()
        outs.append(x @ (part if scales is None else part * scales[start : start + step]).t())
    return torch.cat(outs, -1)


def _project(x: torch.Tensor, numbers: Numbers, scheme: Any, part: int, expert: int | None = None) -> torch.Tensor:
    weight, scale = (numbers.get(part, kind, expert) for kind in ("weight", "weight_scale"))
    assert weight is not None
    x = x.double()
    if scheme is not None:
        is_static = scheme.static
        input_numbers = [
            numbers.get(part, f"input_{k}", expert) if is_static else None for k in ("scale", "zero_point")
        ]
        x = quantize(x, scheme, *input_numbers)
    out = _multiply(x, weight, scale if scheme is not None else None)
    bias = numbers.get(part, "bias", expert)
    return out if bias is None else out + bias.double().to(out.device)


def emulate_linear(x: torch.Tensor, numbers: Numbers, scheme: Any) -> torch.Tensor:
    """float64 output [T, N] of a linear layer for x [T, K]; scheme None: it is not quantized."""
    return torch.cat([_project(x, numbers, scheme, part) for part in range(len(numbers.layer.parts))], -1)


def activate(name: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Gate and up [T, N] of an expert -> [T, N]; "swiglustep" is Step-3.5's SwiGLU with a limit."""
    if name == "gelu":
        return F.gelu(gate) * up
    gate = F.silu(gate)
    return gate * up if name == "silu" else gate.clamp(max=LIMIT) * up.clamp(-LIMIT, LIMIT)


def emulate_experts(
    x: torch.Tensor, numbers: Numbers, scheme: Any, weights: torch.Tensor, ids: torch.Tensor, store: torch.dtype | None
) -> torch.Tensor:
    """float64 output [T, K] of experts for x [T, K], routed by weights and ids [T, top_k].

    store: the dtype that a kernel keeps the steps between its two products in (None: it does not round them).
    """

    def keep(h: torch.Tensor) -> torch.Tensor:
        return h if store is None else h.to(store).double()

    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in range(numbers.layer.shape[0]):
        tokens, slots = (ids == expert).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        gate, up = (keep(_project(x[tokens], numbers, scheme, part, expert)) for part in (0, 1))
        h = keep(activate(numbers.layer.activation, gate, up))
        h = _project(h, numbers, scheme, 2, expert)
        out.index_add_(0, tokens, h * weights[tokens, slots].double().unsqueeze(-1))
    return out
