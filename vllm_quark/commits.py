# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The series as git commits: a mail series for one very tree, or commits in a repository."""

import shutil
import subprocess
import tempfile
from pathlib import Path

from vllm_quark.cover import SUBJECT, pull_request
from vllm_quark.patches import Patch, QuarkError
from vllm_quark.series import Series
from vllm_quark.tree import Tree

_EXACT = ["-c", "core.autocrlf=false", "-c", "core.safecrlf=false", "-c", "core.fileMode=true",
          "-c", "commit.gpgSign=false", "-c", "core.hooksPath=/dev/null"]  # fmt: skip


def git(folder: Path, *words: str, stdin: str | None = None) -> str:
    """Run git in `folder`; its output. Raises QuarkError with git's own last words."""
    if not shutil.which("git"):
        raise QuarkError("git is not installed: install it (Debian: apt-get install git)")
    done = subprocess.run(["git", *_EXACT, *words], cwd=folder, input=stdin, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "failed").splitlines()[-1]
        raise QuarkError(f"git {words[0]}: {said}")
    return done.stdout


def identity(folder: Path) -> tuple[str, str]:
    """Name and mail address that git would commit with in `folder`."""
    values = []
    for key in ("user.name", "user.email"):
        done = subprocess.run(["git", "config", key], cwd=folder, capture_output=True, text=True)
        if not done.stdout.strip():
            raise QuarkError(f'git has no {key}: git config --global {key} "…"')
        values.append(done.stdout.strip())
    return values[0], values[1]


def commit(repository: Path, patch: Patch) -> None:
    """Commit everything in `repository` with the patch's message, signed off."""
    git(repository, "add", "-A", "-f")
    git(repository, "commit", "-q", "--no-verify", "-s", "-F", "-", stdin=patch.message)


def format_patch(tree: Tree, series: Series, patches: list[Patch], out: Path, cover: bool = False) -> list[Path]:
    """Write the patches that apply to `tree` as a `git am` series into `out`; the files, in order.

    One commit a patch, author and Signed-off-by from git's config as seen from the tree. `cover`: also
    0000-cover-letter.patch and pull-request.md. Existing NNNN-*.patch files in `out` are an error, as they
    would be taken for part of the series.
    """
    name, mail = identity(tree.root)
    todo = tree.steps(series, patches, {})
    if out.exists() and not out.is_dir():
        raise QuarkError(f"{out}: is not a folder: name another with -o")
    if any(out.glob("[0-9][0-9][0-9][0-9]-*.patch")):
        raise QuarkError(f"{out}: holds a series already: empty it or name another folder with -o")
    if not todo:
        return []
    text = pull_request(series, [patch for patch, _ in todo]) if cover else ""
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "tree"
        repository.mkdir()
        git(repository, "init", "-q")
        git(repository, "config", "user.name", name)
        git(repository, "config", "user.email", mail)
        for file in {f for _, changed in todo for f in changed}:
            if (tree.root / file).exists():
                (repository / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(tree.root / file, repository / file)
        git(repository, "add", "-A", "-f")
        git(repository, "commit", "-q", "--allow-empty", "-m", "base")
        for patch, changed in todo:
            for file, data in changed.items():
                (repository / file).parent.mkdir(parents=True, exist_ok=True)
                (repository / file).write_bytes(data)
            commit(repository, patch)
        mails = Path(folder) / "mails"
        letter = ["--cover-letter"] if cover else []
        git(repository, "format-patch", "-q", "--no-signature", "--zero-commit", *letter, "-o", str(mails),
            f"-{len(todo)}")  # fmt: skip
        if cover:
            path = mails / "0000-cover-letter.patch"
            blurb = path.read_text().replace("*** SUBJECT HERE ***", SUBJECT).replace("*** BLURB HERE ***", text)
            path.write_text(blurb)
            (mails / "pull-request.md").write_text(text)
        out.mkdir(parents=True, exist_ok=True)
        written = []
        for mail_file in sorted(mails.iterdir()):
            new = out / f".{mail_file.name}.new"
            shutil.copy(mail_file, new)
            written.append(new.rename(out / mail_file.name))
    return written
