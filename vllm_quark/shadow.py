# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Shadow trees: an installed vLLM with some patches, beside it. WRITES the shadow."""

import os
from pathlib import Path

from vllm_quark.judge import Status
from vllm_quark.series import Series
from vllm_quark.tree import Tree, TreeError, find_installed


def make_shadow(out: Path, series: Series, only: list[str], site: Path | None = None) -> Path:
    """Folder for PYTHONPATH that holds the package of `site` with the patches `only` (none: stock).

    Folders are real, files are links to the installed ones, patched files are real. What is patched there starts
    from its originals. Raises TreeError where a patch does not apply.
    """
    tree = Tree(site or find_installed())  # its root is absolute: links hold from anywhere
    series = series.in_package(tree.package)
    if came := tree.by_wheel().difference(only):
        raise TreeError(f"{tree.root}: {min(came)} came with the wheel: install the release's own wheel for this")
    originals = tree.originals(series)
    for folder, _, files in os.walk(tree.root / tree.package):
        to = out / Path(folder).relative_to(tree.root)
        to.mkdir(parents=True)
        for name in files:
            file = (Path(folder) / name).relative_to(tree.root).as_posix()
            if file not in originals:
                os.symlink(os.path.join(folder, name), to / name)
    for file, data in originals.items():
        if data is not None and file.startswith(f"{tree.package}/"):
            (out / file).write_bytes(data)
    if only:
        for verdict in Tree(out).apply(series, series.select(only)):
            if verdict.status not in (Status.APPLIED, Status.UPSTREAM, Status.ABSENT):
                raise TreeError(f"{out}: {verdict.patch.name} is {verdict.status} {verdict.detail}")
    return out
