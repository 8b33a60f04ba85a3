# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Import statements put where ruff's isort rules want them. Text in, text out."""

import ast
import sys

LINE_LENGTH = 88


def _key(name: str) -> tuple[int, str]:
    """Order of imported names: CONSTANTS, Classes, the rest."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
    return kind, name if kind < 2 else name.lower()


def _section(module: str, package: str) -> int:
    top = module.split(".")[0]
    if top == "__future__":
        return 0
    if top in sys.stdlib_module_names:
        return 1
    return 3 if top == package else 2


def _written(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= LINE_LENGTH:
        return line
    return f"from {module} import (\n" + "".join(f"    {n},\n" for n in names) + ")"


def _render_alias(alias: ast.alias) -> str:
    return alias.name + (f" as {alias.asname}" if alias.asname else "")


def _block(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    """Top-level imports before the first definition."""
    statements = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            break
        if isinstance(node, ast.Import | ast.ImportFrom):
            statements.append(node)
    return statements


def _merged(lines: list[str], node: ast.ImportFrom, new: list[str]) -> list[str]:
    """`lines` with the names `new` in the statement `node`."""
    first, last = node.lineno - 1, node.end_lineno or node.lineno
    at = [alias.lineno for alias in node.names]
    one_a_line = len(set(at)) == len(at) and first + 1 not in at
    if not one_a_line:
        names = [_render_alias(a) for a in node.names]
        for name in new:
            index = next((i for i, n in enumerate(names) if _key(n) > _key(name)), len(names))
            names.insert(index, name)
        tail = lines[last - 1][node.end_col_offset :] if first + 1 == last else ""
        return [*lines[:first], *(_written(node.module or "", names) + tail).split("\n"), *lines[last:]]
    first_line = lines[at[0] - 1]
    indent = first_line[: len(first_line) - len(first_line.lstrip())]
    lines = list(lines)
    for name in sorted(new, key=_key, reverse=True):
        later = [alias.lineno for alias in node.names if _key(_render_alias(alias)) > _key(name)]
        if later:
            lines.insert(later[0] - 1, f"{indent}{name},")
        else:
            end = at[-1] - 1
            code, hash_, comment = lines[end].partition("#")
            if not code.rstrip().endswith(","):
                code = code.rstrip() + "," + ("  " if hash_ else "")
            lines[end] = code + hash_ + comment
            lines.insert(end + 1, f"{indent}{name},")
    return lines


def add_import(source: str, statement: str, package: str = "vllm") -> str:
    """`source` with `statement` ("from module import names" or "import module") among its top-level imports.

    Names join a statement that imports from the same module; a new statement goes where ruff sorts it:
    standard library, third party, `package`; in each "import …" before "from …", by module. Names that
    are there already are left. Raises SyntaxError for text that is no Python.
    """
    wanted = ast.parse(statement).body[0]
    block = _block(ast.parse(source))
    lines = source.split("\n")
    if isinstance(wanted, ast.ImportFrom):
        module = wanted.module or ""
        same = [n for n in block if isinstance(n, ast.ImportFrom) and n.module == module and not n.level]
        there = {_render_alias(a) for n in same for a in n.names}
        names = [_render_alias(a) for a in wanted.names if _render_alias(a) not in there]
        if not names:
            return source
        if same:
            return "\n".join(_merged(lines, same[0], names))
        text = _written(module, sorted(names, key=_key))
    else:
        if not isinstance(wanted, ast.Import):
            raise SyntaxError(f"'{statement}' is no import")
        module = wanted.names[0].name
        if any(
            isinstance(n, ast.Import) and any(_render_alias(a) == _render_alias(wanted.names[0]) for a in n.names)
            for n in block
        ):
            return source
        text = statement.strip()

    def rank(node: ast.Import | ast.ImportFrom) -> tuple[int, int, str]:
        if isinstance(node, ast.Import):
            return _section(node.names[0].name, package), 0, node.names[0].name.lower()
        section = 4 if node.level else _section(node.module or "", package)
        return section, 1, (node.module or "").lower()

    mine = (_section(module, package), int(isinstance(wanted, ast.ImportFrom)), module.lower())
    earlier = [n for n in block if rank(n) < mine]
    section = [n for n in block if rank(n)[0] == mine[0]]
    before = [n for n in section if rank(n) < mine]
    if before:
        at = before[-1].end_lineno or before[-1].lineno
        return "\n".join([*lines[:at], *text.split("\n"), *lines[at:]])
    if section:
        at = section[0].lineno - 1
        return "\n".join([*lines[:at], *text.split("\n"), *lines[at:]])
    if earlier:
        at = earlier[-1].end_lineno or earlier[-1].lineno
        return "\n".join([*lines[:at], "", *text.split("\n"), *lines[at:]])
    if block:
        at = block[0].lineno - 1
        return "\n".join([*lines[:at], *text.split("\n"), "", *lines[at:]])
    # No import at all: below the docstring and the comments on top.
    body = ast.parse(source).body
    docstring = body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    at = (body[0].end_lineno or 0) if docstring else 0
    while not docstring and at < len(lines) and lines[at].startswith("#"):
        at += 1
    return "\n".join([*lines[:at], "", *text.split("\n"), *lines[at:]])
