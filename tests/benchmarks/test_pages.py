# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Generated pages and plots are what their stored results give, byte for byte."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.pages import PAGES
from benchmarks.plot_docs import PLOTS

ROOT = Path(__file__).parents[2]

DOCS = ROOT / "docs"


@pytest.mark.parametrize("name", PAGES)
def test_page(name: str):
    results = json.loads((DOCS / f"{name}.json").read_text())
    assert (DOCS / f"{name}.md").read_text(encoding="utf-8") == PAGES[name](results)


@pytest.mark.parametrize("name", PLOTS)
def test_plot(name: str):
    stored = (DOCS / name).read_text(encoding="utf-8")
    assert stored == PLOTS[name]()
    root = ElementTree.fromstring(stored)
    words = {re.sub(r"{.*}", "", element.tag): element.text for element in root}
    assert words["title"] and words["desc"]


@pytest.mark.parametrize("name", PLOTS)
def test_nothing_of_a_plot_lies_outside(name: str):
    """Text ends inside the picture: 0.62 of the font's size for each character is more than DejaVu Sans needs."""
    root = ElementTree.fromstring((DOCS / name).read_text(encoding="utf-8"))
    wide = float(root.attrib["width"])
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        if "transform" in text.attrib:
            continue
        x, long = float(text.attrib["x"]), 0.62 * float(text.attrib["font-size"]) * len(text.text or "")
        end = x + {"start": long, "middle": long / 2, "end": 0}[text.attrib["text-anchor"]]
        assert end <= wide + 4, text.text
