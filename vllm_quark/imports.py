# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Import statements put where ruff's isort rules want them. Text in, text out."""

import ast
import sys

LINE_LENGTH = 88


def _name_order(name: str) -> tuple[int, str]:
    """Order of imported names: CONSTANTS, Classes, the rest."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
    return kind, name if kind < 2 else name.lower()


def _find_section(module: str, package: str) -> int:
    top = module.split(".")[0]
    if top == "__future__":
        return 0
    if top in sys.stdlib_module_names:
        return 1
    return 3 if top == package else 2


def _format_import(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= LINE_LENGTH:
        return line
    return f"from {module} import (\n" + "".join(f"    {n},\n" for n in names) + ")"


def _render_alias(alias: ast.alias) -> str:
    return alias.name + (f" as {alias.asname}" if alias.asname else "")


def _find_imports(tree: ast.Module) -> list[ast.Import | ast.ImportFrom]:
    """Top-level imports before the first definition."""
    statements = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            break
        if isinstance(node, ast.Import | ast.ImportFrom):
            statements.append(node)
    return statements


def _merge_names(lines: list[str], node: ast.ImportFrom, new_names: list[str]) -> list[str]:
    """`lines` with the names `new` in the statement `node`."""
    first, last = node.lineno - 1, node.end_lineno or node.lineno
    name_lines = [alias.lineno for alias in node.names]
    is_one_per_line = len(set(name_lines)) == len(name_lines) and first + 1 not in name_lines
    if not is_one_per_line:
        names = [_render_alias(a) for a in node.names]
        for name in new_names:
            index = next((i for i, n in enumerate(names) if _name_order(n) > _name_order(name)), len(names))
            names.insert(index, name)
        tail = lines[last - 1][node.end_col_offset :] if first + 1 == last else ""
        return [*lines[:first], *(_format_import(node.module or "", names) + tail).split("\n"), *lines[last:]]
    first_line = lines[name_lines[0] - 1]
    indent = first_line[: len(first_line) - len(first_line.lstrip())]
    lines = list(lines)
    for name in sorted(new_names, key=_name_order, reverse=True):
        later = [alias.lineno for alias in node.names if _name_order(_render_alias(alias)) > _name_order(name)]
        if later:
            lines.insert(later[0] - 1, f"{indent}{name},")
        else:
            end = name_lines[-1] - 1
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
    new_import = ast.parse(statement).body[0]
    imports = _find_imports(ast.parse(source))
    lines = source.split("\n")
    if isinstance(new_import, ast.ImportFrom):
        module = new_import.module or ""
        siblings = [n for n in imports if isinstance(n, ast.ImportFrom) and n.module == module and not n.level]
        imported = {_render_alias(a) for n in siblings for a in n.names}
        names = [_render_alias(a) for a in new_import.names if _render_alias(a) not in imported]
        if not names:
            return source
        if siblings:
            return "\n".join(_merge_names(lines, siblings[0], names))
        text = _format_import(module, sorted(names, key=_name_order))
    else:
        if not isinstance(new_import, ast.Import):
            raise SyntaxError(f"'{statement}' is no import")
        module = new_import.names[0].name
        if any(
            isinstance(n, ast.Import) and any(_render_alias(a) == _render_alias(new_import.names[0]) for a in n.names)
            for n in imports
        ):
            return source
        text = statement.strip()

    def rank(node: ast.Import | ast.ImportFrom) -> tuple[int, int, str]:
        if isinstance(node, ast.Import):
            return _find_section(node.names[0].name, package), 0, node.names[0].name.lower()
        section = 4 if node.level else _find_section(node.module or "", package)
        return section, 1, (node.module or "").lower()

    new_rank = (_find_section(module, package), int(isinstance(new_import, ast.ImportFrom)), module.lower())
    earlier = [n for n in imports if rank(n) < new_rank]
    section = [n for n in imports if rank(n)[0] == new_rank[0]]
    earlier_in_section = [n for n in section if rank(n) < new_rank]
    if earlier_in_section:
        row = earlier_in_section[-1].end_lineno or earlier_in_section[-1].lineno
        return "\n".join([*lines[:row], *text.split("\n"), *lines[row:]])
    if section:
        row = section[0].lineno - 1
        return "\n".join([*lines[:row], *text.split("\n"), *lines[row:]])
    if earlier:
        row = earlier[-1].end_lineno or earlier[-1].lineno
        return "\n".join([*lines[:row], "", *text.split("\n"), *lines[row:]])
    if imports:
        row = imports[0].lineno - 1
        return "\n".join([*lines[:row], *text.split("\n"), "", *lines[row:]])
    # No import at all: below the docstring and the comments on top.
    body = ast.parse(source).body
    docstring = body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    row = (body[0].end_lineno or 0) if docstring else 0
    while not docstring and row < len(lines) and lines[row].startswith("#"):
        row += 1
    return "\n".join([*lines[:row], "", *text.split("\n"), *lines[row:]])
