# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Commands of a CMake file, for rules that ast-grep has no language for."""

import re
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""
    \#\[(?P<c>=*)\[.*?\](?P=c)\]        # bracket comment
    | \#[^\n]*
    | "(?:\\.|[^"\\])*"
    | \[(?P<a>=*)\[.*?\](?P=a)\]        # bracket argument
    | [()]
    | [^\s()\#"]+
    """,
    re.S | re.X,
)


@dataclass(frozen=True)
class Command:
    """One command invocation; `start` and `end` are byte offsets of the whole of it."""

    name: str
    arguments: tuple[str, ...]
    start: int
    end: int


def read_commands(source: str) -> list[Command]:
    """All of a file's, in order. Raises SyntaxError, with a line, where parentheses do not close."""
    parsed: list[Command] = []
    name, begin, depth = "", 0, 0
    arguments: list[str] = []
    previous: re.Match[str] | None = None
    for token in _TOKEN.finditer(source):
        text = token[0]
        if text.startswith("#"):
            continue
        if text == "(":
            if depth == 0 and previous:
                name, begin, arguments = previous[0], previous.start(), []
            depth += 1
        elif text == ")":
            depth -= 1
            if depth < 0:
                break
            if depth == 0:
                start, end = (len(source[:at].encode()) for at in (begin, token.end()))
                parsed.append(Command(name.lower(), tuple(arguments), start, end))
        elif depth:
            arguments.append(text.strip('"') if text.startswith('"') else text)
        previous = token
    if depth:
        line = source.count("\n", 0, begin) + 1
        raise SyntaxError("parentheses do not match", (None, line, None, None))
    return parsed


def find_commands(source: str, rule: dict[str, str]) -> list[Command]:
    """Commands that `rule` describes: regular expressions `command`, for the whole name, and, if it is there,
    `argument`, found in one of the arguments."""
    return [
        c
        for c in read_commands(source)
        if re.fullmatch(rule["command"], c.name)
        and ("argument" not in rule or any(re.search(rule["argument"], a) for a in c.arguments))
    ]
