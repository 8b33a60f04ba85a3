# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`quantization_config` as AMD Quark 0.13 writes it. Imports neither vLLM nor torch."""

from collections.abc import Iterable
from typing import Any


def tensor_config(
    qscheme: str,
    is_dynamic: bool = False,
    symmetric: bool = True,
    dtype: str = "int8",
) -> dict[str, Any]:
    """How a layer's weights or activations are quantized.

    qscheme: per_tensor, per_group (of 32 inputs) or per_channel: one scale per output
    channel of a weight, one per token where it is dynamic.
    """
    axes = {"per_tensor": None, "per_channel": int(is_dynamic), "per_group": 1}
    return {
        "dtype": dtype,
        "is_dynamic": is_dynamic,
        "qscheme": qscheme,
        "ch_axis": axes[qscheme],
        "group_size": 32 if qscheme == "per_group" else None,
        "symmetric": symmetric,
        "round_method": "half_even",
        "scale_type": "float",
        "observer_cls": "PerChannelMinMaxObserver",
    }


def activation_config(activation: str, dtype: str = "int8") -> dict[str, Any]:
    """activation: token_sym, token_asym (dynamic, per token), static_sym, static_asym
    or tensor_dynamic."""
    qscheme = "per_channel" if activation.startswith("token") else "per_tensor"
    is_dynamic = not activation.startswith("static")
    return tensor_config(qscheme, is_dynamic, not activation.endswith("_asym"), dtype)


def layer_config(
    weight: str = "per_channel",
    activation: str | None = "token_sym",
    dtype: str = "int8",
) -> dict[str, Any]:
    """How a layer is quantized. weight: a qscheme. activation: that of
    `activation_config`, None where only the weights are quantized."""
    return {
        "weight": tensor_config(weight, dtype=dtype),
        "input_tensors": activation_config(activation, dtype) if activation else None,
        "output_tensors": None,
        "bias": None,
    }


def quantization_config(
    weight: str = "per_channel",
    activation: str = "token_sym",
    exclude: Iterable[str] = (),
) -> dict[str, Any]:
    """`quantization_config` of an INT8 W8A8 export; see `layer_config`."""
    return {
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "global_quant_config": layer_config(weight, activation),
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": list(exclude),
        "export": {
            "kv_cache_group": [],
            "pack_method": "reorder",
            "weight_format": "real_quantized",
        },
    }
