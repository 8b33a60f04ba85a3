# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""format-patch and make-tree: what git makes of the series."""

import os
import shutil
import subprocess
import sys

import pytest
from trees import NEWER, RELEASE, ROOT, cli, one_line, snapshot, visible

from vllm_quark.release import CACHE

RELEASE_ARCHIVE = CACHE / f"vllm-{RELEASE}.tar.gz"


def git(folder, *words) -> str:
    command = ["git", "-c", "user.name=A Committer", "-c", "user.email=c@example.com", *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def without_git(tree) -> dict:
    return {k: v for k, v in visible(tree).items() if not k.startswith(".git")}


@pytest.fixture
def author(monkeypatch, tmp_path):
    (tmp_path / "gitconfig").write_text("[user]\n\tname = Ann Author\n\temail = ann@example.com\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


def commit_base(tree) -> None:
    git(tree, "init", "-q")
    git(tree, "add", "-A", "-f")
    git(tree, "commit", "-q", "-m", "base")


@pytest.mark.parametrize("line_end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_git_am_gives_what_apply_gives(home, tree, tmp_path, author, line_end):
    if line_end != "\n":
        path = tree / "vllm/alpha.py"
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    applied = shutil.copytree(tree, tmp_path / "applied")
    assert cli(home, "apply", applied).returncode == 0
    commit_base(tree)
    out = tmp_path / "out"
    result = cli(home, "format-patch", tree, "-o", out)
    assert result.returncode == 0 and "git am" in result.stdout, result.stderr
    mails = sorted(out.iterdir())
    assert [m.name[:4] for m in mails] == ["0001", "0002", "0003"]
    git(tree, "am", "-q", "--keep-non-patch", "--keep-cr", *map(str, mails))
    assert without_git(tree) == without_git(applied)
    subjects = git(tree, "log", "--format=%s|%an|%ae|%b").split("\n\n")
    assert "[Bugfix] Add a mapping to Alpha|Ann Author|ann@example.com" in "".join(subjects)
    assert git(tree, "log", "--format=%b").count("Signed-off-by: Ann Author <ann@example.com>") == 3
    assert '"status": "applied"' in cli(home, "status", tree, "--json", "--only", "0002").stdout
    assert "nothing to write" in cli(home, "format-patch", tree, "-o", tmp_path / "more").stdout


def test_the_real_release(unpacked, tmp_path, author):
    """On the unpacked 0.21.0: apply, revert, and git am byte for byte like apply."""
    before = visible(unpacked)
    result = cli(ROOT, "apply", unpacked)
    assert result.returncode == 0, result.stderr
    assert cli(ROOT, "status", unpacked).returncode == 0
    applied = visible(unpacked)
    assert len(applied) > len(before)
    assert cli(ROOT, "revert", unpacked).returncode == 0
    assert visible(unpacked) == before and not (unpacked / ".vllm-quark").exists()

    commit_base(unpacked)
    assert cli(ROOT, "format-patch", unpacked, "-o", tmp_path / "out").returncode == 0
    git(unpacked, "am", "-q", "-b", *map(str, sorted((tmp_path / "out").iterdir())))
    assert without_git(unpacked) == {k: v for k, v in applied.items() if not k.startswith(".git")}


def test_cover_letter(unpacked, tmp_path, author, real_series):
    """Beside the series, which git am takes as it is: a letter and a pull request with the figures of docs/."""
    out = tmp_path / "out"
    result = cli(ROOT, "format-patch", unpacked, "-o", out, "--cover")
    assert result.returncode == 0 and "--empty=drop" in result.stdout, result.stderr
    request = (out / "pull-request.md").read_text()
    letter = (out / "0000-cover-letter.patch").read_text()
    for heading in ("## Purpose", "## Test Plan", "## Test Result"):
        assert heading in request and heading in letter
    assert "| stock | quark | **135.8** |" in request and "test_int8_moe.py" in request
    count = len([p for p in real_series.patches if p.name[:4] not in NEWER])
    assert f"[PATCH 00/{count}] [Bugfix][Quark]" in letter and "***" not in letter and "files changed" in letter
    commit_base(unpacked)
    git(unpacked, "am", "-q", "--keep-non-patch", "--empty=drop", *map(str, sorted(out.glob("*.patch"))))
    assert git(unpacked, "rev-list", "--count", "HEAD").strip() == str(count + 1)
    # Without the pages there is no such text.
    home = tmp_path / "home"
    for name in ("vllm_quark", "patches", "vllm", "csrc", "tests"):
        shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.unpack_archive(RELEASE_ARCHIVE, tmp_path / "again", filter="data")
    result = cli(home, "format-patch", tmp_path / "again" / f"vllm-{RELEASE}", "-o", tmp_path / "none", "--cover")
    assert result.returncode == 2 and "docs: is missing" in result.stderr and not (tmp_path / "none").exists()


def test_make_tree(tmp_path, author, real_series):
    out = tmp_path / f"vllm-{RELEASE}"
    result = cli(ROOT, "make-tree", RELEASE, "-o", out)
    assert result.returncode == 0, result.stderr
    for name in ("vllm", "csrc", "tests", "setup.py", "CMakeLists.txt", "requirements"):
        assert (out / name).exists()
    subjects = git(out, "log", "--reverse", "--format=%s").splitlines()
    assert subjects == [f"vLLM {RELEASE}", *(p.subject for p in real_series.patches if p.name[:4] not in NEWER)]
    assert git(out, "describe", "--tags", "--abbrev=0").strip() == f"v{RELEASE}"
    assert not git(out, "status", "--porcelain", "-uall").strip()
    assert cli(ROOT, "status", out).returncode == 0
    again = cli(ROOT, "make-tree", RELEASE, "-o", out)
    assert again.returncode == 2 and "exists already" in again.stderr


def test_unknown_release(tmp_path, author):
    result = cli(ROOT, "make-tree", "0.21.99", "-o", tmp_path / "out")
    assert result.returncode == 2 and "no source distribution of vLLM 0.21.99" in result.stderr
    assert not (tmp_path / "out").exists()


# What git sets for hooks, `rebase --exec` in a worktree and aliases: the temporary repository must not follow it.
@pytest.mark.parametrize("command", ["format-patch", "make-tree"])
def test_the_users_repository_is_left_alone(home, tree, tmp_path, author, monkeypatch, command):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("mine")
    commit_base(mine)
    before = snapshot(mine)
    for variable, value in {
        "GIT_DIR": mine / ".git",
        "GIT_WORK_TREE": mine,
        "GIT_INDEX_FILE": mine / ".git/index",
        "GIT_OBJECT_DIRECTORY": mine / ".git/objects",
        "GIT_PREFIX": "sub/",
    }.items():
        monkeypatch.setenv(variable, str(value))
    words = ["format-patch", tree] if command == "format-patch" else ["make-tree", RELEASE]
    result = cli(home, *words, "-o", tmp_path / "out", "--only", "0005" if command == "make-tree" else "0001")
    assert snapshot(mine) == before
    assert result.returncode == 0, result.stderr


SETTINGS = {
    "diff.noprefix=true",
    "diff.mnemonicPrefix=true",
    "diff.context=0",
    "diff.interHunkContext=50",
    "format.coverLetter=true",
    "format.useAutoBase=true",
    "format.subjectPrefix=RFC",
    "format.attach=true",
    "format.suffix=.eml",
    "commit.gpgSign=true",
    "core.attributesFile=attributes",
}


@pytest.mark.parametrize("way", ["GIT_CONFIG_GLOBAL", "GIT_CONFIG_COUNT", "GIT_DIFF_OPTS"])
def test_the_users_settings_do_not_change_the_series(home, tree, tmp_path, author, monkeypatch, way):
    def series(name: str) -> dict[str, str]:
        result = cli(home, "format-patch", tree, "-o", tmp_path / name)
        assert result.returncode == 0, result.stderr
        return {
            p.name: "".join(line for line in p.open() if not line.startswith("Date:"))
            for p in (tmp_path / name).iterdir()
        }

    plain = series("plain")
    (tmp_path / "attributes").write_text("*.py binary\n")
    settings = sorted(s.replace("=attributes", f"={tmp_path}/attributes") for s in SETTINGS)
    if way == "GIT_CONFIG_GLOBAL":
        for setting in settings:
            git(tmp_path, "config", "--global", *setting.split("=", 1))
    elif way == "GIT_CONFIG_COUNT":
        monkeypatch.setenv("GIT_CONFIG_COUNT", str(len(settings)))
        for i, setting in enumerate(settings):
            monkeypatch.setenv(f"GIT_CONFIG_KEY_{i}", setting.split("=", 1)[0])
            monkeypatch.setenv(f"GIT_CONFIG_VALUE_{i}", setting.split("=", 1)[1])
    else:
        monkeypatch.setenv("GIT_DIFF_OPTS", "-u0")
        monkeypatch.setenv("GIT_EXTERNAL_DIFF", "false")
        monkeypatch.setenv("GIT_DEFAULT_HASH", "sha256")
    assert series("other") == plain


def test_identity_from_the_environment(home, tree, tmp_path, monkeypatch):
    """git's own variables name the author and who signs off; no configuration is needed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.delenv("GIT_CONFIG_GLOBAL", raising=False)
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", f"The {who.title()}")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", f"{who.lower()}@example.com")
    result = cli(home, "format-patch", tree, "-o", tmp_path / "out", "--only", "0001")
    assert result.returncode == 0, result.stderr
    mail = (tmp_path / "out/0001-Bugfix-Add-a-mapping-to-Alpha.patch").read_text()
    assert "\nFrom: The Author <author@example.com>\n" in mail
    assert "\nSigned-off-by: The Committer <committer@example.com>\n" in mail


def test_no_git(home, tree, tmp_path):
    (tmp_path / "bin").mkdir()
    env = {"HOME": str(tmp_path), "PATH": str(tmp_path / "bin"), "PYTHONPATH": str(home)}
    command = [sys.executable, "-m", "vllm_quark", "format-patch", str(tree), "-o", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    one_line(result, "git is not installed", "install it")
    assert not os.path.exists(tmp_path / "out")


def test_a_name_that_is_not_utf8(home, tree, tmp_path, monkeypatch):
    """git's settings may have any bytes, which git itself takes for Latin-1."""
    (tmp_path / "gitconfig").write_bytes(b"[user]\n\tname = Jos\xe9\n\temail = jose@example.com\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    result = cli(home, "format-patch", tree, "-o", tmp_path / "out", "--only", "0001")
    assert result.returncode == 0, result.stderr
    mail = (tmp_path / "out/0001-Bugfix-Add-a-mapping-to-Alpha.patch").read_bytes()
    assert "Signed-off-by: José <jose@example.com>".encode() in mail


def test_damaged_download(tmp_path, author, monkeypatch):
    archive = tmp_path / "cache/vllm-quark/vllm-9.9.tar.gz"
    archive.parent.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for data in (b"junk", RELEASE_ARCHIVE.read_bytes()[: 1 << 20] if RELEASE_ARCHIVE.exists() else b""):
        archive.write_bytes(data)
        result = cli(ROOT, "make-tree", "9.9", "-o", tmp_path / "out")
        one_line(result, f"{archive}: is damaged", "delete it and run again")
        assert not (tmp_path / "out").exists()
