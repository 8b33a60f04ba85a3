# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Bad input: one clear line that names the file and the way out, exit code 2, nothing half-written."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from trees import ALPHA, cli, make_tree, one_line, snapshot, visible, write

from vllm_quark.patches import QuarkError
from vllm_quark.record import read_record
from vllm_quark.transaction import read_file


def test_no_such_tree(home, tmp_path):
    one_line(cli(home, "status", tmp_path / "nowhere"), "nowhere", "does not exist", "name a")
    one_line(cli(home, "status", tmp_path), "not a vLLM tree", "name a site-packages folder or a vLLM source tree")


def test_no_vllm(home, tmp_path):
    one_line(cli(home, "apply", tmp_path), str(tmp_path), "not a vLLM tree")
    assert not (tmp_path / ".vllm-quark").exists()


def test_package_folder_instead_of_its_parent(home, tree):
    one_line(cli(home, "status", tree / "vllm"), "not a vLLM tree", f"name {tree} instead")


def test_bad_use(home, tree):
    for words in (["statsu", tree], ["status", "--onyl", "x", tree], ["format-patch", tree]):
        assert cli(home, *words).returncode == 2
    one_line(cli(home, "status", tree, "--only", "0009"), "no patch '0009'", "0001-mapping")
    one_line(cli(home, "status", tree, "--only", "0001", "--until", "0002"), "exclude each other")


def test_release_without_what_a_patch_edits(home, tree):
    before = snapshot(tree)
    one_line(cli(home, "apply", tree, "--only", "0004"), "vllm/alpha.py", "lacks what", "0004-elsewhere", "9.9")
    assert snapshot(tree) == before


def test_conflict_names_file_and_anchor(home, tree):
    beta = tree / "vllm/model_executor/beta.py"
    beta.write_text(beta.read_text().replace("x > 1", "x >= 1"))
    before = snapshot(tree)
    one_line(cli(home, "apply", tree), "0002-scale", "vllm/model_executor/beta.py", "run, comparison", "not found")
    assert snapshot(tree) == before
    result = cli(home, "status", tree)
    assert result.returncode == 1 and "conflict" in result.stdout and "run, comparison" in result.stdout
    way_out = "bring it back to what vLLM has there, or leave this patch out (--only with the others)"
    one_line(cli(home, "apply", tree), way_out)
    assert cli(home, "apply", tree, "--only", "1,3").returncode == 0
    beta.write_text(beta.read_text().replace("x >= 1", "x > 1"))
    assert cli(home, "apply", tree).returncode == 0 and "x > 2" in beta.read_text()


def test_file_in_the_way(home, tree):
    write(tree, {"vllm/configs/c.json": "theirs\n"})
    before = snapshot(tree)
    one_line(cli(home, "apply", tree), "0003-only-files", "vllm/configs/c.json", "other content")
    assert snapshot(tree) == before


@pytest.mark.parametrize("file", ["vllm/alpha.py", "vllm/new/deep/gamma.py"])
def test_hand_edited_file(home, tree, file):
    assert cli(home, "apply", tree).returncode == 0
    path = tree / file
    path.write_text(path.read_text() + "# mine\n")
    before = visible(tree)
    one_line(cli(home, "revert", tree), str(path), "changed since", "undo that change")
    one_line(cli(home, "apply", tree), str(path), "changed since")
    assert visible(tree) == before
    assert "changed since" in cli(home, "status", tree).stdout
    path.write_text(path.read_text().removesuffix("# mine\n"))
    assert cli(home, "revert", tree).returncode == 0


def test_lost_original(home, tree):
    assert cli(home, "apply", tree).returncode == 0
    (tree / ".vllm-quark/original/vllm/alpha.py").write_text("lost")
    before = visible(tree)
    one_line(cli(home, "revert", tree), "original/vllm/alpha.py", "put back vllm/alpha.py as in vLLM 9.9")
    assert visible(tree) == before
    assert cli(home, "apply", tree).returncode == 0, "nothing is left to do"
    (tree / "vllm/alpha.py").write_text(ALPHA)
    assert cli(home, "revert", tree).returncode == 0
    assert (tree / "vllm/alpha.py").read_text() == ALPHA and not (tree / "vllm/new").exists()


def test_damaged_record(home, tree):
    assert cli(home, "apply", tree).returncode == 0
    (tree / ".vllm-quark/record.json").write_text("{")
    one_line(cli(home, "status", tree), "record.json", "damaged")


BROKEN = {
    "not YAML": ("subject: [\n", "not valid YAML"),
    "not a mapping": ("- 1\n", "not a patch"),
    "unknown key": ("subject: a\ndescription: b\nfiles: [vllm/configs/c.json]\nedit: []\n", "edit:"),
    "no rule": (
        "subject: a\ndescription: b\nedits: [{file: vllm/a.py, present: {}, rewrite: []}]\n",
        "edits.0.present",
    ),
    "nothing to do": ("subject: a\ndescription: b\n", "needs edits or files"),
    "out of the tree": ("subject: a\ndescription: b\nfiles: [../x]\n", "../x"),
    "missing file": ("subject: a\ndescription: b\nfiles: [vllm/none.py]\n", "vllm/none.py"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_patch_file(home, tree, name):
    text, message = BROKEN[name]
    write(home, {"patches/0003-only-files.yaml": text})
    before = snapshot(tree)
    for command in ("status", "apply", "revert"):
        one_line(cli(home, command, tree), "patches/0003-only-files.yaml", message)
    assert snapshot(tree) == before


def test_no_patches(home, tree):
    shutil.rmtree(home / "patches")
    one_line(cli(home, "status", tree), "patches", "no patch files")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root in a sandbox that allows it")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_full_disk(home, small_disk):
    tree = make_tree(small_disk / "tree")
    before = snapshot(tree)
    space = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    # From no room at all to room for all but the last page.
    for free in range(0, 60 * 1024, 4096):
        (small_disk / "ballast").write_bytes(b"x" * max(0, space - free))
        result = cli(home, "apply", tree)
        if result.returncode == 0:
            assert free > 0
            break
        one_line(result, "No space left", "make room")
        assert snapshot(tree) == before, free
    else:
        pytest.fail("never had enough room")


def test_read_only_tree(home, small_disk):
    tree = make_tree(small_disk / "tree")
    before = snapshot(tree)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for command in ("apply", "revert"):
        one_line(cli(home, command, tree), str(tree), "Read-only", "remount it writable")
    assert cli(home, "status", tree).returncode == 1
    assert snapshot(tree) == before


@pytest.mark.parametrize("size", [0, 64, 200])
def test_file_size_limit(home, tree, size):
    """The full disk where nothing can be mounted: no file may grow beyond `size` bytes."""
    before = snapshot(tree)
    result = cli(home, "apply", tree, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    one_line(result, "File too large", "make room")
    assert snapshot(tree) == before


def test_folder_that_leads_out_of_the_tree(home, tree, tmp_path):
    outside = tmp_path / "outside"
    shutil.move(tree / "vllm/model_executor", outside)
    (tree / "vllm/model_executor").symlink_to(outside)
    before = snapshot(outside)
    one_line(cli(home, "apply", tree), "leads out of the tree", str(outside))
    assert snapshot(outside) == before


def test_not_text(home, tree):
    (tree / "vllm/alpha.py").write_bytes(b"\xff\xfe")
    one_line(cli(home, "apply", tree), "vllm/alpha.py", "not UTF-8")


def test_git_without_identity(home, tree, tmp_path):
    env = {"HOME": str(tmp_path), "GIT_CONFIG_NOSYSTEM": "1", "PATH": os.environ["PATH"], "PYTHONPATH": str(home)}
    import sys

    command = [sys.executable, "-m", "vllm_quark", "format-patch", str(tree), "-o", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    one_line(result, "user.name", "git config --global")
    assert not (tmp_path / "out").exists()


def test_out_folder_in_use(home, tree, tmp_path):
    out = tmp_path / "out"
    assert cli(home, "format-patch", tree, "-o", out).returncode == 0
    one_line(cli(home, "format-patch", tree, "-o", out), "holds a series already")
    Path(tmp_path / "file").write_text("")
    one_line(cli(home, "format-patch", tree, "-o", tmp_path / "file"), "is not a folder")


@pytest.mark.parametrize("linked", [False, True], ids=["repository", "submodule"])
@pytest.mark.parametrize(
    ("mark", "operation"), [("rebase-merge", "rebase"), ("rebase-apply", "am"), ("MERGE_HEAD", "merge")]
)
def test_in_the_middle_of_a_rebase(home, tree, tmp_path, linked, mark, operation):
    git = tree / ".git"
    if linked:
        git.write_text("gitdir: ../modules/vllm\n")
        git = tmp_path / "modules/vllm"
    (git / mark).mkdir(parents=True)
    before = snapshot(tree)
    for command in ("apply", "revert"):
        one_line(cli(home, command, tree), "in the middle of a git", operation, "finish or abort it")
    assert cli(home, "status", tree).returncode == 1
    assert snapshot(tree) == before


def test_conflict_marks(home, tree):
    path = tree / "vllm/alpha.py"
    path.write_text(path.read_text().replace("class Alpha", "<<<<<<< HEAD\nclass Alpha"))
    before = snapshot(tree)
    one_line(cli(home, "apply", tree, "--only", "0002"), "vllm/alpha.py:1: not valid Python", "mend it")
    assert snapshot(tree) == before


@pytest.mark.parametrize("words", [["--only", ""], ["--only", ","], ["--only", "1", "--only", ""], ["--until", ""]])
def test_a_choice_of_nothing_is_not_all(home, tree, words):
    """An empty variable of a script: `revert --only "$PATCH"`."""
    assert cli(home, "apply", tree).returncode == 0
    before = snapshot(tree)
    for command in ("status", "apply", "revert", "diff"):
        one_line(cli(home, command, tree, *words), words[-2], "names no patch")
    assert snapshot(tree) == before


def test_an_empty_folder_name_is_not_the_current_one(home, tree):
    """An empty variable of a script: `configs -o "$OUT"`."""
    before, at_home = snapshot(tree), snapshot(home)
    to = ("--to", "stacked")
    for words in (
        ["apply", ""],
        ["format-patch", "", "-o", "x"],
        ["configs", "-o", ""],
        ["shadow", "-o", " "],
        ["convert", "", "-o", "x", *to],
        ["convert", ".", "-o", "", *to],
        ["verify", ""],
    ):
        result = cli(home, *words, cwd=tree)
        assert result.returncode == 2 and "names no folder" in result.stderr, (words, result.stdout, result.stderr)
    assert snapshot(tree) == before and snapshot(home) == at_home


def test_spaces_between_names(home, tree):
    result = cli(home, "status", tree, "--only", "1, 0002", "--json")
    assert [p["name"][:4] for p in json.loads(result.stdout)["patches"]] == ["0001", "0002"], result.stdout


@pytest.mark.parametrize("linked", [".vllm-quark", ".vllm-quark/lock"])
def test_record_that_leads_nowhere(home, tree, tmp_path, linked):
    (tree / linked).parent.mkdir(exist_ok=True)
    (tree / linked).symlink_to(tmp_path / "gone/there")
    before = snapshot(tree)
    for command in ("apply", "revert"):
        result = cli(home, command, tree, timeout=20)
        one_line(result, str(tree / linked), "is in the way of vllm-quark's record: move it away")
    assert {k: v for k, v in snapshot(tree).items() if "gitignore" not in k} == before


@pytest.mark.parametrize("file", ["PKG-INFO", "vllm/_version.py"])
def test_version_file_that_is_not_utf8(home, tree, file):
    (tree / "vllm/_version.py").unlink()
    (tree / file).write_bytes(b"Author: Jos\xe9\nVersion: 9.9\nversion = '9.9'\n")
    assert json.loads(cli(home, "status", tree, "--json").stdout)["version"] == "9.9"


def test_full_disk_of_a_shadow(home, tree, small_disk):
    space = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "ballast").write_bytes(b"x" * space)
    out = small_disk / "shadow"
    one_line(cli(home, "shadow", tree, "-o", out), str(out), "No space left")
    assert not out.exists()


def test_shadow_inside_of_its_package(home, tree):
    before = snapshot(tree)
    result = cli(home, "shadow", tree, "-o", tree / "vllm/model_executor/shadow")
    one_line(result, "lies in the package that it is of: name a folder outside")
    assert snapshot(tree) == before


@pytest.mark.parametrize("file", [".vllm-quark/record.json", "vllm/alpha.py"])
def test_a_folder_where_a_file_was(home, tree, file):
    """It cannot be read: the line has a way out, as all others do."""
    assert cli(home, "apply", tree).returncode == 0
    (tree / file).rename(tree / "aside")
    (tree / file).mkdir()
    before = snapshot(tree)
    for command in ("status", "apply", "revert"):
        one_line(cli(home, command, tree), f"{tree / file}: cannot be read: Is a directory: mend that and run again")
    assert snapshot(tree) == before


@pytest.mark.parametrize("read", [read_record, lambda tree: read_file(tree, "vllm/alpha.py")])
def test_a_file_that_only_its_owner_may_read(tree, monkeypatch, read):
    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    for name in ("read_text", "read_bytes"):
        monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(QuarkError, match="cannot be read: Permission denied: run as the owner of the tree"):
        read(tree)


def test_shadow_that_pythonpath_cannot_name(home, tree, tmp_path):
    """Python would find the vLLM without patches."""
    one_line(cli(home, "shadow", tree, "-o", tmp_path / "a:b"), f"{tmp_path}/a:b: has a ':'", "name another")
    assert not (tmp_path / "a:b").exists()


def test_error_without_words(home, tree, tmp_path):
    """An OSError that has no errno says what it has."""
    code = (
        "import sys, vllm_quark.cli as c, vllm_quark.tree as t\n"
        "def fail(*_): raise OSError('out of sorts')\n"
        "t.load_chosen = fail\n"
        f"sys.argv = ['vllm-quark', 'status', {str(tree)!r}]; c.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=home)
    assert one_line(result) == "vllm-quark: out of sorts: mend that and run again"
