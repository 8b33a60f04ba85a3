# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The pure part: text and rules in, text out."""

from pathlib import Path

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
    result = edit(SOURCE, rules(OLD))
    assert result.outcome is Outcome.APPLIES
    assert result.text == SOURCE.replace("old(self)", "new(self)")


def test_present_leaves_the_text():
    source = SOURCE.replace("old", "new")
    assert edit(source, rules(OLD)) == edit(source, rules(OLD)).__class__(Outcome.PRESENT, source)


def test_absent_where_needs_is_missing():
    result = edit(SOURCE, rules(OLD, needs={"pattern": "class B: $$$"}))
    assert result.outcome is Outcome.ABSENT and result.text == SOURCE


@pytest.mark.parametrize(
    ("source", "how"), [("y = 1\n", "not found"), ("old(1)\nold(2)\n", "found 2 times")], ids=["none", "two"]
)
def test_conflict_names_file_and_anchor(source, how):
    result = edit(source, rules(OLD))
    assert result.outcome is Outcome.CONFLICT and result.text == source
    assert result.detail.startswith(f"vllm/a.py: anchor 0: {how}: bring it back to what vLLM has there, or leave")


def test_rewrites_see_the_unedited_text():
    result = edit("old(1)\nb(2)\n", rules(OLD, ({"pattern": "b($X)"}, "old($X)")))
    assert result.text == "new(1)\nold(2)\n"


def test_inserted_lines_are_indented_and_have_no_trailing_blanks():
    rule = {"pattern": "$S", "kind": "expression_statement", "has": {"kind": "assignment"}}
    result = edit(SOURCE, rules((rule, "$S\n\nnew = {\n    1: new(2),\n}\n")))
    assert result.text.startswith(
        "class A:\n    x = f(\n        1\n    )\n\n    new = {\n        1: new(2),\n    }\n\n    def"
    )
    assert not any(line != line.rstrip() for line in result.text.splitlines())


def test_an_empty_fix_takes_the_line_along():
    rule = {"pattern": "import os"}
    result = edit("import os\nimport sys\n\nold(sys)\n", rules((rule, ""), OLD))
    assert result.text == "import sys\n\nnew(sys)\n"
    beside = edit("import os  # why\nold(1)\n", rules((rule, ""), OLD))
    assert beside.text == "  # why\nnew(1)\n"


def test_blank_lines_of_the_source_stay():
    source = 'x = """\n    \n"""\nold(1)\n'
    rule = ({"pattern": "$S", "kind": "module"}, "$S\nnew(1)")
    assert "\n    \n" in edit(source, rules(rule)).text


FUNCTION = """\
class A:
    # about f
    @cached
    def f(self):
        \"\"\"What f does.\"\"\"
        # why
        old(self)
        # after
        return 1
"""
IN_F = {"kind": "function_definition", "has": {"field": "name", "regex": "^f$"}}


def lines(way: str, rule: dict, text: str) -> str:
    file_edit = FileEdit(
        file="vllm/a.py", present={"pattern": "new($$$)"}, rewrite=[{"anchor": "f", "rule": rule, way: text}]
    )
    result = edit(FUNCTION, file_edit)
    assert result.outcome is Outcome.APPLIES
    return result.text


def test_lines_above_go_above_comments_and_decorators():
    assert lines("above", IN_F, "new = new(1)\n\n") == FUNCTION.replace(
        "    # about f", "    new = new(1)\n\n    # about f"
    )
    statement = {"kind": "expression_statement", "has": {"pattern": "old($$$)"}}
    assert lines("above", statement, "new(1)\n") == FUNCTION.replace("        # why", "        new(1)\n        # why")
    assert lines("below", statement, "\nnew(1)\n") == FUNCTION.replace("old(self)\n", "old(self)\n\n        new(1)\n")


def test_top_is_below_the_docstring_and_above_comments():
    assert lines("top", IN_F, "if new(1):\n    return\n") == FUNCTION.replace(
        "        # why", "        if new(1):\n            return\n        # why"
    )


def test_where_says_for_which_structure():
    def with_where(where: dict) -> str:
        return edit(
            SOURCE,
            rules(OLD).model_copy(
                update={
                    "rewrite": [
                        rules(OLD).rewrite[0].model_copy(update={"where": where}),
                        rules(({"pattern": "f($X)"}, "new(2)")).rewrite[0],
                    ]
                }
            ),
        ).text

    assert "new(self)" in with_where({"pattern": "class A: $$$"})
    assert "old(self)" in with_where({"pattern": "class B: $$$"})


def test_other_quotes_match():
    rule = ({"pattern": 'old("x", $Y)'}, "new($Y)")
    assert edit("old('x', 'y')\n", rules(rule)).text == "new('y')\n"


def test_a_file_that_is_no_python():
    result = edit("<<<<<<< HEAD\nold(1)\n", rules(OLD))
    assert result.outcome is Outcome.CONFLICT and "vllm/a.py:1: not valid Python" in result.detail


def test_imports_come_along():
    with_import = rules(OLD).model_copy(update={"imports": ["from vllm.b import c"]})
    assert edit("import os\n\nold(os)\n", with_import).text == "import os\n\nfrom vllm.b import c\n\nnew(os)\n"


def test_text_beyond_ascii():
    source = "# ünïcödé – ✓\nold('é')\n"
    assert edit(source, rules(OLD)).text == source.replace("old", "new")


@pytest.mark.parametrize(
    ("rewrites", "message"),
    [
        ([({"pattern": "old($X)"}, "new(")], "no valid Python"),
        ([({"pattern": "old($X)"}, "new(a=1, a=$X)")], "no valid Python.*repeated"),
        ([({"pattern": "old($X)"}, "other($X)")], "'present' does not match"),
        ([OLD, ({"pattern": "return old($X)"}, "return new($X)")], "overlap"),
        ([({"patern": "old($X)"}, "new($X)")], "refuses a rule"),
    ],
    ids=["syntax", "a keyword twice", "not recognised", "overlap", "bad rule"],
)
def test_broken_patches_are_refused(rewrites, message):
    with pytest.raises(PatchError, match=message):
        edit(SOURCE, rules(*rewrites))


def test_ast_grep_is_found_where_pip_install_user_puts_it(tmp_path, monkeypatch):
    """In ~/.local/bin, which is neither beside Python nor always on PATH: the distribution's record has it."""
    from vllm_quark import edit as module

    module._ast_grep.cache_clear()
    other = tmp_path / "sg"  # Debian has another program of this name
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    try:
        assert Path(module._ast_grep()).name.startswith("ast-grep")
    finally:
        module._ast_grep.cache_clear()


def test_time_limit(tmp_path, monkeypatch):
    from vllm_quark import edit as module

    slow = tmp_path / "ast-grep"
    slow.write_text("#!/bin/sh\nexec sleep 600\n")
    slow.chmod(0o755)
    monkeypatch.setattr(module, "_ast_grep", lambda: str(slow))
    monkeypatch.setattr(module, "TIME_LIMIT", 0.2, raising=False)
    rules = FileEdit(
        file="vllm/slow.py",
        present={"pattern": "g(1)"},
        rewrite=[{"anchor": "f", "rule": {"pattern": "f(1)"}, "fix": "g(1)"}],
    )
    edited = edit("f(1)  # slow\n" * 3, rules)
    assert edited.outcome is Outcome.CONFLICT
    assert "vllm/slow.py: ast-grep is not through its 3 lines after 0.2 s" in edited.detail
    # Other rules do not wait for the same text again.
    slow.write_text("#!/bin/sh\necho '[]'\n")
    other = rules.model_copy(update={"present": {"pattern": "h(1)"}})
    assert edit("f(1)  # slow\n" * 3, other).detail == edited.detail


PLACES = {
    "A.g": "class A:\n    def g(self):\n        return old(self)\n",
    "A": "class A:\n    old = old(1)\n",
    "g": "def g(self):\n    return old(self)\n",
    "_A._g": "class _A:\n    async def _g(self):\n        return old(self)\n",
}


@pytest.mark.parametrize("place", PLACES)
def test_at_is_the_rule_the_needs_and_the_words(place):
    """A place said once: only matches in it count, it is what the edit needs, and what the error names."""
    rewrite = {"at": place, "what": "the call", "rule": {"pattern": "old($X)"}, "fix": "new($X)"}
    rules = FileEdit(file="vllm/a.py", at=place, present={"pattern": "new($$$)"}, rewrite=[rewrite])
    elsewhere = "\n\ndef other():\n    return old(2), new(2)\n"
    edited = edit(PLACES[place] + elsewhere, rules)
    assert edited.outcome is Outcome.APPLIES, edited
    assert edited.text.count("new(") == 2 and edited.text.endswith(elsewhere)
    assert edit(edited.text, rules).outcome is Outcome.PRESENT
    assert edit(elsewhere, rules).outcome is Outcome.ABSENT
    edited = edit(PLACES[place].replace("old(", "older("), rules)
    assert edited.outcome is Outcome.CONFLICT
    assert edited.detail.startswith(f"vllm/a.py: {place}, the call: not found: ")
    assert FileEdit(**rules.model_dump()) == rules, "nothing is lost where the package has another name"


def test_at_alone_is_the_definition():
    rules = FileEdit(
        file="vllm/a.py", at="A", present={"pattern": "first()"}, rewrite=[{"at": "A.g", "top": "first()\n"}]
    )
    edited = edit(PLACES["A.g"], rules)
    assert edited.text == "class A:\n    def g(self):\n        first()\n        return old(self)\n"
    assert edit("class A:\n    pass\n", rules).detail.startswith("vllm/a.py: A.g: not found: ")


@pytest.mark.parametrize("directly", [True, False])
def test_directly_is_a_statement_of_the_body_itself(directly):
    rewrite = {"at": "g", "directly": directly, "rule": {"kind": "return_statement"}, "above": "new()\n"}
    rules = FileEdit(file="vllm/a.py", present={"pattern": "new()"}, rewrite=[rewrite])
    edited = edit("def g(x):\n    if x:\n        return 1\n    return 2\n", rules)
    assert edited.outcome is (Outcome.APPLIES if directly else Outcome.CONFLICT)
    if directly:
        assert edited.text == "def g(x):\n    if x:\n        return 1\n    new()\n    return 2\n"


def test_at_in_a_rule():
    where = {"kind": "module", "not": {"has": {"stopBy": "end", "at": "A.h"}}}
    rewrite = {"at": "A.g", "where": where, "top": "first()\n"}
    rules = FileEdit(file="vllm/a.py", needs={"at": "A"}, present={"pattern": "first()"}, rewrite=[rewrite])
    assert edit(PLACES["A.g"], rules).outcome is Outcome.APPLIES
    with pytest.raises(ValueError, match="leaves no room for 'kind' beside it"):
        FileEdit(file="vllm/a.py", needs={"at": "A", "kind": "module"}, present={"pattern": "x"}, rewrite=[rewrite])
