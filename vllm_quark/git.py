# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Run git so that it sees only the folder it runs in; what a tree's last commit has."""

import contextlib
import functools
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from vllm_quark.patches import QuarkError

_EXACT = [
    "-c",
    "core.autocrlf=false",
    "-c",
    "core.safecrlf=false",
    "-c",
    "core.fileMode=true",
    "-c",
    f"core.attributesFile={os.devnull}",
    "-c",
    f"core.hooksPath={os.devnull}",
]
_IDENT = re.compile(r"(?P<name>.+) <(?P<mail>[^<>]*)> \d+ [-+]\d+")
# git's variables that say where the user's settings lie
_OF_SETTINGS = ("GIT_EXEC_PATH", "GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_CONFIG_NOSYSTEM")
# git's local variables that say who someone is, not where a repository lies
_SAID_BY_USER = ("GIT_CONFIG_COUNT", "GIT_CONFIG_PARAMETERS")
# git's variables that say where a repository lies, as hooks have them
_OF_PLACES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_NAMESPACE")

Identity = dict[str, str]
"""GIT_AUTHOR_NAME, GIT_AUTHOR_EMAIL, GIT_COMMITTER_NAME, GIT_COMMITTER_EMAIL."""


def _call(folder: Path, environment: dict[str, str], *words: str, stdin: str | None = None) -> str:
    if not shutil.which("git"):
        raise QuarkError("git is not installed: install it (Debian: apt-get install git)")
    command = ["git", *words]
    # What git says may have any bytes: file names, people's names.
    process = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
    )
    if process.returncode:
        message = (process.stderr.strip() or process.stdout.strip() or "failed").splitlines()[-1]
        raise QuarkError(f"git {next((w for w in words if w[0] != '-' and '=' not in w), '')}: {message}")
    return process.stdout


def git(folder: Path, *words: str, stdin: str | None = None, who: Identity | None = None) -> str:
    """Run git in `folder` without the user's settings and git variables, as `who`; its output.

    Raises QuarkError with git's own last words, or where there is no git.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k == "GIT_EXEC_PATH"}
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_ATTR_NOSYSTEM": "1"}
    return _call(folder, environment | (who or {}), *_EXACT, *_trusted(), *words, stdin=stdin)


@functools.cache
def _trusted() -> list[str]:
    """The user's safe.directory settings: trees of other owners that git may work in."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k in _OF_SETTINGS}
    try:
        listed = _call(Path("/"), environment, "config", "--null", "--get-all", "safe.directory")
    except QuarkError:
        return []  # there are none
    return [word for folder in listed.split("\0")[:-1] for word in ("-c", f"safe.directory={folder}")]


def identity(folder: Path) -> Identity:
    """The author and committer that git would use in `folder`: from its variables, else from its settings.

    Raises QuarkError where neither says.
    """
    environment = dict(os.environ)
    for variable in set(_call(folder, environment, "rev-parse", "--local-env-vars").split()).difference(_SAID_BY_USER):
        environment.pop(variable, None)
    identity: Identity = {}
    for role in ("AUTHOR", "COMMITTER"):
        try:
            ident = _call(folder, environment, "-c", "user.useConfigOnly=true", "var", f"GIT_{role}_IDENT")
        except QuarkError as e:
            raise QuarkError(
                f"git knows no {role.lower()} ({e}): "
                'git config --global user.name "…" && git config --global user.email "…"'
            ) from e
        if m := _IDENT.match(ident):
            identity |= {f"GIT_{role}_NAME": m["name"], f"GIT_{role}_EMAIL": m["mail"]}
    return identity


def format_command(root: Path, *words: str) -> str:
    """A command of git on the tree in `root` for the user's shell, whatever folder and variables that has."""
    unset = [word for variable in _OF_PLACES if variable in os.environ for word in ("-u", variable)]
    return shlex.join([*(["env", *unset] if unset else []), "git", "-C", str(root), *words])


def has_commits(root: Path) -> bool:
    """Whether the tree is a git checkout with commits that git may read: not another owner's, not a broken one."""
    with contextlib.suppress(QuarkError):
        return (root / ".git").exists() and bool(git(root, "rev-parse", "HEAD"))
    return False


def find_committed(root: Path, files: Iterable[str]) -> set[str]:
    """Those of `files` that are in the tree's git as they lie there, or neither there nor here."""
    files = list(files)
    if not files or not (root / ".git").exists():
        return set()
    try:
        rows = git(root, "ls-tree", "-r", "-z", "HEAD", "--", *files).split("\0")[:-1]
        head_digests = {file: columns.split()[2] for columns, _, file in (row.partition("\t") for row in rows)}
        # Of a file that was moved, git would name the new place alone.
        differing = git(root, "diff", "--no-renames", "--name-only", "-z", "HEAD", "--", *files).split("\0")[:-1]
        # git diff says nothing of these; what a sparse checkout leaves out is as it should be.
        overlooked = {file for hidden in find_overlooked(root, files).values() for file in hidden}
        compared = [file for file in overlooked if (root / file).is_file() and not (root / file).is_symlink()]
        digests = git(root, "hash-object", "--", *compared).split() if compared else []
        differing += [file for file, digest in zip(compared, digests, strict=True) if digest != head_digests.get(file)]
    except QuarkError:
        return set()
    absent = {file for file in files if file not in head_digests and not (root / file).exists()}
    return absent | {file for file in files if file in head_digests and file not in differing}


def find_overlooked(root: Path, files: Iterable[str]) -> dict[str, list[str]]:
    """Those of `files` whose changes git was told to overlook, by the option of git update-index that ends this."""
    rows = git(root, "ls-files", "-v", "-z", "--", *files).split("\0")[:-1]
    marked = {
        "--no-skip-worktree": [row[2:] for row in rows if row[0] in "Ss"],
        "--no-assume-unchanged": [row[2:] for row in rows if row[0].islower()],
    }
    return {option: overlooked for option, overlooked in marked.items() if overlooked}


def find_unmerged(root: Path) -> list[str]:
    """Files with conflicts that nobody has resolved: git stash refuses while there are any."""
    return git(root, "diff", "--name-only", "--diff-filter=U", "-z").split("\0")[:-1]


def find_unstashable(root: Path, files: Iterable[str]) -> list[str]:
    """Files whose entries in the index keep git stash from taking `files` away.

    These are the ones of `files` that neither the index nor the folder has, as after git mv, and whatever file the
    index has without content (git add -N).
    """
    changes = ("diff", "--no-renames", "--name-only", "-z")
    deleted = git(root, *changes, "--cached", "--diff-filter=D", "HEAD", "--", *files).split("\0")[:-1]
    return deleted + git(root, *changes, "--diff-filter=A").split("\0")[:-1]


def read_committed(root: Path, file: str) -> bytes | None:
    """Content of `file` in the tree's last commit, line ends as git's text has them; None where it has no such file."""
    try:
        return git(root, "show", f"HEAD:./{file}").encode("utf-8", "surrogateescape")
    except QuarkError:
        return None
