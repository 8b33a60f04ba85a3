# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Generated pages and plots are what their stored results give, byte for byte."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.correctness.matrix import matrix_page
from benchmarks.correctness.models import models_page
from benchmarks.pages import PAGES
from benchmarks.plot_docs import PLOTS
from benchmarks.plots import COLOURS, OUTCOMES, draw_table

ROOT = Path(__file__).parents[2]

DOCS = ROOT / "docs"


@pytest.mark.parametrize("name", PAGES)
def test_page(name: str):
    results = json.loads((DOCS / f"{name}.json").read_text())
    assert (DOCS / f"{name}.md").read_text(encoding="utf-8") == PAGES[name](results)


def test_page_of_schemes():
    measured = [json.loads(file.read_text()) for file in sorted((DOCS / "matrix").glob("*.json"))]
    assert (DOCS / "matrix.md").read_text(encoding="utf-8") == matrix_page(measured)


def test_page_of_models():
    assert (DOCS / "models.md").read_text(encoding="utf-8") == models_page([*(DOCS / "models").glob("*.json")])


@pytest.mark.parametrize("name", PLOTS)
def test_plot(name: str):
    stored = (DOCS / name).read_text(encoding="utf-8")
    assert stored == PLOTS[name]()
    root = ElementTree.fromstring(stored)
    words = {re.sub(r"{.*}", "", element.tag): element.text for element in root}
    assert words["title"] and words["desc"]


def test_no_two_contestants_share_a_colour():
    outcomes = {name: colour for name, colour in OUTCOMES.items() if name != "garbage"}  # another word for wrong
    colours = [*COLOURS.values(), *outcomes.values()]
    assert len(set(colours)) == len(colours)


def test_figures_in_a_plot_are_not_rounded():
    assert "2.5229" in draw_table("A finding", "", [("perplexity", 12)], [("#000000", ["2.5229"])])


def test_text_outside_a_plot_is_refused():
    columns = [("name", 4), ("value", 5)]
    assert "figures" in draw_table("A finding", "", columns, [("#000000", ["some", "figures"])])
    with pytest.raises(ValueError, match="outside the picture"):
        draw_table("A finding", "", columns, [("#000000", ["some", "a cell that is too long for its column"])])
