# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""A vLLM tree on disk: status, apply, revert. WRITES, through `transaction`."""

import contextlib
import functools
import importlib.util
import os
import re
import shlex
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from vllm_quark.edit import matches
from vllm_quark.git import (
    find_committed,
    find_overlooked,
    find_unmerged,
    find_unstashable,
    format_command,
    git,
    has_commits,
    read_committed,
)
from vllm_quark.judge import Status, Verdict, View, find_moved, is_fixed_upstream, judge_patch, judge_series
from vllm_quark.locate import SHADOW_NOTE, find_package
from vllm_quark.patches import Patch, QuarkError
from vllm_quark.record import (
    FileRecord,
    Installation,
    LostOriginalError,
    Record,
    State,
    TreeError,
    digest_of,
    find_installation,
    read_original,
    read_record,
    settle,
)
from vllm_quark.series import Series, load_chosen
from vllm_quark.text import decode
from vllm_quark.transaction import change_files, lock_tree, read_file

WHEEL_NOTE = "vllm-quark.txt"
_UNFINISHED = {
    "rebase-merge": "rebase",
    "rebase-apply": "rebase or am",
    "MERGE_HEAD": "merge",
    "CHERRY_PICK_HEAD": "cherry-pick",
    "REVERT_HEAD": "revert",
    "sequencer": "cherry-pick or revert of several commits",
}


def _select_applying(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Those of patches that apply. Raises TreeError for a conflict, naming file and anchor."""
    applying = []
    for verdict in verdicts:
        if verdict.status is Status.CONFLICT:
            raise TreeError(f"{verdict.patch.name}: conflict: {verdict.detail}: nothing was changed")
        if verdict.status is Status.APPLIES:
            applying.append(verdict)
    return applying


def _join(words: list[str]) -> str:
    """The first of `words` as a text, and how many more there are."""
    first = words if len(words) < 4 else [*words[:3], f"{len(words) - 3} more"]
    return " and ".join([", ".join(first[:-1]), first[-1]] if len(first) > 1 else first)


def _pattern_of_users(files: Iterable[str]) -> re.Pattern[bytes]:
    """What a file holds that imports one of `files`, or builds the folder of one."""
    modules = [f.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for f in files if f.endswith(".py")]
    sources = [str(PurePosixPath(f).parent) for f in files if f.startswith("csrc/")]
    # Without any, nothing: an empty choice would match.
    words = "|".join(map(re.escape, {*modules, *sources})) or "(?!)"
    return re.compile(rf"\b(?:{words})\b".encode())


@dataclass(frozen=True)
class Plan:
    """Contents that files of a tree are to have (None: no file), and the names of the patches that make them."""

    contents: dict[str, bytes | None]
    applied: list[str]


class Tree:
    """A site-packages folder, a source checkout or an unpacked source distribution.

    `package`: the folder that holds vLLM's code, "vllm" but for a fork that renamed it; series have
    to be for that package. Raises TreeError where `root` is none of these.
    """

    def __init__(self, root: Path):
        self.root = root = Path(os.path.abspath(root))
        if not root.exists():
            raise TreeError(f"{root}: does not exist: name a site-packages folder or a vLLM source tree")
        self.package = find_package(root)
        # A site-packages folder may hold anyone's setup.py.
        is_site = next(root.glob("*.dist-info"), None) is not None
        self.is_source = not is_site and ((root / "pyproject.toml").is_file() or (root / "setup.py").is_file())

    @functools.cached_property
    def installation(self) -> Installation | None:
        """The installer's record of the package; None for a source tree."""
        return None if self.is_source else find_installation(self.root, self.package)

    @functools.cached_property
    def release(self) -> str:
        """The version that a file of the tree states, "" where none does."""
        for file, pattern in (
            (f"{self.package}/_version.py", r"""^(?:__version__|version)\b[^'"\n]*['"]([^'"]+)"""),
            ("PKG-INFO", r"^Version: (\S+)"),
        ):
            with contextlib.suppress(OSError):
                if m := re.search(pattern, (self.root / file).read_text("utf-8", "replace"), re.M):
                    return m[1]
        return self.installation.version if self.installation else ""

    @functools.cached_property
    def version(self) -> str:
        """The version as git's tags, else the tree itself tell it, "unknown" where neither does."""
        if (self.root / ".git").exists():
            with contextlib.suppress(QuarkError):
                tag, commits, commit = (
                    git(self.root, "describe", "--tags", "--long", "--match", "v[0-9]*").strip()[1:].rsplit("-", 2)
                )
                return tag if commits == "0" else f"{tag}+{commits}.{commit}"
        return self.release or "unknown"

    # Reading

    def read(self, file: str) -> bytes | None:
        """Bytes of `file`, None where the tree has no such file."""
        return read_file(self.root, file)

    def _belongs_here(self, file: str) -> bool:
        """An installed package has no build, docs or tests of its own: it takes only what lies in vllm/."""
        return self.is_source or file.startswith(f"{self.package}/")

    def _python_files(self) -> list[str]:
        return [p.relative_to(self.root).as_posix() for p in sorted((self.root / self.package).rglob("*.py"))]

    def view(self, changed: dict[str, bytes | None]) -> View:
        """The tree for `judge`, with the contents `changed` on top."""
        return View(self.read, self._python_files, self._belongs_here, self.version, changed)

    def _settle_record(self) -> tuple[Record, str]:
        """The part of the record that still holds, and a line about the rest."""
        record = read_record(self.root)
        if not record.files:
            return record, ""
        contents = {file: self.read(file) for file in record.files}
        return settle(record, self.root, contents, self.installation, self.release)

    def note(self) -> str:
        """A line that says that vLLM was replaced since it was patched; "" where it was not."""
        return self._settle_record()[1]

    def status(self, series: Series, patches: Iterable[Patch] | None = None) -> list[Verdict]:
        """The verdict on each patch for the current files of this tree, in series order."""
        record, _ = self._settle_record()
        outdated = self._outdated(series, record)
        brought = {file for patch in series.patches for file in patch.files if file in record.files}
        # A file that an older version of us brought is no conflict.
        changed: dict[str, bytes | None] = {
            file: series.content(file) for file in brought if self._state(record, file) is State.OURS
        }
        view = self.view(self._leftovers(series, record) | changed)
        verdicts = list(judge_series(series, patches if patches is not None else series.patches, view))
        committed = find_committed(self.root, {file for v in verdicts for file in v.touched})
        return [self._tell_origin(series, verdict, record, outdated, committed) for verdict in verdicts]

    def _state(self, record: Record, file: str) -> State:
        return record.files[file].state(self.read(file))

    def _tell_origin(
        self, series: Series, verdict: Verdict, record: Record, outdated: set[str], committed: set[str]
    ) -> Verdict:
        """`verdict`, with our own edits told apart from those of others."""
        patch, touched = verdict.patch, (*verdict.edited, *verdict.brought)
        on_record = [file for file in touched if file in record.files]
        if verdict.status is Status.ABSENT and patch.name in record.applied:
            deleted = [f for f in on_record if self.read(f) is None and self._state(record, f) is State.CHANGED]
            if deleted:
                detail = f"{deleted[0]} is missing: apply brings it back"
                return replace(verdict, status=Status.APPLIES, detail=detail)
        if verdict.status is not Status.UPSTREAM:
            is_known = patch.name in record.applied or set(verdict.holders) <= set(record.files)
            if is_known or verdict.incomplete or not (place := self._unrecorded(series, verdict, committed)):
                return verdict
            detail = f"{verdict.detail}, {place}" if verdict.status is Status.APPLIES else verdict.detail
            return replace(verdict, detail=detail, unrecorded=True)
        if patch.name in record.applied and on_record:
            if outdated.intersection(touched):
                detail = "from another version of vllm-quark, apply renews it"
                return replace(verdict, status=Status.APPLIES, detail=detail)
            changed = [f for f in on_record if self._state(record, f) is State.CHANGED]
            return replace(verdict, status=Status.APPLIED, detail=f"{changed[0]}: changed since" if changed else "")
        if patch.name in self.by_wheel():
            return replace(verdict, status=Status.APPLIED, detail="by wheel")
        if (verdict.edited and set(verdict.edited) <= set(record.files)) or (
            is_fixed_upstream(patch, self.version) and not verdict.brought
        ):
            return verdict
        if detail := self._unrecorded(series, verdict, committed):
            return replace(verdict, status=Status.APPLIED, detail=detail, unrecorded=True)
        return replace(verdict, detail="in the tree's commits" if patch.name in record.applied else "")

    def _unrecorded(self, series: Series, verdict: Verdict, committed: set[str]) -> str:
        """The place that a patch, or a part of it, came from that is there and not on record; "" where it may be
        upstream's own."""
        is_part = verdict.status is not Status.UPSTREAM
        touched = verdict.holders if is_part else verdict.touched
        is_whole = bool(verdict.brought) and not verdict.missing
        if self.installation is not None:
            is_ours = any(not self.installation.wrote(file, self.read(file)) for file in touched)
            return "not on record: revert names the way back" if is_ours else ""
        if self.is_source and self._is_uncommitted(series, verdict, committed):
            return "neither on record nor committed: revert names the way back"
        place = "by commit" if self.is_source and has_commits(self.root) else "not on record: revert names the way back"
        return place if is_whole else ""

    def _is_uncommitted(self, series: Series, verdict: Verdict, committed: set[str]) -> bool:
        """Whether git's last commit of this tree lacks a patch, or a part of it, that is there."""
        if committed.issuperset(verdict.touched) or not has_commits(self.root):
            return False
        # A class that moved is looked for where it stands now: each further file would be a call of git.
        last_commit = replace(
            self.view({}), read=lambda file: read_committed(self.root, file), python_files=lambda: verdict.holders
        )
        in_commit = judge_patch(series, verdict.patch, last_commit)
        if not verdict.edited:
            return in_commit.status is not Status.UPSTREAM
        # Not the files that it brings: those that another patch brought as well may be on record.
        pairs = [pair for pair in zip(verdict.edited, in_commit.edited, strict=True) if pair[0] in verdict.present]
        return any(not {*pair}.intersection(in_commit.holders) for pair in (*pairs, *verdict.moved))

    def with_recorded(self, series: Series) -> Series:
        """`series` with the optional patches that this tree has by record or by wheel.

        They are named by number: a patch may be called otherwise by now.
        """
        recorded = (*read_record(self.root).applied, *self.by_wheel())
        return series.with_optional(name.partition("-")[0] for name in recorded)

    def choose(
        self, only: Iterable[str] | None, until: str | None, optional: Iterable[str] | None, alone: bool = False
    ) -> tuple[Series, list[Patch]]:
        """The series for this tree and the patches that a command's options select from it.

        It has the optional patches that the options name and those that the tree has, on record or not. Raises
        QuarkError as `load_chosen` and `Series.select` do.
        """
        series, names = load_chosen(only, until, optional)
        series = self.with_recorded(series.in_package(self.package))
        there = [p.name for p in series.optional if judge_patch(series, p, self.view({})).status is Status.UPSTREAM]
        series = series.with_optional(there)
        return series, series.select(names, until, alone)

    def by_wheel(self) -> set[str]:
        """Patches that came with an installed wheel (see repack)."""
        if self.is_source:
            return set()
        notes = self.root.glob(f"*+*quark.dist-info/{WHEEL_NOTE}")
        return {name for note in notes for name in note.read_text().split()}

    def _outdated(self, series: Series, record: Record) -> set[str]:
        """Files that an older series wrote and that `series` would write differently."""
        try:
            view = self.view(self._contents_without_us(series, record))
            _select_applying(judge_series(series, [p for p in series.patches if p.name in record.applied], view))
        except QuarkError:
            return set()  # changed since: said file by file
        settled = (f for f, known in record.files.items() if known.ours == [digest_of(self.read(f))])
        return {f for f in settled if view.changed[f] != self.read(f)}

    def _leftovers(self, series: Series, record: Record) -> dict[str, bytes | None]:
        """Files that the series brings, not on record and not the installer's: an older record had them."""
        if self.installation is None:
            return {}
        brought = {f for patch in series.patches for f in patch.files if self._belongs_here(f)}
        return {
            f: None
            for f in brought
            if f not in record.files
            and f not in self.installation.digests
            and (data := self.read(f)) is not None
            and data != series.content(f)
        }

    def _refuse_unfinished(self) -> None:
        """Raises TreeError in the middle of a rebase, merge or the like, which a change of files would disturb, and
        in a shadow, which others share."""
        if (self.root / SHADOW_NOTE).exists():
            raise TreeError(f"{self.root}: is a shadow that `vllm-quark run` made: name the tree that it is of")
        git_folder = self.root / ".git"
        with contextlib.suppress(OSError):
            if git_folder.is_file() and (m := re.match(r"gitdir: (.+)", os.fsdecode(git_folder.read_bytes()))):
                git_folder = self.root / m[1].strip()
        for mark, operation in _UNFINISHED.items():
            if (git_folder / mark).exists():
                raise TreeError(f"{self.root}: in the middle of a git {operation}: finish or abort it and run again")

    def way_back(self, files: Iterable[str]) -> str:
        """How to restore the originals of `files` where we cannot. No command of it throws work away."""
        files = list(dict.fromkeys(files))
        if self.is_source and has_commits(self.root):
            committed = find_committed(self.root, files)
            if committed.issuperset(files):
                return self._in_commits(files)
            uncommitted = [file for file in files if file not in committed]
            # What git never had, a patch brought, unless most of vLLM is not in git.
            if any(read_committed(self.root, file) is not None for file in uncommitted):
                if unmerged := find_unmerged(self.root):
                    add = format_command(self.root, "add", "--", *unmerged)
                    return f"resolve the conflicts of {_join(unmerged)} and {add}"
                steps = [
                    ["update-index", option, "--", *overlooked]
                    for option, overlooked in find_overlooked(self.root, uncommitted).items()
                ]
                if unstashable := find_unstashable(self.root, uncommitted):
                    steps.append(["reset", "-q", "--", *unstashable])
                steps.append(["stash", "push", "--all", "--", *uncommitted])
                return f"{' && '.join(format_command(self.root, *step) for step in steps)} (it keeps a copy)"
        if self.installation is not None:
            # Another Python's packages: this one's pip would install beside them.
            own = self.root.resolve() in {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
            target = "" if own else f"--target {shlex.quote(str(self.root))} --upgrade "
            python = shlex.quote(sys.executable)
            install = f"{python} -m pip install {target}--force-reinstall --no-deps"
            # uv makes environments without pip.
            if importlib.util.find_spec("pip") is None:
                target = "" if own else f"--target {shlex.quote(str(self.root))} "
                install = f"uv pip install --python {python} {target}--reinstall --no-deps"
            own_changes = "(it overwrites your own changes to vLLM, too)"
            return f"{install} {self.installation.name}=={self.installation.version} {own_changes}"
        return f"put back {_join(files)} as in vLLM {self.version}"

    def _in_commits(self, files: list[str]) -> str:
        log = format_command(self.root, "log", "--", *list(dict.fromkeys(files))[:3])
        return f"they are in commits: drop or revert those with git ({log})"

    def _contents_without_us(self, series: Series, record: Record) -> dict[str, bytes | None]:
        """Content of all recorded files without us.

        Raises TreeError for a file that was edited on top of our patches or whose original is lost; a file that was
        replaced, as a reinstall does, counts as a new original.
        """
        contents: dict[str, bytes | None] = {}
        for file, known in record.files.items():
            now = self.read(file)
            state = known.state(now)
            if state is State.ORIGINAL:
                contents[file] = now
            elif state is State.OURS or now is None:
                try:
                    contents[file] = read_original(self.root, file, known)
                except LostOriginalError as e:
                    raise LostOriginalError(f"{e}: {self.way_back([file])}; then run again") from e
            elif self._holds_our_edit(series, record, file, now):
                raise TreeError(
                    f"{self.root / file}: changed since vllm-quark wrote it: undo that change (keep a copy of it), "
                    "or reinstall vLLM"
                )
            else:
                contents[file] = now
        return contents

    def _holds_our_edit(self, series: Series, record: Record, file: str, data: bytes) -> bool:
        """Whether a file that changed since may still hold our edits."""
        patches = [p for p in series.patches if p.name in record.applied]
        folder = PurePosixPath(file).parent
        rules = [e for p in patches for e in p.edits if PurePosixPath(e.file).parent == folder]
        if not rules or any(file in p.files for p in patches):
            return True
        with contextlib.suppress(UnicodeDecodeError):
            plain = decode(data).plain
            return any(matches(plain, r.present) for r in rules if not r.is_cmake)
        return True

    # Changing

    def _plan(self, series: Series, names: set[str], record: Record) -> Plan:
        """The planned tree: the originals with the patches `names` applied in series order."""
        start = self._contents_without_us(series, record)
        view = self.view(self._leftovers(series, record) | start)
        applying = _select_applying(judge_series(series, [p for p in series.patches if p.name in names], view))
        contents = start | {file: data for verdict in applying for file, data in verdict.changed.items()}
        return Plan(contents, [verdict.patch.name for verdict in applying])

    def _carry_out(self, record: Record, plan: Plan) -> None:
        stamp = self.installation.stamp if self.installation else ""
        kept = record.in_commits if plan.applied else []
        after = Record(applied=plan.applied, version=self.release, installation=stamp, in_commits=kept)
        change_files(self.root, record, plan.contents, after)

    def preview(self, series: Series, patches: list[Patch]) -> dict[str, tuple[bytes | None, bytes | None]]:
        """The changes that `apply` would make: each file's content before and after, None where there is no file."""
        record, _ = self._settle_record()
        plan = self._plan(series, {p.name for p in patches} | set(record.applied), record)
        contents = {file: (self.read(file), new) for file, new in sorted(plan.contents.items())}
        return {file: (old, new) for file, (old, new) in contents.items() if old != new}

    def apply(self, series: Series, patches: list[Patch]) -> list[Verdict]:
        """Make `patches` part of the tree, besides those applied before; all or nothing.

        Returns what each of `patches` is afterwards. Raises TreeError for a conflict (naming file
        and anchor) and where none of them has anything to edit here.
        """
        self._refuse_unfinished()
        with lock_tree(self.root):
            record, _ = self._settle_record()
            # Another run may have applied one since the series was chosen.
            series = self.with_recorded(series)
            names = {p.name for p in patches} | set(record.applied)
            try:
                self._carry_out(record, self._plan(series, names, record))
            except LostOriginalError:
                if any(v.status in (Status.APPLIES, Status.CONFLICT) for v in self.status(series, patches)):
                    raise
            after = self.status(series, patches)
            if reason := self.nothing_here(after):
                raise TreeError(reason)
            return after

    def nothing_here(self, verdicts: list[Verdict]) -> str:
        """The reason why none of the patches can be of use here; "" where one is, or where none is needed."""
        amiss = [v for v in verdicts if not v.harmless]
        if not amiss or any(v.status is not Status.ABSENT for v in verdicts):
            return ""
        subject = amiss[0].patch.name if len(verdicts) == 1 else "the patches"
        return (
            f"{self.root}: {amiss[0].detail}: vLLM {self.version} lacks what {subject} edits: use a release that "
            "`vllm-quark status` shows as applies"
        )

    def revert(self, series: Series, patches: list[Patch], with_dependents: bool = False) -> list[str]:
        """Take `patches` out again; every file that no other patch needs is as before, byte for byte.

        Returns the names taken out. Raises TreeError naming a file that was changed since, and the patches that build
        on those of `patches`, which `with_dependents` takes out, too.
        """
        self._refuse_unfinished()
        with lock_tree(self.root):
            self._refuse_moved_off_record(series, patches)
            record, _ = self._settle_record()
            series = self.with_recorded(series)
            record = self._with_left_behind(series, patches, record)
            if not record.files:
                record = replace(record, applied=[])  # all of it was replaced
            leaving = [p for p in patches if p.name in record.applied]
            dependents = [p for p in series.dependents(leaving) if p.name in record.applied]
            if dependents and not with_dependents:
                names = _join([p.name for p in dependents])
                raise TreeError(f"{leaving[0].name}: {names} build on it: --with-dependents takes them out, too")
            leaving = [p for p in series.patches if p in leaving or p in dependents]
            for file, known in record.files.items():
                now = self.read(file)
                if now is not None and known.state(now) is State.CHANGED:
                    raise TreeError(
                        f"{self.root / file}: changed since vllm-quark wrote it: undo that change (keep a copy of "
                        "it) and revert again, or reinstall vLLM"
                    )
            # A patch that a newer vllm-quark no longer has goes, too.
            plan = self._plan(series, set(record.applied) - {p.name for p in leaving}, record)
            self._refuse_leftovers(series, leaving, plan, record)
            self._refuse_moved(leaving, record)
            self._carry_out(record, plan)
            return [p.name for p in leaving]

    def not_on_record(self, series: Series, patches: list[Patch]) -> str:
        """Which of `patches` are in the tree without a record of it, and the way back; "" if none."""
        by_wheel = self.by_wheel()
        record, _ = self._settle_record()
        unrecorded = [v for v in self.status(series) if v.unrecorded or v.incomplete]
        unrecorded = [v for v in unrecorded if v.patch.name not in by_wheel and v.patch.name not in record.applied]
        chosen = [v for v in unrecorded if v.patch in patches]
        if not chosen:
            return ""
        names = _join([v.patch.name for v in chosen])
        files = list(dict.fromkeys(file for v in chosen for file in v.holders or v.brought))
        moved = [move for v in chosen for move in v.moved]
        if moved and not (self.is_source and has_commits(self.root)):
            return self._say_moved(moved)
        if self.installation is not None:
            return f"{self.root}: {names}: not on record, in {_join(files)}: {self.way_back(files)}; then revert again"
        if not self.is_source or not has_commits(self.root):
            return f"{self.root}: {names}: not on record: {self.way_back(files)}"
        edited = {rules.file for v in unrecorded for rules in v.patch.edits}
        committed = find_committed(self.root, edited.union(*(v.touched for v in unrecorded)))
        uncommitted = [v for v in unrecorded if self._is_uncommitted(series, v, committed)]
        if not any(v in chosen for v in uncommitted):
            # git knows the commits of a file that was moved by its old name.
            return f"{self.root}: {names}: not on record: {self._in_commits([file for file, _ in moved] + files)}"
        if moved := [move for v in uncommitted for move in v.moved if move[1] not in committed]:
            return self._say_moved(moved)
        # They share files, so that none of them can go alone. A file that was moved has to go back to its old place.
        pairs = [(v, *pair) for v in uncommitted for pair in zip(v.edited, v.patch.edits, strict=True)]
        files = [f for v, file, rules in pairs if file in v.present for f in (file, rules.file)]
        files += [f for v in uncommitted for f in v.brought]
        files = [f for f in files if f not in committed]
        names = _join([v.patch.name for v in uncommitted])
        return f"{self.root}: {names}: not on record: {self.way_back(files)}; then revert again"

    def _files_in(self, folder: str) -> Iterator[str]:
        paths = (path for path in (self.root / folder).rglob("*") if path.parent.name != "__pycache__")
        return (path.relative_to(self.root).as_posix() for path in paths if path.is_file())

    def _with_left_behind(self, series: Series, patches: list[Patch], record: Record) -> Record:
        """`record` with the files of `patches` that are there byte for byte though nothing uses them: not the
        installer's, not in git, of no patch whose edits are there."""
        files = {f for patch in patches for f in patch.files} - record.files.keys()
        files = {f for f in files if self.read(f) == series.content(f)}
        if self.installation is not None:
            files -= self.installation.digests.keys()
        elif self.is_source and has_commits(self.root):
            files = {f for f in files if read_committed(self.root, f) is None}
        else:
            return record
        if not files:
            return record
        verdicts = [v for v in self.status(series) if v.status is not Status.ABSENT or (v.holders and v.unrecorded)]
        edits = [v for v in verdicts if v.edited and (v.present or (v.moved and v.unrecorded))]
        # Files that no edit uses tell nothing; they go once no edit is there off the record.
        is_bare = all(v.status is Status.UPSTREAM or v.patch.name in record.applied for v in edits)
        needed_by = [v for v in verdicts if v in edits or v.patch.name in record.applied or not (v.edited or is_bare)]
        files -= {f for v in needed_by for f in v.brought}
        staying = (f for f in (*self._python_files(), *series.edited_files()) if f not in files)
        users = _pattern_of_users(files)
        if any(users.search(self.read(file) or b"") for file in staying):
            return record
        names = [v.patch.name for v in verdicts if v.patch in patches and files.intersection(v.brought)]
        adopted = {file: FileRecord(None, [str(digest_of(self.read(file)))]) for file in sorted(files)}
        around = {str(folder) for file in files for folder in PurePosixPath(file).parents[:-1]}
        folders = {folder for folder in around if files.issuperset(self._files_in(folder))}
        return replace(
            record,
            applied=[*record.applied, *(name for name in names if name not in record.applied)],
            files=record.files | adopted,
            folders=sorted({*record.folders, *folders}),
        )

    def _refuse_leftovers(self, series: Series, leaving: list[Patch], plan: Plan, record: Record) -> None:
        """Raises TreeError where edits that we have no original of would stay without the files that they need."""
        removed = {f for f, data in plan.contents.items() if data is None and self.read(f) is not None}
        users = _pattern_of_users(removed)
        staying: list[str] = []
        names = []
        for patch in leaving:
            view = self.view(dict(plan.contents))
            verdict = judge_patch(series, patch, view)
            # All of its edits, those that commits took off the record, those that import what goes.
            stays = set(verdict.edited if verdict.incomplete else ())
            if not is_fixed_upstream(patch, self.version):
                stays.update(set(verdict.present).intersection(record.in_commits))
                stays.update(place for file, place in verdict.moved if file in record.in_commits)
            places = (*verdict.edited, *(place for _, place in verdict.moved))
            stays.update(file for file in places if users.search(view.content(file) or b""))
            if stays:
                names.append(patch.name)
                staying += sorted(stays)
        if staying:
            staying = list(dict.fromkeys(staying))
            raise TreeError(
                f"{self.root}: {_join(names)}: edits of {_join(staying)} are not on record, and the files they "
                f"need would go: {self.way_back(staying)}; then revert again"
            )

    def _refuse_moved(self, leaving: list[Patch], record: Record) -> None:
        """Raises TreeError where a file on record stands elsewhere, with its edits: they would stay there."""
        edits = [rules for patch in leaving for rules in patch.edits]
        missing = [rules for rules in edits if rules.file in record.files and self.read(rules.file) is None]
        places = [(rules.file, find_moved(rules, self.view({}))) for rules in missing]
        if moved := [(file, place) for file, place in places if place]:
            raise TreeError(self._say_moved(moved))

    def _refuse_moved_off_record(self, series: Series, patches: list[Patch]) -> None:
        """Raises TreeError where a file that is neither on record nor in a commit stands elsewhere, with edits of
        `patches`: they would stay there."""
        by_wheel = self.by_wheel()
        chosen = [v for v in self.status(series) if v.patch in patches and v.patch.name not in by_wheel]
        places = {place for v in chosen if v.unrecorded for _, place in v.moved}
        if places - find_committed(self.root, places):
            raise TreeError(self.not_on_record(series, patches))

    def _say_moved(self, moved: list[tuple[str, str]]) -> str:
        (file, place), *more = dict.fromkeys(moved)
        also, them = (f", and so are {len(more)} more", "them") if more else ("", "it")
        return f"{self.root / place}: this is {file}, moved, with its edits{also}: move {them} back and revert again"

    def steps(self, series: Series, patches: list[Patch]) -> list[Verdict]:
        """Those of `patches` that apply to the tree as it is, with the new content of their files, one on top of the
        other. Raises TreeError for a conflict, naming file and anchor."""
        return _select_applying(judge_series(series, patches, self.view(self._leftovers(series, Record()))))

    def package_with(self, series: Series, patches: list[Patch]) -> dict[str, bytes | None]:
        """Content (None: no file) of those files of the package that we changed or would, with `patches` and no others.

        Raises TreeError as `apply` does, and where other patches came with the wheel.
        """
        if others := self.by_wheel().difference(p.name for p in patches):
            raise TreeError(f"{self.root}: {min(others)} came with the wheel: install the release's own wheel for this")
        record, _ = self._settle_record()
        start = self._contents_without_us(series, record)
        here = f"{self.package}/"
        view = replace(self.view(self._leftovers(series, record) | start), belongs=lambda file: file.startswith(here))
        verdicts = list(judge_series(series, patches, view))
        if reason := self.nothing_here(verdicts):
            raise TreeError(reason)
        contents = start | {file: data for v in _select_applying(verdicts) for file, data in v.changed.items()}
        return {file: data for file, data in contents.items() if file.startswith(here)}
