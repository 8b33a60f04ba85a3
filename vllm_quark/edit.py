# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Source text and rules in, source text out. Touches no file of a tree."""

import ast
import contextlib
import enum
import functools
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vllm_quark import cmake
from vllm_quark.imports import add_import
from vllm_quark.patches import FileEdit, PatchError, QuarkError, Rewrite

TIME_LIMIT = 60
"""Seconds that ast-grep may take for one file; it takes a tenth of one for vLLM's longest."""
_WAY_OUT = "bring it back to what vLLM has there, or leave this patch out (--only with the others)"


class Outcome(enum.Enum):
    """The outcome of an edit of a text."""

    APPLIES = "applies"
    PRESENT = "present"
    ABSENT = "absent"
    CONFLICT = "conflict"


@dataclass(frozen=True)
class Edited:
    """Outcome of one FileEdit; `text` is the new text where it applies, else the old one."""

    outcome: Outcome
    text: str
    detail: str = ""


@functools.cache
def _ast_grep() -> str:
    folders = [Path(sysconfig.get_path("scripts")), Path(sys.executable).parent]
    # pip install --user puts it where neither is, and its record says where.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        installed = importlib.metadata.files("ast-grep-cli") or []
        folders += [Path(str(f.locate())).resolve().parent for f in installed if f.name in ("ast-grep", "ast-grep.exe")]
    # Its short name, sg, is another program of Debian's.
    search_path = os.pathsep.join(map(str, folders))
    if program := shutil.which("ast-grep", path=search_path) or shutil.which("ast-grep"):
        return program
    raise QuarkError("ast-grep is not installed: pip install ast-grep-cli")


class TooSlowError(QuarkError):
    """A text that ast-grep does not get through."""


# Texts that it did not get through: no other rule waits for them again.
_too_slow: set[bytes] = set()


@functools.lru_cache(maxsize=4096)
def _scan(source: bytes, rules: str) -> dict[str, list[dict[str, Any]]]:
    """Matches of each rule (by id) in `source`, as ast-grep reports them. Raises TooSlowError."""
    command = [_ast_grep(), "scan", "--inline-rules", rules, "--stdin", "--json=compact"]
    try:
        if source in _too_slow:
            raise subprocess.TimeoutExpired(command, TIME_LIMIT)
        process = subprocess.run(command, input=source, capture_output=True, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired as e:
        _too_slow.add(source)
        lines = source.count(b"\n")
        raise TooSlowError(
            f"ast-grep is not through its {lines} lines after {TIME_LIMIT} s: shorten it, "
            "or choose patches that leave it alone with --only"
        ) from e
    if process.returncode not in (0, 1) or not process.stdout.strip():
        reason = " ".join(process.stderr.decode(errors="replace").split())
        raise PatchError(f"ast-grep refuses a rule: {reason}: mend the patch file")
    matches: dict[str, list[dict[str, Any]]] = {}
    for match in json.loads(process.stdout):
        matches.setdefault(match["ruleId"], []).append(match)
    return matches


def _any_quotes(rule: Any) -> Any:
    """`rule` with each pattern that holds a string also in the other quotes."""
    if isinstance(rule, list):
        return [_any_quotes(r) for r in rule]
    if not isinstance(rule, dict):
        return rule
    rule = {k: _any_quotes(v) for k, v in rule.items()}
    pattern = rule.get("pattern")
    if isinstance(pattern, str) and '"' in pattern and "'" not in pattern:
        del rule["pattern"]
        either = {"any": [{"pattern": pattern}, {"pattern": pattern.replace('"', "'")}]}
        rule["all"] = [*rule.get("all", []), either]
    return rule


def _format_documents(rules: dict[str, dict[str, Any]]) -> str:
    rules = {id_: {**d, "rule": _any_quotes(d["rule"])} for id_, d in rules.items()}
    documents = [{"language": "python", "id": id_, **d} for id_, d in rules.items()]
    return str(yaml.safe_dump_all(documents, sort_keys=False))


def _rules_by_name(edit: FileEdit) -> dict[str, dict[str, Any]]:
    """The rules of `edit`, by the names that its matches are found under."""
    named = {"present": edit.present} | ({"needs": edit.needs} if edit.needs else {})
    for k, r in enumerate(edit.rewrite):
        if r.where:
            named[f"where-{k}"] = r.where
        named[f"rewrite-{k}"] = r.rule
    return named


def _format_rules(edit: FileEdit) -> str:
    rules: dict[str, dict[str, Any]] = {id_: {"rule": rule} for id_, rule in _rules_by_name(edit).items()}
    for k, r in enumerate(edit.rewrite):
        rules[f"rewrite-{k}"]["fix"] = (r.fix or "").rstrip("\n")
    return _format_documents(rules)


def _find_matches(source: str, edit: FileEdit) -> dict[str, list[dict[str, Any]]]:
    """Matches of the rules of `edit`, by name. Raises SyntaxError for a CMake file that is none."""
    if not edit.is_cmake:
        return _scan(source.encode(), _format_rules(edit))
    return {
        id_: [{"range": {"byteOffset": {"start": c.start, "end": c.end}}} for c in cmake.find_commands(source, rule)]
        for id_, rule in _rules_by_name(edit).items()
    }


def matches(source: str, rule: dict[str, Any]) -> bool:
    """Whether `rule` matches anywhere in `source`."""
    return bool(_scan(source.encode(), _format_documents({"rule": {"rule": rule}})))


def names_in(rule: Any) -> set[str]:
    """Names that a text has to hold for `rule` to match it: those of its `^Name$` regular expressions."""
    if isinstance(rule, dict):
        names = {m[1] for m in [re.fullmatch(r"\^(\w+)\$", str(rule.get("regex", "")))] if m}
        return names.union(*(names_in(v) for k, v in rule.items() if k not in ("any", "not")))
    return set().union(*(names_in(v) for v in rule)) if isinstance(rule, list) else set()


def _without_blank_ends(new: str, old: str) -> str:
    """`new` with white-space-only lines emptied, except those that `old` already had."""
    old_blanks = {line for line in old.split("\n") if line and not line.strip()}
    return "\n".join("" if not line.strip() and line not in old_blanks else line for line in new.split("\n"))


def _whole_line(raw: bytes, start: int, end: int) -> tuple[int, int]:
    """The span widened to its line with the line's end, where nothing else stands there."""
    head = raw.rfind(b"\n", 0, start) + 1
    tail = raw.find(b"\n", end) + 1 or len(raw)
    return (head, tail) if not (raw[head:start] + raw[end:tail]).strip() else (start, end)


def _lines_at(raw: bytes, tree: ast.Module, offsets: dict[str, int], rewrite: Rewrite) -> tuple[int, int, str]:
    """The change that puts the lines of `rewrite` above, below or on top of what lies at the offsets `at`.

    tree: the syntax tree of `raw`.
    """
    lines = raw.decode().split("\n")
    indent_row = row = raw.count(b"\n", 0, offsets["start"])
    if rewrite.below is not None:
        new, row = rewrite.below, raw.count(b"\n", 0, offsets["end"]) + 1
    elif rewrite.above is not None:
        new = rewrite.above
        row = min([row, *(d.lineno - 1 for d in getattr(_find_definition(tree, row), "decorator_list", []))])
        row = _above_comments(lines, row)
    else:
        function = _find_definition(tree, row)
        body = getattr(function, "body", None)
        if not body or body[0].lineno - 1 <= row:
            raise PatchError(f"{rewrite.anchor}: no function with lines of its own: mend the patch file")
        new, first = rewrite.top or "", body[0]
        indent_row = first.lineno - 1
        docstring = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
        row = (first.end_lineno or first.lineno) if docstring else _above_comments(lines, indent_row)
    indent = lines[indent_row][: len(lines[indent_row]) - len(lines[indent_row].lstrip())]
    text = "".join(f"{indent}{line}\n" if line else "\n" for line in new.rstrip("\n").split("\n"))
    if rewrite.below is None:
        text += "\n" * (len(new) - len(new.rstrip("\n")) - 1)
    offset = sum(len(line.encode()) + 1 for line in lines[:row])
    return offset, offset, text


def _above_comments(lines: list[str], row: int) -> int:
    """The row of the first comment that stands right above `row`, as deep; else `row`."""
    indent = len(lines[row]) - len(lines[row].lstrip())
    while row and lines[row - 1].startswith(" " * indent + "#"):
        row -= 1
    return row


def _find_definition(tree: ast.Module, row: int) -> ast.AST | None:
    """The function or class whose `def` or `class` stands in `row`."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return next((n for n in ast.walk(tree) if isinstance(n, kinds) and n.lineno == row + 1), None)


def edit(source: str, rules: FileEdit) -> Edited:
    """Apply `rules` to `source`.

    PRESENT where the edit is there already, ABSENT where `needs` is not, CONFLICT where a rewrite's
    rule does not match exactly once (the detail names its anchor). Raises PatchError where the
    result is not valid Python (or CMake) or would not be recognised as edited.
    """
    raw, kind = source.encode(), "CMake" if rules.is_cmake else "Python"
    try:
        matches = _find_matches(source, rules)
        if matches.get("present"):
            return Edited(Outcome.PRESENT, source)
        if rules.needs and not matches.get("needs"):
            return Edited(Outcome.ABSENT, source, f"{rules.file} lacks what it edits")
        tree = ast.parse("" if rules.is_cmake else source)
    except SyntaxError as e:
        return Edited(Outcome.CONFLICT, source, f"{rules.file}:{e.lineno}: not valid {kind}: {e.msg}: mend it first")
    except TooSlowError as e:
        return Edited(Outcome.CONFLICT, source, f"{rules.file}: {e}")
    changes: list[tuple[int, int, str]] = []
    for i, rewrite in enumerate(rules.rewrite):
        if rewrite.where and not matches.get(f"where-{i}"):
            continue
        rewrite_matches = matches.get(f"rewrite-{i}", [])
        if len(rewrite_matches) != 1:
            problem = "not found" if not rewrite_matches else f"found {len(rewrite_matches)} times"
            return Edited(Outcome.CONFLICT, source, f"{rules.file}: {rewrite.anchor}: {problem}: {_WAY_OUT}")
        if rewrite.fix is None:
            changes.append(_lines_at(raw, tree, rewrite_matches[0]["range"]["byteOffset"], rewrite))
            continue
        offsets = rewrite_matches[0]["replacementOffsets"]
        start, end = offsets["start"], offsets["end"]
        if not rewrite_matches[0]["replacement"]:
            start, end = _whole_line(raw, start, end)
        changes.append((start, end, _without_blank_ends(rewrite_matches[0]["replacement"], raw[start:end].decode())))
    changes.sort(reverse=True)
    for (later, _, _), (_, end, _) in zip(changes, changes[1:], strict=False):
        if end > later:
            raise PatchError(f"{rules.file}: two rewrites overlap: mend the patch file")
    for start, end, text in changes:
        raw = raw[:start] + text.encode() + raw[end:]
    result = raw.decode()
    try:
        if not rules.is_cmake:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compile(result, rules.file, "exec", dont_inherit=True)  # ast.parse takes a keyword given twice
        for statement in rules.imports:
            result = add_import(result, statement, rules.file.split("/")[0])
        present = _find_matches(result, rules).get("present")
    except SyntaxError as e:
        raise PatchError(f"{rules.file}:{e.lineno}: the patch leaves no valid {kind} here: {e.msg}") from e
    if not present:
        raise PatchError(f"{rules.file}: 'present' does not match what the rewrites make: mend the patch file")
    return Edited(Outcome.APPLIES, result)
