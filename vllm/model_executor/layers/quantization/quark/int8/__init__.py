# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Entry points for INT8 W8A8 checkpoints of AMD Quark. quark.py, quark_moe.py, the
INT8 scheme and Step3p5's loader call them."""

from .layers import int8_layers
from .scheme import complete_config
from .weights import (
    finish_experts,
    finish_linear,
    keep_scales,
    load_stacked,
    prepare_experts,
    prepare_linear,
    stop_expert_moves,
)

__all__ = [
    "complete_config",
    "finish_experts",
    "finish_linear",
    "int8_layers",
    "keep_scales",
    "load_stacked",
    "prepare_experts",
    "prepare_linear",
    "stop_expert_moves",
]
