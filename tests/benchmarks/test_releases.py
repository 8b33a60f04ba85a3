# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""What the series changes in a release has to be called there."""

from pathlib import Path

from packaging.version import Version

from benchmarks.compatibility.releases import uncalled
from vllm_quark.series import load_series

ROOT = Path(__file__).parents[2]

BEFORE = {
    "vllm/router.py": b"def old(x):\n    return x\n\n\ndef new(x):\n    return x\n",
    "vllm/layer.py": b"from vllm.router import new\n\nnew(1)\n",
}


def test_a_changed_function_that_is_called():
    after = BEFORE | {"vllm/router.py": BEFORE["vllm/router.py"] + b"    # no change\n"}
    assert uncalled(BEFORE, after) == []
    after["vllm/router.py"] = after["vllm/router.py"].replace(b"def new(x):", b"def new(x):\n    x += 1")
    assert uncalled(BEFORE, after) == []


def test_a_changed_function_that_a_release_stopped_calling():
    after = BEFORE | {"vllm/router.py": BEFORE["vllm/router.py"].replace(b"def old(x):", b"def old(x):\n    x += 1")}
    assert uncalled(BEFORE, after) == ["vllm/router.py: nothing calls old"]


def test_a_class_that_comes_new():
    after = BEFORE | {"vllm/ours.py": b"class Ours:\n    pass\n"}
    assert uncalled(BEFORE, after) == ["vllm/ours.py: nothing calls Ours"]
    after["vllm/layer.py"] += b"\nNAMES = ['vllm.ours.Ours']\n"
    assert uncalled(BEFORE, after) == []


def test_every_absence_says_whether_that_is_fine():
    """Each `absent` of docs/releases.md has its reason in the patch, or the patch builds on one that has."""
    table = [
        line.strip("| ").split(" | ")
        for line in (ROOT / "docs/releases.md").read_text().splitlines()
        if line.startswith("| 0.") or line.startswith("| release")
    ]
    numbers = table[0][1:-1]
    patches = {p.number: p for p in load_series(ROOT).patches}
    without = []
    for release, *cells in (row for row in table[1:] if len(row) == len(table[0])):
        absent = {n for n, cell in zip(numbers, cells, strict=False) if cell == "absent"}
        older = lambda other, now=release: Version(now) < Version(other)  # noqa: E731
        for number in absent:
            patch = patches[number]
            if not absent.intersection(patch.requires) and not any(a.holds(older) for a in patch.absent):
                without.append((release, number))
    assert len(table) > 20 and not without
