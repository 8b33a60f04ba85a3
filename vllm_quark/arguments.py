# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Arguments that several commands take."""

from pathlib import Path

import typer


def read_folder(text: str) -> Path:
    """A folder's path; an empty variable of a script must not stand for the current folder."""
    if not text.strip():
        raise typer.BadParameter(f"'{text}' names no folder")
    return Path(text)
