# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Where vLLM lies: the installed one, and the package in a tree. Reads, writes nothing."""

import importlib.util
import re
from pathlib import Path

from vllm_quark.record import TreeError, record_path

SHADOW_NOTE = "vllm-quark-shadow-of.txt"
_IMPORTED = re.compile(rb"^\s*(?:from|import) (\w+)", re.M)


def find_installed() -> Path:
    """Folder that holds the `vllm` package of this Python, found without importing it.

    Under `vllm-quark run` that is the installation that the command's shadow was made of.
    """
    try:
        spec = importlib.util.find_spec("vllm")
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin:
        raise TreeError("no vLLM is installed in this Python: name a TREE (site-packages or a source checkout)")
    folder = Path(spec.origin).parents[1]
    note = folder / SHADOW_NOTE
    return Path(note.read_text().strip()) if note.is_file() else folder


def _subfolders(root: Path) -> list[Path]:
    try:
        return sorted(p for p in root.iterdir() if p.name != "vllm" and p.name.isidentifier())
    except OSError as e:
        raise TreeError(f"{root}: cannot be read: {e.strerror}: name a folder that holds a vLLM tree") from e


def _is_package(folder: Path) -> bool:
    return (folder / "__init__.py").is_file() and (folder / "model_executor").is_dir()


def _depends_on_vllm(folder: Path) -> bool:
    """Whether a package under another name is no fork of vLLM, but imports it, and not by a slip here and there."""
    sources = (path.read_bytes() for path in folder.rglob("*.py") if path.is_file())
    imported = [name for source in sources for name in _IMPORTED.findall(source)]
    return 10 * imported.count(b"vllm") > imported.count(folder.name.encode())


def find_package(root: Path) -> str:
    """Name of the folder in `root` that holds vLLM's code. Raises TreeError."""
    if _is_package(root / "vllm"):
        return "vllm"
    candidates = [p for p in _subfolders(root) if _is_package(p)]
    packages = [p.name for p in candidates if not _depends_on_vllm(p)]
    if len(packages) > 1:
        raise TreeError(f"{root}: {' and '.join(packages)} both look like vLLM: name a tree that holds one of them")
    if packages:
        return packages[0]
    if candidates:
        raise TreeError(
            f"{root}: not a vLLM tree: {candidates[0].name} only depends on vLLM: name the one that it imports"
        )
    way_out = "name a site-packages folder or a vLLM source tree"
    if _is_package(root):
        way_out = f"name {root.parent} instead"
    elif record_path(root).is_file():
        way_out = "it was one when vllm-quark patched it: install or check out vLLM there again, then revert"
    raise TreeError(f"{root}: not a vLLM tree (no vllm/__init__.py with vllm/model_executor in it): {way_out}")
