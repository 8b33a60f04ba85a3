# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Optional patches: left out unless `--with` names them, and kept where they are."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from trees import ROOT, cli, make_wheel, one_line, visible

from vllm_quark.locate import find_installed
from vllm_quark.series import load_series
from vllm_quark.shadow import make_shadow
from vllm_quark.tree import Tree

OPTIONAL = """\
subject: "[Kernel] Another x"
description: For those who ask for it.
optional: true
requires: ["0001"]
edits:
  - file: vllm/other.py
    present: {pattern: x = 2}
    rewrite:
      - anchor: x
        rule: {pattern: x = 1}
        fix: x = 2
"""
NAME = "0006-x"


@pytest.fixture
def home(home: Path) -> Path:
    (home / f"patches/{NAME}.yaml").write_text(OPTIONAL)
    return home


def statuses(home: Path, tree: Path, *words: str) -> dict[str, str]:
    result = cli(home, "status", tree, "--json", *words)
    return {patch["name"]: patch["status"] for patch in json.loads(result.stdout)["patches"]}


def x_of(tree: Path) -> str:
    return (tree / "vllm/other.py").read_text()


def test_left_out_unless_named(home, tree):
    before = visible(tree)
    assert NAME not in statuses(home, tree)
    assert statuses(home, tree, "--with", "6")[NAME] == "applies"
    assert cli(home, "apply", tree).returncode == 0
    assert x_of(tree) == "x = 1\n" and NAME not in statuses(home, tree)
    assert cli(home, "apply", tree, "--with", NAME).returncode == 0
    assert x_of(tree) == "x = 2\n"
    # It is there, so it is told of, stays, and goes with the others.
    assert statuses(home, tree)[NAME] == "applied"
    assert cli(home, "apply", tree).returncode == 0
    assert x_of(tree) == "x = 2\n"
    assert cli(home, "revert", tree, "--only", "6").stdout == f"reverted {NAME}\n"
    assert x_of(tree) == "x = 1\n"
    assert cli(home, "apply", tree, "--with", "6").returncode == 0
    assert NAME in cli(home, "revert", tree).stdout
    assert visible(tree) == before


def test_named_beside_others(home, tree):
    assert cli(home, "apply", tree, "--only", "3", "--with", "6").returncode == 0
    applied = {name for name, status in statuses(home, tree).items() if status == "applied"}
    assert applied == {"0001-mapping", "0003-only-files", NAME}  # it requires 0001
    assert cli(home, "revert", tree).returncode == 0
    assert cli(home, "apply", tree, "--only", "6").returncode == 0
    assert x_of(tree) == "x = 2\n"
    one_line(cli(home, "revert", tree, "--only", "1"), NAME, "--with-dependents")


def test_told_of_where_no_record_is(home, tree):
    """As after `git am` or by hand."""
    assert cli(home, "apply", tree, "--with", "6").returncode == 0
    shutil.rmtree(tree / ".vllm-quark")
    assert NAME in statuses(home, tree)
    (tree / "vllm/other.py").write_text("x = 1\n")
    assert NAME not in statuses(home, tree)


def test_kept_under_another_name(home, tree):
    """A record of an older series, which called the patch otherwise."""
    assert cli(home, "apply", tree, "--with", "6").returncode == 0
    record = tree / ".vllm-quark/record.json"
    record.write_text(record.read_text().replace(NAME, "0006-old-name"))
    assert cli(home, "apply", tree).returncode == 0
    assert x_of(tree) == "x = 2\n" and statuses(home, tree)[NAME] == "applied"


def test_one_that_another_run_applied_meanwhile_stays(home, tree):
    """The series is chosen before the tree is locked."""
    series = load_series(home)
    chosen = series.select(["1"])
    assert cli(home, "apply", tree, "--with", "6").returncode == 0
    Tree(tree).apply(series, chosen)
    assert x_of(tree) == "x = 2\n"
    assert NAME in cli(home, "revert", tree).stdout


def test_each_command_that_writes_takes_it(home, tree, tmp_path):
    diff = cli(home, "diff", tree, "--with", "6").stdout
    assert "+x = 2" in diff and "+x = 2" not in cli(home, "diff", tree).stdout
    for words, count in (((), 0), (("--with", "6"), 1)):
        out = tmp_path / f"out-{count}"
        assert cli(home, "format-patch", tree, "-o", out, *words).returncode == 0
        assert sum("Another x" in mail.read_text() for mail in out.iterdir()) == count
        assert cli(home, "shadow", tree, "-o", tmp_path / f"shadow-{count}", *words).returncode == 0
        assert x_of(tmp_path / f"shadow-{count}") == f"x = {count + 1}\n"
    wheel = make_wheel(tmp_path / "wheels")
    result = cli(home, "wheel", wheel, "-o", tmp_path / "dist", "--with", "6")
    assert "[Kernel] Another x" in result.stdout, result.stderr
    assert "Another x" not in cli(home, "wheel", wheel, "-o", tmp_path / "plain").stdout


def test_bad_names(home, tree):
    before = visible(tree)
    one_line(cli(home, "apply", tree, "--with", "7"), "--with '7': no optional patch", NAME)
    one_line(cli(home, "apply", tree, "--with", "0001"), "--with '0001': no optional patch", NAME)
    one_line(cli(home, "apply", tree, "--with", ""), "--with ''", NAME)
    one_line(cli(home, "apply", tree, "--until", "6"), "'6' is an optional patch", "--with")
    one_line(cli(home, "apply", tree, "--with", "6", "--until", "3"), "--with and --until exclude each other")
    one_line(cli(home, "shadow", tree, "-o", tree / "s", "--with", "6", "--stock"), "--stock excludes")
    assert visible(tree) == before


def test_int32_sums_in_tritons_interpreter(tmp_path):
    """The layer tests of 0016, which no series without it runs."""
    series = load_series(ROOT).with_optional(["0016"])
    shadow = make_shadow(tmp_path / "site", series, [p.name for p in series.patches], find_installed())
    env = os.environ | {"PYTHONPATH": str(shadow), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["tests/quantization/quark/test_int32_sums.py", "tests/quantization/quark/test_int8_launch_configs.py"]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    last = result.stdout.strip().splitlines()[-1]
    assert result.returncode == 0 and "skipped" not in last, result.stdout
