# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The text of a pull request, with the figures that docs/ has."""

from pathlib import Path

from vllm_quark.patches import Patch, QuarkError
from vllm_quark.series import Series
from vllm_quark.topics import Topic

SUBJECT = "[Bugfix][Quark] INT8 W8A8 checkpoints: right, or refused with a reason"
_PURPOSE = (
    "Stock vLLM serves INT8 W8A8 checkpoints of AMD Quark wrong without an error, or stops without the layer's name. "
    "Each commit corrects one cause."
)
# page, heading, sentence before its first table
_RESULTS = (
    (
        "results.md",
        "On a GPU",
        "A small trained Step-3.5, exported by AMD Quark 0.13, on one H200 (vLLM 0.21.0), "
        "perplexity per byte of held-out text, and where the patches come one by one:",
    ),
    ("results.md", "Layer tests", "The layer tests that the series brings:"),
    ("results.md", "Broken checkpoints", "Seeded mutants of good checkpoints:"),
)


def _table(page: Path, heading: str) -> str:
    """The first table below `heading` in a Markdown page."""
    lines = iter(page.read_text(encoding="utf-8").splitlines())
    table: list[str] = []
    for line in lines:
        if line.startswith("#") and line.lstrip("#").strip() == heading:
            break
    for line in lines:
        if line.startswith("|"):
            table.append(line)
        elif table or line.startswith("#"):
            break
    if not table:
        raise QuarkError(f"{page}: no table below '{heading}': mend the page")
    return "\n".join(table)


def pull_request(series: Series, patches: list[Patch], topic: Topic | None = None) -> str:
    """Purpose, test plan and test result as vLLM's template asks for them, for these patches.

    topic: its purpose and its tables instead of the whole series'.

    Raises QuarkError where a page of docs/ lacks a table.
    """
    docs = series.home / "docs"
    if not docs.is_dir():
        raise QuarkError(f"{docs}: is missing, and the figures stand there: use a checkout of vllm-quark")
    tests = sorted({f for p in patches for f in p.files if Path(f).name.startswith("test_")})
    changes = "\n".join(f"- **{p.subject}**. " + " ".join(p.description.split("\n\n")[0].split()) for p in patches)
    tables = topic.results if topic else _RESULTS
    results = "\n\n".join(f"{caption}\n\n{_table(docs / page, heading)}" for page, heading, caption in tables)
    return f"""\
## Purpose

{topic.purpose if topic else _PURPOSE}

{changes}

## Test Plan

    pytest {" ".join(tests)}

Each commit's tests fail without it. Correctness is judged by float64 emulations of the schemes in the tests, not by
another path of vLLM.

## Test Result

{results}
"""
