# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Shadow trees: an installed vLLM with some patches, beside it. WRITES the shadow."""

import os
import tempfile
from pathlib import Path

from vllm_quark.locate import find_installed
from vllm_quark.record import TreeError
from vllm_quark.series import Series
from vllm_quark.tree import Tree


def make_shadow(out: Path, series: Series, only: list[str], site: Path | None = None) -> Path:
    """Folder for PYTHONPATH that holds the package of `site` with the patches `only` (none: stock).

    Folders are real, files are links to the installed ones, patched files are real. What is patched there starts
    from its originals. It is built aside and renamed. Raises TreeError where a patch does not apply, and where
    PYTHONPATH cannot name `out`.
    """
    if os.pathsep in str(out):
        raise TreeError(f"{out}: has a '{os.pathsep}', at which PYTHONPATH is parted: name another folder")
    tree = Tree(site or find_installed())  # its root is absolute: links hold from anywhere
    series = series.in_package(tree.package)
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(tree.root / tree.package)):
        raise TreeError(f"{out}: lies in the package that it is of: name a folder outside")
    contents = tree.package_with(series, series.select(only) if only else [])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", ignore_cleanup_errors=True) as aside:
            new = Path(aside, out.name)
            _fill(new, tree, contents)
            new.rename(out)
    except OSError as e:
        e.filename = str(out)
        raise
    return out


def _fill(out: Path, tree: Tree, contents: dict[str, bytes | None]) -> None:
    around = {folder for file in contents for folder in Path(file).parents}
    for folder, folders, files in os.walk(tree.root / tree.package, followlinks=True):
        inside = Path(folder).relative_to(tree.root)
        linked = [name for name in files if _source_of(inside / name) not in contents]
        # A folder that is a link stays one, unless files in it are patched.
        links = [name for name in folders if os.path.islink(os.path.join(folder, name)) and inside / name not in around]
        folders[:] = [name for name in folders if name not in links]
        linked += links
        # A folder that we brought is none of a shadow without us.
        if linked:
            (out / inside).mkdir(parents=True)
        for name in linked:
            os.symlink(os.path.join(folder, name), out / inside / name)
    for file, data in contents.items():
        if data is not None:
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            (out / file).write_bytes(data)
            if (tree.root / file).exists():
                (out / file).chmod((tree.root / file).stat().st_mode & 0o7777)


def _source_of(file: Path) -> str:
    """The source that `file` was compiled from, else the file itself."""
    if file.parent.name == "__pycache__":
        file = file.parents[1] / f"{file.name.partition('.')[0]}.py"
    return file.as_posix()
