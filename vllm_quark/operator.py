# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The CPU operator of this wheel, for an installed vLLM with the series: a plugin of `vllm.general_plugins`."""

import importlib.util
import os
from pathlib import Path

VARIABLE = "VLLM_INT8_MOE_LIBRARY"
LIBRARY = Path(__file__).with_name("_int8_moe_C.abi3.so")


def name_library() -> None:
    """Name this wheel's library to vLLM where it asks for one, and neither its own build nor the user has one."""
    from vllm import envs

    is_known = VARIABLE in envs.environment_variables
    if is_known and LIBRARY.is_file() and importlib.util.find_spec("vllm._int8_moe_C") is None:
        os.environ.setdefault(VARIABLE, str(LIBRARY))
