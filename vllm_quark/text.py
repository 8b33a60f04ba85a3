# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Text of a file as rules see it, and back to bytes as the file has them: byte-order mark and line ends stay."""

import difflib
from dataclasses import dataclass

_MARK = "\ufeff"


@dataclass(frozen=True)
class Text:
    """`plain` has "\\n" line ends and no byte-order mark; `raw` is what the file has."""

    plain: str
    raw: str

    def encode(self, plain: str) -> bytes:
        """`plain`, made from `self.plain`, as bytes: lines that stayed keep their ends, new ones get a neighbour's."""
        mark = _MARK if self.raw.startswith(_MARK) else ""
        return (mark + self._with_ends(plain)).encode()

    def _with_ends(self, plain: str) -> str:
        old = self.raw.removeprefix(_MARK).split("\n")[:-1]
        returns = [line.endswith("\r") for line in old]
        if not any(returns):
            return plain
        if all(returns):
            return plain.replace("\n", "\r\n")
        before, after = self.plain.split("\n"), plain.split("\n")
        ends: list[str] = []
        for kind, i, i_end, j, j_end in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
            if kind == "equal":
                ends += ["\r\n" if r else "\n" for r in [*returns, False][i:i_end]]
            else:
                near = returns[max(0, min(i, len(returns)) - 1)]
                ends += ["\r\n" if near else "\n"] * (j_end - j)
        return "".join(line + end for line, end in zip(after, [*ends[:-1], ""], strict=True))


def decode(raw: bytes) -> Text:
    """Raises UnicodeDecodeError for what is not UTF-8."""
    source = raw.decode()
    return Text(source.removeprefix(_MARK).replace("\r\n", "\n"), source)
