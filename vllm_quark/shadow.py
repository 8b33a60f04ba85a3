# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Shadow trees: an installed vLLM with some patches, beside it, for tests and comparisons."""

import os
from pathlib import Path

from vllm_quark.series import Series
from vllm_quark.tree import Tree, TreeError, find_installed


def make_shadow(out: Path, series: Series, only: list[str], site: Path | None = None) -> Path:
    """Folder for PYTHONPATH that holds `vllm` of `site` with the patches `only` (none: stock).

    Folders are real, files are links to the installed ones, patched files are real. Raises
    TreeError where a patch does not apply.
    """
    source = (site or find_installed()).absolute() / "vllm"  # links hold from anywhere
    for folder, _, files in os.walk(source):
        to = out / "vllm" / Path(folder).relative_to(source)
        to.mkdir(parents=True)
        for name in files:
            os.symlink(os.path.join(folder, name), to / name)
    if only:
        for verdict in Tree(out).apply(series, series.select(only)):
            if verdict.status not in ("applied", "upstream", "absent"):
                raise TreeError(f"{out}: {verdict.patch.name} is {verdict.status} {verdict.detail}")
    return out
