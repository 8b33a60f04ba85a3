# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The native operators of csrc/cpu/int8_moe: INT8 experts and their router on CPU."""

import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch

from vllm import envs

# Where vLLM's own build puts it. It has no Python in it: it is not imported.
_MODULE = f"{__name__.partition('.')[0]}._int8_moe_C"


def _library() -> Path | None:
    """The library's file: the one that VLLM_INT8_MOE_LIBRARY names (empty: none),
    or the one of vLLM's own build."""
    named = getattr(envs, "VLLM_INT8_MOE_LIBRARY", None)
    if named is not None:
        return Path(named) if named else None
    spec = importlib.util.find_spec(_MODULE)
    return Path(spec.origin) if spec and spec.origin else None


@functools.cache
def find_native() -> tuple[Any | None, str]:
    """Namespace of the operators, or None, and where it is from, or why it is not."""
    library = _library()
    if library is None:
        return None, (
            f"the native operator ({_MODULE}) is not built: it needs a C++ compiler "
            "and CMake at installation"
        )
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        cause = error.__cause__ or error
        return None, f"{library} does not load ({cause}): build it with this PyTorch"
    torch.library.register_fake("_int8_moe_C::pack", _pack_fake)
    torch.library.register_fake("_int8_moe_C::experts", _experts_fake)
    torch.library.register_fake("_int8_moe_C::route", _route_fake)
    return torch.ops._int8_moe_C, str(library)


def native() -> Any | None:
    """Namespace of the operators (`isas`, `pack`, `experts`, `route`), or None."""
    return find_native()[0]


def _pack_fake(
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2: torch.Tensor,
    *args,
) -> torch.Tensor:
    experts, hidden, width = w2.shape

    def padded(n: int, to: int) -> int:
        return -(-n // to) * to

    # see csrc/cpu/int8_moe: columns times K, compensation, scale and bias
    w13_bytes = padded(width, 16) * 2 * (padded(hidden, 64) + 12)
    w2_bytes = padded(hidden, 32) * (padded(width, 64) + 12)
    return w2.new_empty(64 + experts * (w13_bytes + w2_bytes))


def _experts_fake(x: torch.Tensor, *args) -> torch.Tensor:
    return x.new_empty(x.shape)


def _route_fake(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    softmax: bool,
    renormalize: bool,
    scale: float,
    isa: int = -1,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = logits.size(0), top_k
    return (
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty(shape, dtype=torch.int32),
    )


@torch.compiler.assume_constant_result
def has_native() -> bool:
    """`native`, for code that torch.compile traces: it would trace the loading."""
    return native() is not None


def route_on_cpu(
    gating_output: torch.Tensor,
    bias: torch.Tensor | None,
    topk: int,
    renormalize: bool,
    scoring_func: str,
    indices_type: torch.dtype | None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """float32 weights and ids, both [T, k], of router logits [T, E]: scored in
    float32, the top k of score plus bias kept (the lower id of equals),
    renormalized if asked, times `scale`.

    None where the native operator does not run: not built, or another score.
    """
    if scoring_func not in ("softmax", "sigmoid") or not has_native():
        return None
    weights, ids = torch.ops._int8_moe_C.route(
        gating_output,
        bias if bias is None else bias.float(),
        topk,
        scoring_func == "softmax",
        renormalize,
        scale,
    )
    return weights, ids.to(indices_type or torch.int32)
