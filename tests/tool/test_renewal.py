# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""vLLM 0.21.0 that an older vllm-quark patched, as the repository's history has it: `apply` of today renews it."""

import subprocess

import pytest
from test_tree import statuses
from trees import NEWER, ROOT, cli, one_line, visible

# An early series, the one that made INT8 loading anew, and the last before CPU experts went into vLLM's oracle.
COMMITS = ["327e519", "c9cc44a", "4dfee5f"]


@pytest.fixture(params=COMMITS)
def older(request, tmp_path):
    """vllm-quark as it was at a commit."""
    home, packed = tmp_path / "older", tmp_path / "older.tar"
    home.mkdir()
    result = subprocess.run(["git", "archive", "-o", packed, request.param], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"no history here: {result.stderr.strip()}")
    subprocess.run(["tar", "xf", packed, "-C", home], check=True)
    return home


@pytest.fixture(params=["unpacked", "installed"])
def patched(request, older):
    """A tree with the older series, and what was there before."""
    tree = request.getfixturevalue(request.param)
    before = visible(tree)
    result = cli(older, "apply", tree)
    assert result.returncode == 0, result.stderr
    return tree, before


def test_apply_renews_what_an_older_series_made(patched, tmp_path):
    tree, before = patched
    result = cli(ROOT, "status", tree)
    assert result.returncode == 1 and "apply renews it" in result.stdout, result.stdout + result.stderr
    assert cli(ROOT, "apply", tree).returncode == 0
    verdicts = statuses(ROOT, tree)
    assert {name for name, status in verdicts.items() if status != "applied"} == NEWER, verdicts
    assert cli(ROOT, "status", tree).returncode == 0
    renewed = visible(tree)
    assert cli(ROOT, "revert", tree).returncode == 0
    assert visible(tree) == before
    assert cli(ROOT, "apply", tree).returncode == 0
    assert renewed == visible(tree), "not what `apply` makes of a tree that nobody patched"


def test_revert_takes_an_older_series_out(patched):
    tree, before = patched
    result = cli(ROOT, "revert", tree)
    assert result.returncode == 0, result.stderr
    assert visible(tree) == before


@pytest.mark.parametrize("older", COMMITS[-1:], indirect=True)
def test_commits_of_an_older_series_are_to_be_dropped(older, unpacked, tmp_path):
    """`apply` takes back what it wrote, not what git has from people: it says so and changes nothing."""
    git = ["git", "-C", unpacked, "-c", "user.name=A", "-c", "user.email=a@example.com"]
    for words in (["init", "-q"], ["add", "-A", "-f"], ["commit", "-q", "-m", "base"], ["tag", "base"]):
        subprocess.run([*git, *words], check=True)
    assert cli(older, "format-patch", unpacked, "-o", tmp_path / "mails").returncode == 0
    mails = sorted((tmp_path / "mails").glob("*.patch"))
    subprocess.run([*git, "am", "-q", "--keep-non-patch", *mails], check=True)
    one_line(cli(ROOT, "apply", unpacked), "commits of an older series brought it, drop those: nothing was changed")
    assert not subprocess.run([*git, "status", "--porcelain"], check=True, capture_output=True).stdout
    subprocess.run([*git, "reset", "-q", "--hard", "base"], check=True)
    assert cli(ROOT, "apply", unpacked).returncode == 0
