# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Changes of files as a diff that git apply and patch take."""

import difflib
from collections.abc import Iterator, Mapping

_NO_NEWLINE = "\\ No newline at end of file\n"


def _lines(data: bytes | None) -> list[str]:
    """Lines with their ends; only "\\n" parts them."""
    text = (data or b"").decode("utf-8", "surrogateescape")
    return [f"{line}\n" for line in text.split("\n")[:-1]] + ([last] if (last := text.rpartition("\n")[2]) else [])


def format_diff(changes: Mapping[str, tuple[bytes | None, bytes | None]]) -> Iterator[str]:
    """Lines, with their ends, of the diff for `changes`: content of each file before and after, None for no file.

    Bytes that are not UTF-8 come as surrogates ("surrogateescape").
    """
    for file, (old, new) in changes.items():
        yield f"diff --git a/{file} b/{file}\n"
        if old is None or new is None:
            yield f"{'new' if old is None else 'deleted'} file mode 100644\n"
        before = f"a/{file}" if old is not None else "/dev/null"
        after = f"b/{file}" if new is not None else "/dev/null"
        for line in difflib.unified_diff(_lines(old), _lines(new), before, after):
            yield line if line.endswith("\n") else f"{line}\n{_NO_NEWLINE}"
