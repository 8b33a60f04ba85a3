# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The pure part: text and rules in, text out."""

import pytest

from vllm_quark.edit import Outcome, edit
from vllm_quark.patches import FileEdit, PatchError

SOURCE = "class A:\n    x = f(\n        1\n    )\n\n    def g(self):\n        return old(self)\n"


def rules(*rewrites: tuple[dict, str], present: dict | None = None, needs: dict | None = None) -> FileEdit:
    return FileEdit(
        file="vllm/a.py",
        needs=needs,
        present=present or {"pattern": "new($$$)"},
        rewrite=[{"anchor": f"anchor {i}", "rule": r, "fix": fix} for i, (r, fix) in enumerate(rewrites)],
    )


OLD = ({"pattern": "old($X)"}, "new($X)")


def test_applies_and_keeps_every_other_byte():
    done = edit(SOURCE, rules(OLD))
    assert done.outcome is Outcome.APPLIES
    assert done.text == SOURCE.replace("old(self)", "new(self)")


def test_present_leaves_the_text():
    source = SOURCE.replace("old", "new")
    assert edit(source, rules(OLD)) == edit(source, rules(OLD)).__class__(Outcome.PRESENT, source)


def test_absent_where_needs_is_missing():
    done = edit(SOURCE, rules(OLD, needs={"pattern": "class B: $$$"}))
    assert done.outcome is Outcome.ABSENT and done.text == SOURCE


@pytest.mark.parametrize(
    ("source", "how"), [("y = 1\n", "not found"), ("old(1)\nold(2)\n", "found 2 times")], ids=["none", "two"]
)
def test_conflict_names_file_and_anchor(source, how):
    done = edit(source, rules(OLD))
    assert done.outcome is Outcome.CONFLICT and done.text == source
    assert done.detail == f"vllm/a.py: anchor 0: {how}"


def test_rewrites_see_the_unedited_text():
    done = edit("old(1)\nb(2)\n", rules(OLD, ({"pattern": "b($X)"}, "old($X)")))
    assert done.text == "new(1)\nold(2)\n"


def test_inserted_lines_are_indented_and_have_no_trailing_blanks():
    rule = {"pattern": "$S", "kind": "expression_statement", "has": {"kind": "assignment"}}
    done = edit(SOURCE, rules((rule, "$S\n\nnew = {\n    1: new(2),\n}\n")))
    assert done.text.startswith(
        "class A:\n    x = f(\n        1\n    )\n\n    new = {\n        1: new(2),\n    }\n\n    def"
    )
    assert not any(line != line.rstrip() for line in done.text.splitlines())


def test_an_empty_fix_takes_the_line_along():
    rule = {"pattern": "import os"}
    done = edit("import os\nimport sys\n\nold(sys)\n", rules((rule, ""), OLD))
    assert done.text == "import sys\n\nnew(sys)\n"
    beside = edit("import os  # why\nold(1)\n", rules((rule, ""), OLD))
    assert beside.text == "  # why\nnew(1)\n"


def test_blank_lines_of_the_source_stay():
    source = 'x = """\n    \n"""\nold(1)\n'
    rule = ({"pattern": "$S", "kind": "module"}, "$S\nnew(1)")
    assert "\n    \n" in edit(source, rules(rule)).text


def test_text_beyond_ascii():
    source = "# ünïcödé – ✓\nold('é')\n"
    assert edit(source, rules(OLD)).text == source.replace("old", "new")


@pytest.mark.parametrize(
    ("rewrites", "said"),
    [
        ([({"pattern": "old($X)"}, "new(")], "no valid Python"),
        ([({"pattern": "old($X)"}, "other($X)")], "'present' does not match"),
        ([OLD, ({"pattern": "return old($X)"}, "return new($X)")], "overlap"),
        ([({"patern": "old($X)"}, "new($X)")], "refuses a rule"),
    ],
    ids=["syntax", "not recognised", "overlap", "bad rule"],
)
def test_broken_patches_are_refused(rewrites, said):
    with pytest.raises(PatchError, match=said):
        edit(SOURCE, rules(*rewrites))
