# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The series as git commits: a mail series for exactly one tree, or commits in a repository."""

import shutil
import tempfile
from pathlib import Path

from vllm_quark.cover import SUBJECT, pull_request
from vllm_quark.git import Identity, git, identity
from vllm_quark.patches import Patch, QuarkError
from vllm_quark.series import Series
from vllm_quark.topics import Topic
from vllm_quark.tree import Tree


def commit(repository: Path, patch: Patch, who: Identity) -> None:
    """Commit everything in `repository` with the patch's message, signed off."""
    git(repository, "add", "-A", "-f")
    git(repository, "commit", "-q", "--no-verify", "-s", "-F", "-", stdin=patch.message, who=who)


def format_patch(
    tree: Tree, series: Series, patches: list[Patch], out: Path, cover: bool = False, topic: Topic | None = None
) -> list[Path]:
    """Write the patches that apply to `tree` as a `git am` series into `out`; the files, in order.

    One commit per patch, author and Signed-off-by as git has them in the tree. `cover`: also
    0000-cover-letter.patch and pull-request.md, with the title and tables of `topic` where one is given. Existing
    NNNN-*.patch files in `out` are an error, as they would be taken for part of the series.
    """
    who = identity(tree.root)
    verdicts = tree.steps(series, patches)
    if out.exists() and not out.is_dir():
        raise QuarkError(f"{out}: is not a folder: name another with -o")
    if any(out.glob("[0-9][0-9][0-9][0-9]-*.patch")):
        raise QuarkError(f"{out}: holds a series already: empty it or name another folder with -o")
    if not verdicts:
        return []
    text = pull_request(series, [verdict.patch for verdict in verdicts], topic) if cover else ""
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "tree"
        repository.mkdir()
        git(repository, "init", "-q", "--template=")
        for file in {f for verdict in verdicts for f in verdict.changed}:
            if (tree.root / file).exists():
                (repository / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(tree.root / file, repository / file)
        git(repository, "add", "-A", "-f")
        git(repository, "commit", "-q", "--allow-empty", "-m", "base", who=who)
        for verdict in verdicts:
            for file, data in verdict.changed.items():
                (repository / file).parent.mkdir(parents=True, exist_ok=True)
                (repository / file).write_bytes(data)
            commit(repository, verdict.patch, who)
        mails = Path(folder) / "mails"
        letter = ["--cover-letter"] if cover else []
        git(
            repository,
            "format-patch",
            "-q",
            "--no-signature",
            "--zero-commit",
            *letter,
            "-o",
            str(mails),
            f"-{len(verdicts)}",
        )
        if cover:
            path = mails / "0000-cover-letter.patch"
            subject = topic.title if topic else SUBJECT
            letter_text = path.read_text("utf-8", "surrogateescape")
            letter_text = letter_text.replace("*** SUBJECT HERE ***", subject).replace("*** BLURB HERE ***", text)
            path.write_text(letter_text, "utf-8", "surrogateescape")
            (mails / "pull-request.md").write_text(text, "utf-8")
        out.mkdir(parents=True, exist_ok=True)
        written = []
        for mail_file in sorted(mails.iterdir()):
            unfinished = out / f".{mail_file.name}.new"
            shutil.copy(mail_file, unfinished)
            written.append(unfinished.rename(out / mail_file.name))
    return written
