# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""How the series survives a fork's drift, beside the textual form of the same patches: docs/drift.md.

    python -m benchmarks.compatibility.drift [--drifts 320] [--seed 0] [--tests 0] [--out docs/drift.md]

A drift changes the files that the series edits in vLLM 0.21.0 as forks do, without changing what they compute:

    lines     log calls and comments near the edits, other wording in messages and docstrings
    locals    local variables renamed
    order     methods of a class and imports reordered
    arguments parameters with a default added, and passed by the file's own calls
    format    reformatted at another line length, with other quotes
    moved     a class moved to another file of its package, imported back
    package   the package vendored under another name (acme_vllm)
    mixed     two to four of these (package excepted)

Each way of patching then ends `right`, `refused` (an error, whatever it left) or `wrong`. Right: with the
drift taken off again (its names, log calls and arguments are known; order is sorted; the moved class is put
back) the result has the syntax tree of the patched original. `--tests N`: the layer tests as well, on N drifts
of each kind that ours applied (package excepted: the rest of vLLM keeps its name).
"""

import argparse
import ast
import collections
import functools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.pages import describe_run, write_results
from vllm_quark.commits import format_patch
from vllm_quark.git import git
from vllm_quark.patches import QuarkError
from vllm_quark.release import sources
from vllm_quark.series import Series, load_series
from vllm_quark.shadow import make_shadow
from vllm_quark.tree import Tree

ROOT = Path(__file__).resolve().parents[2]

RELEASE = "0.21.0"
VENDOR = "acme_vllm"
METHODS = ("vllm-quark", "git apply", "git am -3", "patch --fuzz=3")
Files = dict[str, str]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.Module) -> dict[str, Function]:
    """Functions and methods by qualified name."""
    by_name: dict[str, Function] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function | ast.ClassDef):
                name = f"{prefix}{child.name}"
                if isinstance(child, Function):
                    by_name[name] = child
                visit(child, f"{name}.")

    visit(tree, "")
    return by_name


def splice(text: str, edits: list[tuple[int, int, int, str]]) -> str:
    """`text` with each (row from 1, column, end column, new) done; columns count bytes, as ast's do."""
    lines = [line.encode() for line in text.split("\n")]
    for row, start, end, new in sorted(edits, reverse=True):
        lines[row - 1] = lines[row - 1][:start] + new.encode() + lines[row - 1][end:]
    return b"\n".join(lines).decode()


def first_row(rows: list[str], node: Function | ast.ClassDef) -> int:
    """Index of the row where `node` begins, with its decorators and the comments above it."""
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    while rows[start - 1].startswith(" " * node.col_offset + "#"):
        start -= 1
    return start


@dataclass
class Drifter:
    """Drift operations on one file. `near`: qualified names of the functions that the series edits there."""

    rng: random.Random
    near: set[str]
    count: int = 0

    def pick(self, tree: ast.Module, fit: Callable[[Function], bool] = lambda f: True) -> Function | None:
        every = {k: f for k, f in functions(tree).items() if fit(f)}
        close = [f for k, f in every.items() if k in self.near]
        if close and self.rng.random() < 0.7:
            return self.rng.choice(close)
        return self.rng.choice(list(every.values())) if every else None

    def lines(self, text: str) -> str:
        for _ in range(self.rng.randint(2, 5)):
            tree, rows = ast.parse(text), text.split("\n")
            function = self.pick(tree)
            if function is None:
                continue
            self.count += 1
            change = self.rng.choice(("log", "comment", "words", "docstring"))
            blocks = [
                (block, i)
                for node in ast.walk(function)
                for block in (getattr(node, name, None) for name in ("body", "orelse"))
                if isinstance(block, list) and isinstance(node, ast.stmt)
                for i, s in enumerate(block)
                if i or not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
            ]
            block, i = self.rng.choice(blocks)
            at, column = block[i].lineno, block[i].col_offset
            at = min([at, *(d.lineno for d in getattr(block[i], "decorator_list", []))])
            first = rows[at - 1][:column]
            clear = not first.strip() and not rows[at - 1].lstrip().startswith("elif")
            if change in ("log", "comment") and clear:
                new = f'logger.debug("drift {self.count}")' if change == "log" else f"# drift {self.count}"
                text = "\n".join([*rows[: at - 1], first + new, *rows[at - 1 :]])
            elif change == "words":
                words = [
                    n
                    for n in ast.walk(function)
                    if isinstance(n, ast.Constant)
                    and isinstance(n.value, str)
                    and n.value.count(" ") > 2
                    and n.lineno == n.end_lineno
                    and (quotes := rows[n.lineno - 1].encode()[n.col_offset : n.col_offset + 3])[:1] in (b'"', b"'")
                    and quotes not in (b'"""', b"'''")
                ]
                if words:
                    n = self.rng.choice(words)
                    end = n.end_col_offset or 0
                    text = splice(text, [(n.lineno, end - 1, end - 1, " (drift)")])
            elif (
                change == "docstring"
                and ast.get_docstring(function) is None
                and function.body[0].lineno > function.lineno
            ):
                body = function.body[0]
                row = body.lineno - 1
                while rows[row - 1].lstrip().startswith("#"):
                    row -= 1
                text = "\n".join([*rows[:row], " " * body.col_offset + '"""A fork explains."""', *rows[row:]])
        return text

    def locals(self, text: str) -> str:
        for _ in range(self.rng.randint(1, 4)):
            tree = ast.parse(text)
            function = self.pick(tree, lambda f: bool(self._locals(f)))
            if function is None:
                continue
            name = self.rng.choice(sorted(self._locals(function)))
            self.count += 1
            edits = [
                (n.lineno, n.col_offset, n.col_offset + len(name), f"{name}_d{self.count}")
                for n in ast.walk(function)
                if isinstance(n, ast.Name) and n.id == name
            ]
            text = splice(text, edits)
        return text

    @staticmethod
    def _locals(function: Function) -> set[str]:
        nodes = list(ast.walk(function))
        stored = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        held = {
            a.arg
            for n in nodes
            if isinstance(n, ast.arguments)
            for a in [*n.posonlyargs, *n.args, *n.kwonlyargs, n.vararg, n.kwarg]
            if a
        }
        held |= {x for n in nodes if isinstance(n, ast.Global | ast.Nonlocal) for x in n.names}
        held |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler) and n.name}
        held |= {
            (a.asname or a.name).split(".")[0]
            for n in nodes
            if isinstance(n, ast.Import | ast.ImportFrom)
            for a in n.names
        }
        # In f-strings Python 3.11 does not know where names stand.
        held |= {x.id for n in nodes if isinstance(n, ast.JoinedStr) for x in ast.walk(n) if isinstance(x, ast.Name)}
        return {n for n in stored - held if n != "_"}

    def order(self, text: str) -> str:
        tree, rows = ast.parse(text), text.split("\n")
        classes = [c for c in tree.body if isinstance(c, ast.ClassDef)]
        near = [c for c in classes if any(n.startswith(f"{c.name}.") for n in self.near)]
        for c in sorted(near or classes, key=lambda c: -c.lineno)[:2]:
            methods = [m for m in c.body if isinstance(m, Function)]
            if len({m.name for m in methods}) < max(2, len(methods)):
                continue
            self._shuffle(rows, [(first_row(rows, m), m.end_lineno or m.lineno) for m in methods])
        block = []
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom) and getattr(node, "module", "") != "__future__":
                block.append(node)
            elif block:
                break
        self._shuffle(rows, [(n.lineno - 1, n.end_lineno or n.lineno) for n in block])
        return "\n".join(rows)

    def _shuffle(self, rows: list[str], spans: list[tuple[int, int]]) -> None:
        """Let the parts of `rows` at `spans`, in ascending order, change places."""
        parts = [rows[a:b] for a, b in spans]
        self.rng.shuffle(parts)
        for (a, b), part in reversed(list(zip(spans, parts, strict=True))):
            rows[a:b] = part

    def arguments(self, text: str) -> str:
        for _ in range(self.rng.randint(1, 3)):
            tree = ast.parse(text)
            function = self.pick(tree, lambda f: bool(f.args.args) and f.name != "forward")
            if function is None:
                continue
            self.count += 1
            new = f"drift_arg{self.count}"
            args = function.args
            last = (args.kwonlyargs or args.args)[-1]
            defaults = [d for d in (args.kw_defaults if args.kwonlyargs else args.defaults) if d is not None]
            end = max((n.end_lineno or 0, n.end_col_offset or 0) for n in [last, *defaults])
            if args.vararg and not args.kwonlyargs:
                end = (args.vararg.end_lineno or 0, args.vararg.end_col_offset or 0)
            edits = [(end[0], end[1], end[1], f", {new}=None")]
            for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
                called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
                of_self = isinstance(call.func, ast.Name) or ast.unparse(call.func) == f"self.{function.name}"
                handed = [*call.args, *(k.value for k in call.keywords)]
                if called == function.name and of_self and handed and not any(k.arg is None for k in call.keywords):
                    if call.end_lineno == call.lineno:
                        edits.append((call.lineno, call.end_col_offset - 1, call.end_col_offset - 1, f", {new}=None"))
                    elif isinstance(handed[-1], ast.Name | ast.Attribute):
                        row, column = handed[-1].end_lineno, handed[-1].end_col_offset
                        edits.append((row, column, column, f", {new}=None"))
            changed = splice(text, edits)
            try:
                ast.parse(changed)
            except SyntaxError:
                continue  # not a place where an argument may stand
            text = changed
        return text

    def format(self, text: str) -> str:
        length = self.rng.choice((70, 79, 100, 120, 160))
        quotes = self.rng.choice(("double", "single"))
        comma = self.rng.choice(("true", "false"))
        ruff = Path(sys.executable).with_name("ruff")
        return subprocess.run(
            [
                ruff,
                "format",
                "-q",
                "--isolated",
                "--line-length",
                str(length),
                "--config",
                f'format.quote-style="{quotes}"',
                "--config",
                f"format.skip-magic-trailing-comma={comma}",
                "-",
            ],
            input=text,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    def moved(self, name: str, text: str) -> Files:
        """`text` without one of its classes, and the new file that has it."""
        tree, rows = ast.parse(text), text.split("\n")
        classes = [c for c in tree.body if isinstance(c, ast.ClassDef)]
        # What it uses of its old home has to stand above it, or the two could not import each other.
        below = {
            c.name: {n.name for n in tree.body if isinstance(n, Function | ast.ClassDef) and n.lineno > c.lineno}
            for c in classes
        }
        near = [
            c
            for c in classes
            if any(n.startswith(f"{c.name}.") for n in self.near)
            and not below[c.name] & {n.id for n in ast.walk(c) if isinstance(n, ast.Name)}
        ]
        if not near:
            return {name: text}
        c = self.rng.choice(near)
        start = first_row(rows, c)
        used = {n.id for n in ast.walk(c) if isinstance(n, ast.Name)}
        used |= {
            x
            for n in ast.walk(c)
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
            for x in re.findall(r"\w+", n.value)
        }
        imports, own = [], []
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                imports += rows[node.lineno - 1 : node.end_lineno]
            elif isinstance(node, Function | ast.ClassDef) and node is not c and node.name in used:
                own.append(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                own += [t.id for t in targets if isinstance(t, ast.Name) and t.id in used and t.id != "logger"]
        package = name.removesuffix(".py").replace("/", ".")
        stem = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", c.name).lower()
        if own:
            imports.append(f"from {package} import {', '.join(own)}")
        stem += "_impl" if stem == Path(name).stem else ""
        new = str(Path(name).with_name(f"{stem}.py"))
        head = [*rows[:2], "", *imports, "", "logger = init_logger(__name__)" if "logger" in used else "", ""]
        back = f"from {new.removesuffix('.py').replace('/', '.')} import {c.name}"
        return {
            name: "\n".join([*rows[:start], back, *rows[c.end_lineno :]]),
            new: "\n".join([*head, *rows[start : c.end_lineno], ""]),
        }


def vendored(text: str) -> str:
    """Python `text` with every reference to the module vllm renamed."""
    edits = []
    for n in ast.walk(ast.parse(text)):
        if isinstance(n, ast.ImportFrom) and not n.level and (n.module or "").split(".")[0] == "vllm":
            edits.append((n.lineno, n.col_offset + 5, n.col_offset + 9, VENDOR))
        elif (isinstance(n, ast.alias) and n.name.split(".")[0] == "vllm") or (
            isinstance(n, ast.Name) and n.id == "vllm"
        ):
            edits.append((n.lineno, n.col_offset, n.col_offset + 4, VENDOR))
        elif isinstance(n, ast.Constant) and isinstance(n.value, str) and re.fullmatch(r"vllm(\.\w+)+", n.value):
            edits.append((n.lineno, n.col_offset + 1, n.col_offset + 5, VENDOR))
    return splice(text, edits)


KINDS = ("lines", "locals", "order", "arguments", "format", "moved", "package", "mixed")


def drift(files: Files, near: dict[str, set[str]], kind: str, seed: str) -> Files:
    """`files` as a fork may have them."""
    rng = random.Random(seed)
    if kind == "package":
        return {name.replace("vllm/", f"{VENDOR}/", 1): vendored(text) for name, text in files.items()}
    kinds = [kind]
    if kind == "mixed":
        # Formatting last: the others look at rows.
        kinds = sorted(rng.sample(KINDS[:6], rng.randint(2, 4)), key=lambda k: (k == "format", k == "moved", k))
    changed = dict(files)
    for i, one in enumerate(kinds):
        names = sorted(n for n in changed if n in near)
        for name in rng.sample(names, min(len(names), rng.randint(1, 4))):
            drifter = Drifter(rng, near[name], count=100 * i)
            if one == "moved":
                changed.update(drifter.moved(name, changed[name]))
            else:
                changed[name] = getattr(drifter, one)(changed[name])
    for name, text in changed.items():
        compile(text, name, "exec")
    return changed


class _Undo(ast.NodeTransformer):
    """Takes the drift off a syntax tree and sorts what has no order."""

    def _body(self, body: list[ast.stmt]) -> list[ast.stmt]:
        kept = []
        for s in body:
            if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) and isinstance(s.value.value, str):
                continue  # docstrings
            if isinstance(s, ast.Expr) and re.match(r"logger\.debug\('drift \d+'\)$", ast.unparse(s)):
                continue
            kept.append(s)
        return kept

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for name in ("body", "orelse", "finalbody"):
            if isinstance(getattr(node, name, None), list):
                setattr(node, name, self._body(getattr(node, name)))
        super().generic_visit(node)
        if isinstance(node, ast.ClassDef):
            node.body.sort(key=lambda s: s.name if isinstance(s, Function) else "")
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = re.sub(r"(_d\d+)+$", "", node.id)
        return node

    def visit_arguments(self, node: ast.arguments) -> ast.AST:
        for args, defaults in ((node.args, node.defaults), (node.kwonlyargs, node.kw_defaults)):
            for i in reversed(range(len(args))):
                if args[i].arg.startswith("drift_arg"):
                    del defaults[i - len(args) + len(defaults)]
                    del args[i]
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        node.keywords = [k for k in node.keywords if not (k.arg or "").startswith("drift_arg")]
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str):
            node.value = node.value.replace(" (drift)", "")
        return node


def canonical(files: Files, known: dict[str, frozenset]) -> dict[str, tuple]:
    """Each file's imports, as a set, and the rest of its syntax tree, without drift.

    `known`: the original files' imports. Another file holds a class that was moved there, with all imports of
    its old home, where they may stay behind.
    """
    trees: dict[str, ast.Module] = {}
    for name, text in files.items():
        text = re.sub(rf"\b{VENDOR}\b", "vllm", text)
        trees[name.replace(f"{VENDOR}/", "vllm/", 1)] = ast.parse(text)
    imports: dict[str, set] = collections.defaultdict(set)
    bodies: dict[str, list[ast.stmt]] = {}
    moved: dict[str, str] = {}
    for name, tree in trees.items():
        body = []
        for s in tree.body:
            if isinstance(s, ast.ImportFrom):
                file = f"{(s.module or '').replace('.', '/')}.py"
                if file in trees and file not in known:
                    moved[file] = name
                    body += [c for c in trees[file].body if isinstance(c, Function | ast.ClassDef)]
                else:
                    imports[name] |= {(s.level, s.module, a.name, a.asname) for a in s.names}
            elif isinstance(s, ast.Import):
                imports[name] |= {(0, None, a.name, a.asname) for a in s.names}
            else:
                body.append(s)
        bodies[name] = body
    result = {}
    for name, body in bodies.items():
        if name in moved:
            continue
        home = name.removesuffix(".py").replace("/", ".")
        for new, old in moved.items():
            if old == name:
                imports[name] -= known[name]
                imports[name] |= {i for i in imports[new] if i[1] != home}
        module = _Undo().visit(ast.Module(body=body, type_ignores=[]))
        result[name] = (frozenset(imports[name]), ast.dump(module))
    return result


def write(root: Path, files: Files) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def read(root: Path) -> Files:
    return {
        str(p.relative_to(root)): p.read_text()
        for p in sorted(root.rglob("*.py"))
        if not p.relative_to(root).parts[0].startswith(".")
    }


@dataclass(frozen=True)
class Bench:
    """What every drift starts from: original and patched files, the series as rules and as mails.

    beside: files that the series edits and no drift does, as CMake's are.
    """

    series: Series
    original: Files
    beside: Files
    near: dict[str, set[str]]
    known: dict[str, frozenset]
    expected: dict[str, tuple]
    mails: list[Path]

    def outcome(self, root: Path, method: str) -> str:
        """Patch the drifted tree in `root` and judge it."""
        mails = [str(m) for m in self.mails]
        if method == "vllm-quark":
            tree = Tree(root)
            try:
                tree.apply(series := self.series.in_package(tree.package), list(series.patches))
            except QuarkError:
                return "refused"
        else:
            if method == "git apply":
                commands = [["git", "apply", *mails]]
            elif method == "git am -3":
                commands = [["git", "am", "-q", "-3", "--keep-non-patch", *mails]]
            else:
                commands = [["patch", "-p1", "-s", "-f", "--fuzz=3", "--no-backup-if-mismatch", "-i", m] for m in mails]
            for command in commands:
                if subprocess.run(command, cwd=root, capture_output=True).returncode:
                    return "refused"
        try:
            return "right" if canonical(read(root), self.known) == self.expected else "wrong"
        except SyntaxError:
            return "wrong"


def prepare(folder: Path) -> Bench:
    series = load_series(ROOT)
    release = sources(RELEASE)
    names = sorted({e.file for p in series.patches for e in p.edits} & set(release) | {"vllm/__init__.py"})
    original = {n: release[n].decode() for n in names}
    base = folder / "base"
    write(base, original | {"vllm/model_executor/__init__.py": "", "pyproject.toml": ""})
    beside = {name: text for name, text in original.items() if not name.endswith(".py")}
    original = read(base)
    mails = format_patch(Tree(base), series, list(series.patches), folder / "mails")
    Tree(base).apply(series, list(series.patches))
    patched = read(base)
    near = {}
    for name in names:
        if not name.endswith(".py") or original[name] == patched[name]:
            continue
        before, after = (functions(ast.parse(files[name])) for files in (original, patched))
        near[name] = {k for k, f in after.items() if k not in before or ast.dump(f) != ast.dump(before[k])}
        near[name] = {k for k in near[name] if k in before} or set(list(before)[:3])
    known = {
        name: imports
        for files in (patched, original)
        for name, (imports, _) in canonical(files, dict.fromkeys(files, frozenset())).items()
    }
    return Bench(series, original, beside, near, known, canonical(patched, known), mails)


def one(bench: Bench, number: int, seed: int, keep: Path | None) -> dict:
    kind = KINDS[number % len(KINDS)]
    files = drift(bench.original, bench.near, kind, f"{seed}-{number}")
    row = {"number": number, "kind": kind}
    # A drift that its own inverse does not remove says nothing about any method.
    if canonical(files, bench.known) != canonical(bench.original, bench.known):
        shutil.rmtree("build/drift-not-taken-off", ignore_errors=True)
        write(Path("build/drift-not-taken-off"), files)
        raise SystemExit(f"drift {number} ({kind}) is not taken off again (see build/drift-not-taken-off)")
    for method in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "tree"
            write(root, bench.original | bench.beside | {"pyproject.toml": ""})
            if method != "vllm-quark":
                git(root, "init", "-q")
                git(root, "config", "user.name", "fork")
                git(root, "config", "user.email", "fork@example.com")
                git(root, "add", "-A", "-f")
                git(root, "commit", "-q", "-m", "base")
            for name in bench.original:
                (root / name).unlink()
            write(root, files)
            if method != "vllm-quark":
                git(root, "add", "-A", "-f")
                git(root, "commit", "-q", "--allow-empty", "-m", "drift")
            row[method] = bench.outcome(root, method)
            if method == "vllm-quark" and keep is not None:
                shutil.copytree(
                    root, keep / str(number), dirs_exist_ok=True, ignore=shutil.ignore_patterns(".vllm-quark")
                )
    return row


def layer_tests(patched: Path, folder: Path) -> str:
    """Last line of the layer tests' report with the drifted and patched files of `patched`."""
    site = make_shadow(folder / "site", load_series(ROOT), [])
    for file in filter(Path.is_file, (patched / "vllm").rglob("*")):
        to = site / file.relative_to(patched)
        if file.name != "__init__.py" or not to.exists():
            to.unlink(missing_ok=True)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, to)
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "2",
            "-p",
            "no:cacheprovider",
            "tests/quantization",
            *("--ignore", "tests/quantization/quark/test_int8_mutants.py"),
            *("--ignore", "tests/quantization/quark/test_reload.py"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
    )
    return process.stdout.strip().splitlines()[-1]


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--drifts", type=int, default=320)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--tests", type=int, default=0, help="drifts of each kind to run the layer tests on")
    ap.add_argument("--jobs", type=int, default=2)
    ap.add_argument("--keep", type=Path, help="folder for the trees that vllm-quark patched")
    ap.add_argument("--out", type=Path, help="page to write")
    args = ap.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(Path(folder))
        keep = args.keep or Path(folder) / "kept"
        keep.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(args.jobs) as pool:
            rows = list(pool.map(functools.partial(one, bench, seed=args.seed, keep=keep), range(args.drifts)))
        table: dict[str, dict] = {}
        for kind in (*KINDS, "all"):
            of_kind = [r for r in rows if kind in (r["kind"], "all")]
            if not of_kind:
                continue
            table[kind] = {"drifts": len(of_kind)}
            for method in METHODS:
                n = collections.Counter(r[method] for r in of_kind)
                table[kind][method] = [n["right"], n["refused"], n["wrong"]]
            print(kind, table[kind], flush=True)
        bad = [r for r in rows if r["vllm-quark"] != "right"]
        print(json.dumps([{k: r[k] for k in ("number", "kind", "vllm-quark")} for r in bad]))
        tests = []
        for kind in KINDS:
            if kind != "package":
                of_kind = [r["number"] for r in rows if r["kind"] == kind and r["vllm-quark"] == "right"]
                for number in of_kind[: args.tests]:
                    with tempfile.TemporaryDirectory() as temp:
                        tests.append((kind, number, layer_tests(keep / str(number), Path(temp))))
                        print(*tests[-1], flush=True)
    right = sum(r["vllm-quark"] == "right" for r in rows)
    wrong = [r["number"] for r in rows if r["vllm-quark"] == "wrong"]
    red = [t for t in tests if "failed" in t[2] or "error" in t[2]]
    if args.out:
        run = {**describe_run(), "drifts": args.drifts, "seed": args.seed, "vllm": RELEASE}
        run["git"] = git(ROOT, "--version").split()[2]
        test_rows = [[kind, number, re.sub(r" in .*", "", result)] for kind, number, result in tests]
        write_results(args.out, {"run": run, "rows": table, "tests": test_rows})
    return int(bool(wrong or red) or right < 0.95 * len(rows))


if __name__ == "__main__":
    sys.exit(main())
