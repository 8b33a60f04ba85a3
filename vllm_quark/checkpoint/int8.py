# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The part of the series that judges checkpoints, as vLLM runs it: `names`, `scheme` and `headers`.

They lie in a package of vLLM's whose own __init__.py imports vllm, so they are loaded into one that has none.
"""

import importlib
import sys
import types
from typing import Any

from vllm_quark.patches import QuarkError
from vllm_quark.series import home

FOLDER = "vllm/model_executor/layers/quantization/quark/int8"


def _load(name: str) -> Any:
    folder = home() / FOLDER
    if not (folder / f"{name}.py").is_file():
        raise QuarkError(f"{folder / name}.py: is not in this copy of vllm-quark: install it again")
    package = f"{__package__}._int8"
    if package not in sys.modules:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(folder)]
    return importlib.import_module(f"{package}.{name}")


names = _load("names")
scheme = _load("scheme")
headers = _load("checkpoint")
