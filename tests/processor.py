# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""What this processor has."""

import platform
import re
from pathlib import Path

import pytest


def lacks_vnni() -> bool:
    """Whether oneDNN's INT8 products saturate here (docs/fixes.md): an x86 processor with neither form of VNNI."""
    file = Path("/proc/cpuinfo")
    flags = file.read_text() if file.exists() else ""
    return platform.machine() == "x86_64" and not re.search(r"\b(avx512_vnni|avx_vnni)\b", flags)


needs_vnni = pytest.mark.skipif(lacks_vnni(), reason="stock's INT8 layers are wrong on a CPU without VNNI")
