# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The pages: every link leads somewhere, every quoted path exists, every quoted command is one."""

import functools
import importlib.metadata
import re
import shlex
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from trees import ROOT

from vllm_quark.cli import app
from vllm_quark.locate import find_installed

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
FOLDERS = "benchmarks|csrc|docs|examples|patches|requirements|tests|vllm|vllm_quark"
# A path in this repository, or in vLLM's tree; names in capitals (OUT, NNNN) stand for the reader's own.
PATH = re.compile(rf"(?:{FOLDERS})/[\w./*+-]*[\w*/]")
PLACEHOLDER = re.compile(r"[A-Z]{3,}(?![a-z])")
BUILT = (".so",)
# Files of vLLM's source tree, which is not here; the release's source distribution has them.
UPSTREAM = {"requirements/build/cuda.txt", "requirements/rocm.txt", "use_existing_torch.py"}
ASSIGNMENT = re.compile(r"\w+=\S*")


def pages() -> list[Path]:
    words = ["git", "ls-files", "-co", "--exclude-standard", "*.md"]
    names = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [ROOT / name for name in names if (ROOT / name).is_file()]


PAGES = pages()


def blocks_and_prose(text: str) -> tuple[str, str]:
    """A page's code blocks, and the rest of it."""
    code, prose, fenced = [], [], False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            code.append(line.strip())
        else:
            prose.append(line)
    return "\n".join(code), "\n".join(prose)


def headings(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    _, prose = blocks_and_prose(page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in titles}


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for image, words, target in LINK.findall(blocks_and_prose(text)[1]):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        file = page.parent / path if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in headings(file)):
            broken.append(f"{target} leads nowhere")
        if image and not words:
            broken.append(f"{target} has no alternative text")
    return broken


def missing_paths(page: Path, text: str) -> list[str]:
    code, prose = blocks_and_prose(text)
    roots = [ROOT, page.parent, find_installed()]
    missing = []
    for word in " ".join([code, *SPAN.findall(prose)]).split():
        path = word.strip("`'\"(),;:")
        if not PATH.fullmatch(path) or PLACEHOLDER.search(path) or path.endswith(BUILT) or path in UPSTREAM:
            continue
        if not any(True for root in roots for _ in ([root / path] if (root / path).exists() else root.glob(path))):
            missing.append(f"{path} does not exist")
    return missing


def commands(text: str) -> Iterator[list[str]]:
    """The commands that a page quotes, as words, without what stands before and after them."""
    code, prose = blocks_and_prose(text)
    for line in [*code.replace("\\\n", " ").splitlines(), *SPAN.findall(prose)]:
        for part in re.split(r"&&|\|\||[|;]", re.sub(r"(^|\s)#\s.*", "", line)):
            try:
                words = shlex.split(part.replace("[", " ").replace("]", " "))
            except ValueError:
                continue
            while words and (ASSIGNMENT.fullmatch(words[0]) or words[0] in ("nice", "taskset")):
                words = words[3:] if words[0] == "taskset" else words[1:]
            if words:
                yield [words[0].rpartition("/")[2], *words[1:]]


@functools.cache
def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def wrong_options(options: list[str], known: str) -> list[str]:
    words = set(re.findall(r"--[\w-]+", known))
    return [option for option in options if option not in words]


def no_command(page: Path, words: list[str]) -> str:
    """What is wrong with a quoted command; empty where nothing is or where it is none of ours."""
    command = " ".join(words)
    options = [word.partition("=")[0] for word in words if re.match(r"--\w", word)]
    if words[0] == "make" and len(words) > 1:
        unknown = [w for w in words[1:] if re.fullmatch(r"[a-z][\w-]*", w) and w not in targets()]
        return f"{command}: no target {unknown[0]}" if unknown else ""
    if words[0] == "vllm-quark" and len(words) > 1:
        group = typer.main.get_command(app)
        if words[1].startswith("-"):
            return "" if words[1] in ("--version", "--help") else f"{command}: no option {words[1]}"
        name = words[1]
        if not re.fullmatch(r"[a-z][\w-]*", name):
            return ""
        if name not in group.commands:
            return f"{command}: no command {name}"
        if name == "run" and "--" in words[2:]:
            options = options[: sum(word.startswith("--") for word in words[2 : words.index("--", 2)])]
        known = {o for p in group.commands[name].params for o in p.opts} | {"--help"}
        unknown = [o for o in options if o not in known]
        return f"{command}: no option {unknown[0]}" if unknown else ""
    if words[0] in ("python", "python3") and len(words) > 1:
        if words[1] == "-m" and len(words) > 2:
            if words[2].partition(".")[0] not in FOLDERS.split("|"):
                return ""
            file = ROOT / (words[2].replace(".", "/") + ".py")
            if not file.exists():
                file = file.with_suffix("") / "__main__.py"
        elif words[1].endswith(".py") and words[1] not in (*UPSTREAM, "setup.py"):
            file = next((f for f in (ROOT / words[1], page.parent / words[1]) if f.exists()), ROOT / words[1])
        else:
            return ""
        if not file.exists():
            return f"{command}: no file {file.relative_to(ROOT)}"
        unknown = wrong_options(options, file.read_text(encoding="utf-8"))
        return f"{command}: no option {unknown[0]}" if unknown else ""
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page: Path):
    text = page.read_text(encoding="utf-8")
    wrong = [no_command(page, words) for words in commands(text)]
    assert broken_links(page, text) + missing_paths(page, text) + [w for w in wrong if w] == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[a](docs/nowhere.md)", "docs/nowhere.md leads nowhere"),
        ("[a](README.md#no-such-heading)", "README.md#no-such-heading leads nowhere"),
        ("![](docs/README.md)", "docs/README.md has no alternative text"),
        ("`benchmarks/nowhere.py`", "benchmarks/nowhere.py does not exist"),
        ("    make nowhere", "make nowhere: no target nowhere"),
        ("    vllm-quark destroy TREE", "vllm-quark destroy TREE: no command destroy"),
        ("`vllm-quark apply --all`", "vllm-quark apply --all: no option --all"),
        ("    A=1 python3 -m tests.upstream.run --nothing", "no option --nothing"),
        ("    python -m tests.nowhere", "no file tests/nowhere"),
    ],
)
def test_what_is_wrong_is_said(text: str, says: str):
    page = ROOT / "PAGE.md"
    wrong = [no_command(page, words) for words in commands(text)]
    assert says in "".join([*broken_links(page, text), *missing_paths(page, text), *wrong])


def test_every_page_of_docs_is_in_the_index():
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert [p.name for p in (ROOT / "docs").glob("*.md") if p.name != "README.md" and f"({p.name})" not in index] == []


def test_upstream_files_are_in_the_release(sdist: Path):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= UPSTREAM


def test_the_version_is_the_changelogs():
    """The newest heading of CHANGELOG.md, or on the way to it; after a new heading: touch setup.py && make env."""
    newest = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    installed = importlib.metadata.version("vllm-quark")
    assert newest and re.fullmatch(rf"{re.escape(newest[1])}(\.dev\d+(\+.*)?)?", installed)
