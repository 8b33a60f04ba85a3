# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The native operators of csrc/cpu/int8_moe: INT8 experts and their router on CPU."""

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from vllm.logger import init_logger

logger = init_logger(__name__)

# Of vLLM's own build, or of the vllm-quark wheel for an installed vLLM.
_HOMES = (__name__.partition(".")[0], "vllm_quark")
_NAME = "_int8_moe_C.abi3.so"


def _library() -> Path | None:
    """The library's file. VLLM_INT8_MOE_LIBRARY names another one; empty: none."""
    named = os.environ.get("VLLM_INT8_MOE_LIBRARY")
    if named is not None:
        return Path(named) if named else None
    for home in _HOMES:
        spec = importlib.util.find_spec(home)
        for folder in spec.submodule_search_locations or () if spec else ():
            if (file := Path(folder) / _NAME).is_file():
                return file
    return None


@functools.cache
def native() -> Any | None:
    """Namespace of the operators (`isas`, `pack`, `experts`, `route`), or None.

    Says once, in the log, which of both it is.
    """
    library, reason = _library(), None
    if library is None:
        reason = (
            f"the native operator ({_NAME}) is not built. It needs a C++ compiler "
            "and CMake when vLLM or vllm-quark is installed from source"
        )
    else:
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            cause = error.__cause__ or error
            reason = f"{library} does not load ({cause}). Build it with this PyTorch"
    if reason:
        logger.warning(
            "INT8 experts on CPU run on oneDNN, expert by expert, which is slower: %s",
            reason,
        )
        return None
    found = torch.ops._int8_moe_C
    torch.library.register_fake("_int8_moe_C::pack", _pack_fake)
    torch.library.register_fake("_int8_moe_C::experts", _experts_fake)
    torch.library.register_fake("_int8_moe_C::route", _route_fake)
    logger.info("INT8 experts on CPU run on %s, %s", library, found.isas()[0])
    return found


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

    # see csrc/cpu/int8_moe: columns times K, sum, scale and bias
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
