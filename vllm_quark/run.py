# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Run a command on the patched vLLM, the installed one untouched. WRITES a shadow into the user's cache, once."""

import hashlib
import os
import shutil
import sysconfig
import tempfile
from pathlib import Path

from vllm_quark import CACHE, SERIES
from vllm_quark.locate import SHADOW_NOTE, find_installed
from vllm_quark.patches import QuarkError
from vllm_quark.record import record_path
from vllm_quark.series import home
from vllm_quark.shadow import make_shadow
from vllm_quark.tree import Tree


def _shadow_key(tree: Tree, choice: str) -> str:
    """Digest of a shadow's inputs: the installation in `tree`, the series, this tool and the chosen patches.

    An installation is known by its RECORD, and by size and time of its Python files, which someone may have edited.
    """
    digest = hashlib.sha256(f"{tree.root}\0{choice}".encode())
    series = [home() / name for name in SERIES if not name.startswith("tests")]
    tool = Path(__file__).parent
    for path in sorted(p for folder in (*series, *tool.glob("*.py")) for p in (folder, *folder.rglob("*"))):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(f"{path}\0".encode() + path.read_bytes())
    if tree.installation:
        digest.update(repr((tree.installation.stamp, sorted(tree.installation.digests.items()))).encode())
    for path in sorted((tree.root / tree.package).rglob("*.py")):
        stat = path.stat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    if record_path(tree.root).is_file():
        digest.update(record_path(tree.root).read_bytes())
    return digest.hexdigest()[:24]


def find_shadow(only: list[str], until: str | None = None, optional: list[str] | None = None) -> tuple[Path, bool]:
    """The shadow of the installed vLLM with these patches, and whether it was made now.

    It is built aside and renamed, so that a run that is killed, or another at the same time, does no harm. Raises
    QuarkError as `apply` does, and where the cache cannot be written.
    """
    if os.pathsep in str(CACHE):
        reason = f"has a '{os.pathsep}', at which PYTHONPATH is parted"
        raise QuarkError(f"{CACHE}: {reason}: name another in XDG_CACHE_HOME")
    tree = Tree(find_installed())
    folder = CACHE / "run" / _shadow_key(tree, repr((only, until, optional)))
    if folder.is_dir():
        return folder, False
    series, patches = tree.choose(only, until, optional)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        around = tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-", ignore_cleanup_errors=True)
    except OSError as e:
        raise QuarkError(f"{folder.parent}: cannot be written: {e.strerror}: name another in XDG_CACHE_HOME") from e
    with around as aside:
        shadow = make_shadow(Path(aside, folder.name), series, [p.name for p in patches], tree.root)
        (shadow / SHADOW_NOTE).write_text(f"{tree.root}\n")
        try:
            shadow.rename(folder)
        except OSError:
            if not folder.is_dir():  # another run was faster
                raise
    return folder, True


def shadow_environment(shadow: Path) -> dict[str, str]:
    """The environment in which Python, and what it starts, finds the vLLM of `shadow` first.

    The scripts of this Python come first on PATH, as in an activated environment.
    """
    paths = [
        p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and not (Path(p) / SHADOW_NOTE).exists()
    ]
    programs = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(shadow), *paths]), "PATH": os.pathsep.join(programs)}


def run_command(command: list[str], shadow: Path) -> None:
    """Become `command`, in the environment of `shadow`. Returns only by QuarkError: there is no such program."""
    environment = shadow_environment(shadow)
    program = shutil.which(command[0], path=environment["PATH"])
    if program is None:
        raise QuarkError(f"{command[0]}: no such program beside this Python or on PATH")
    os.execve(program, command, environment)
