# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""INT8 layers of AMD Quark on kernels that know fewer schemes than Quark writes.

Fused MoE kernels quantize activations per token and scale weights per channel;
the Triton int8 linear kernel subtracts zero points after the product was rounded
to the output's dtype, which leaves nothing of small tokens.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from vllm.logger import init_logger

logger = init_logger(__name__)

_INPUTS = ("w13_input_scale", "w2_input_scale")


def _per_channel(loader: Callable, shard_rows: dict[str, int]) -> Callable:
    """Spread one scale per tensor over the `shard_rows` of its shard."""

    @wraps(loader)
    def load(param: torch.nn.Parameter, loaded_weight: torch.Tensor, *args, **kwargs):
        # positions as in FusedMoE.weight_loader: weight_name, shard_id
        shard_id = kwargs.get("shard_id", args[1] if len(args) > 1 else None)
        if loaded_weight.numel() == 1 and shard_id in shard_rows:
            loaded_weight = loaded_weight.reshape(1).expand(shard_rows[shard_id])
        elif loaded_weight.dim() == 2 and 1 in loaded_weight.shape:
            loaded_weight = loaded_weight.reshape(-1)
        return loader(param, loaded_weight, *args, **kwargs)

    return load


def _ignore(
    param: torch.nn.Parameter,
    loaded_weight: torch.Tensor,
    *args,
    return_success: bool = False,
    **kwargs,
) -> bool | None:
    return True if return_success else None


def prepare_experts(layer: torch.nn.Module) -> None:
    """Let a layer with per-channel parameters load per-tensor scales too.

    Call it at the end of create_weights. Weight scales [N], [N, 1], [1, N] or
    one value fill the rows of their shard. Static input scales and zero points
    are taken from the checkpoint and dropped: tokens have scales of their own.
    """
    rows = layer.w2_weight.shape[1]
    width = layer.w2_weight.shape[2] * layer.moe_config.moe_parallel_config.tp_size
    shard_rows = {"w1": width, "w3": width, "w2": rows}
    for stem in ("w13", "w2"):
        for kind in ("weight_scale", "weight_zero_point"):
            param = getattr(layer, f"{stem}_{kind}")
            param.weight_loader = _per_channel(param.weight_loader, shard_rows)
        for kind in ("input_scale", "input_zero_point"):
            name = f"{stem}_{kind}"
            if hasattr(layer, name):
                delattr(layer, name)
            sink = torch.nn.Parameter(torch.empty(0), requires_grad=False)
            sink.weight_loader = _ignore
            layer.register_parameter(name, sink)


def finish_experts(layer: torch.nn.Module) -> None:
    """Drop what prepare_experts added. Call it before the weights are processed."""
    for name in _INPUTS:
        if hasattr(layer, name):
            delattr(layer, name)
        setattr(layer, name, None)


def quantize_per_token(scheme: Any, layer: torch.nn.Module) -> None:
    """Serve a QuarkW8A8Int8 layer with dynamic per-token symmetric activations.
    Call it before the weights are processed."""
    config = scheme.kernel.config
    config.is_static_input_scheme = scheme.is_static_input_scheme = False
    config.input_symmetric = scheme.input_symmetric = True
    scheme.kernel = type(scheme.kernel)(config, scheme.kernel.layer_param_names)
    for kind in ("input_scale", "input_zero_point"):
        if hasattr(layer, kind):
            delattr(layer, kind)
        layer.register_parameter(kind, None)


def finish_linear(scheme: Any, layer: torch.nn.Module) -> None:
    """Give a QuarkW8A8Int8 layer activations that its kernel computes. Call it
    before the weights are processed."""
    kernel = type(scheme.kernel).__name__
    packed_fits = not scheme.is_static_input_scheme
    packed_fits &= getattr(layer, "params_dtype", None) is torch.bfloat16
    packed_fits &= layer.weight.size(0) % 32 == 0
    if hasattr(scheme.kernel, "process_weights_for_onednn") and not packed_fits:
        _keep_onednn(scheme.kernel)
    if kernel == "TritonInt8ScaledMMLinearKernel" and not scheme.input_symmetric:
        logger.warning_once(
            "INT8 linear layers exported with asymmetric activations are served "
            "with dynamic per-token symmetric ones: %s loses zero points in rounding",
            kernel,
        )
        quantize_per_token(scheme, layer)


def _keep_onednn(kernel: Any) -> None:
    """Keep the CPU kernel off its product for AMX, which quantizes per token
    whatever the scheme, ends the process over float16, and stops over rows that
    are no multiple of its block."""

    def process_weights_after_loading(layer: torch.nn.Module) -> None:
        kernel.linear_method = kernel._apply_weights_onednn
        kernel.process_weights_for_onednn(layer)

    kernel.process_weights_after_loading = process_weights_after_loading
