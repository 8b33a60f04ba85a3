# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The status of each patch in a tree. Pure: takes a view of the files, returns verdicts."""

import contextlib
import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from packaging.version import InvalidVersion, Version

from vllm_quark.edit import Edited, Outcome, edit, matches, names_in
from vllm_quark.patches import FileEdit, Patch
from vllm_quark.series import OLDEST, Series
from vllm_quark.text import decode


class Status(str, enum.Enum):
    """The status of a patch: applied by us; applicable; upstream; absent from this release; in conflict."""

    APPLIED = "applied"
    APPLIES = "applies"
    UPSTREAM = "upstream"
    ABSENT = "absent"
    CONFLICT = "conflict"

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class Verdict:
    """The status of one patch in a tree.

    detail: file and anchor, for people. harmless: absent, and nothing is amiss without it.
    changed: new content of the files that it changes; edited, brought: the files that it is about here; missing:
    those of `brought` that the tree lacks; incomplete: its edits are there, of its files some are not; present: files
    that have an edit of it already; moved: files elsewhere that have one, each with the file that the edit names;
    unrecorded: what is there of it is ours, and not on record.
    """

    patch: Patch
    status: Status
    detail: str = ""
    harmless: bool = False
    changed: dict[str, bytes] = field(default_factory=dict)
    edited: tuple[str, ...] = ()
    brought: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    incomplete: bool = False
    present: tuple[str, ...] = ()
    moved: tuple[tuple[str, str], ...] = ()
    unrecorded: bool = False

    @property
    def holders(self) -> tuple[str, ...]:
        """Files that hold an edit of it, wherever they stand."""
        return (*self.present, *(place for _, place in self.moved))

    @property
    def touched(self) -> tuple[str, ...]:
        """Files that it is about, wherever they stand."""
        return (*self.edited, *self.brought, *(place for _, place in self.moved))


@dataclass(frozen=True)
class View:
    """A tree as the judge sees it.

    read: bytes of a file, None where there is none. python_files: all of the package. belongs: whether a file does,
    in this kind of tree. version: as the tree tells it. changed: contents that lie on top of those that `read`
    gives.
    """

    read: Callable[[str], bytes | None]
    python_files: Callable[[], Iterable[str]]
    belongs: Callable[[str], bool]
    version: str
    changed: dict[str, bytes | None]

    def content(self, file: str) -> bytes | None:
        """Bytes of `file`, None where the tree has no such file."""
        if file not in self.changed:
            self.changed[file] = self.read(file)
        return self.changed[file]

    def copy(self) -> "View":
        """A copy whose changes stay its own."""
        return replace(self, changed=dict(self.changed))


def release_of(version: str) -> Version | None:
    """`version` for comparisons, None where it cannot be parsed."""
    try:
        parsed = Version(version)
    except InvalidVersion:
        return None
    # Made up by setuptools-scm where it has no tag, as in a shallow clone.
    return None if parsed.release[:2] == (0, 1) and parsed.is_devrelease or not any(parsed.release) else parsed


def _is_before(version: str, release: str) -> bool:
    known = release_of(version)
    return known is not None and known.release < Version(release).release


def _files_with(rules: FileEdit, view: View) -> list[str]:
    """Files of the package that hold the structure that `rules` need, without the named file."""
    needs, names = rules.needs, [name.encode() for name in names_in(rules.needs)]
    if not needs or not names:
        return []
    files = []
    for file in view.python_files():
        raw = view.changed[file] if file in view.changed else view.read(file)
        with contextlib.suppress(UnicodeDecodeError):
            if file != rules.file and raw and all(name in raw for name in names) and matches(decode(raw).plain, needs):
                files.append(file)
    return files


def _edit_file(rules: FileEdit, view: View) -> Edited:
    raw = view.content(rules.file)
    if raw is None:
        return Edited(Outcome.ABSENT, "", f"{rules.file}: no such file")
    try:
        text = decode(raw)
    except UnicodeDecodeError:
        return Edited(Outcome.CONFLICT, "", f"{rules.file}: not UTF-8 text")
    result = edit(text.plain, rules)
    if result.outcome is Outcome.APPLIES:
        view.changed[rules.file] = text.encode(result.text)
    return result


def _edit_where_it_stands(rules: FileEdit, view: View) -> tuple[str, Edited]:
    """The file that `rules` edit, and the result of the edit."""
    result = _edit_file(rules, view)
    if result.outcome is not Outcome.ABSENT or not (holders := _files_with(rules, view)):
        return rules.file, result
    # The code moved. It is followed within its folder; elsewhere it is a conflict.
    folder = PurePosixPath(rules.file).parent
    beside = [file for file in holders if PurePosixPath(file).parent == folder]
    if len(beside) > 1:
        where = f"{' and '.join(beside)}: each holds the code of {rules.file}: keep one of them"
        return rules.file, Edited(Outcome.CONFLICT, "", where)
    if not beside:
        where = f"{rules.file}: what it edits stands in {holders[0]}: move it back for this"
        return rules.file, Edited(Outcome.CONFLICT, "", where)
    return beside[0], _edit_file(rules.model_copy(update={"file": beside[0]}), view)


def find_moved(rules: FileEdit, view: View) -> str | None:
    """Another file that holds the code of `rules.file` with the edit; None where there is none.

    Where `rules` need nothing that has a name, only files of the same name are looked at.
    """
    files = _files_with(rules, view)
    if not names_in(rules.needs):
        name = PurePosixPath(rules.file).name
        files = [file for file in view.python_files() if PurePosixPath(file).name == name and file != rules.file]
    places = (rules.model_copy(update={"file": file}) for file in files)
    return next((place.file for place in places if _edit_file(place, view.copy()).outcome is Outcome.PRESENT), None)


def _lf(data: bytes) -> bytes:
    return data.replace(b"\r\n", b"\n")


def is_fixed_upstream(patch: Patch, version: str) -> bool:
    """Whether upstream is known to have the same fix in `version`."""
    return patch.upstream is not None and not (
        patch.upstream.since is not None and _is_before(version, patch.upstream.since)
    )


def judge_patch(series: Series, patch: Patch, view: View) -> Verdict:
    """The verdict on `patch` in `view`. An edit that is already there counts as UPSTREAM, whoever made it."""
    after = view.copy()
    edited: list[str] = []
    present: list[str] = []
    moved: list[tuple[str, str]] = []
    details: dict[Outcome, str] = {}
    for rules in patch.edits:
        if view.belongs(rules.file):
            file, result = _edit_where_it_stands(rules, after)
            edited.append(file)
            if result.outcome is Outcome.PRESENT:
                present.append(file)
            elif result.outcome is not Outcome.APPLIES and _edit_file(rules, after.copy()).outcome is Outcome.ABSENT:
                moved += [(rules.file, place)] if (place := find_moved(rules, after)) else []
            details.setdefault(result.outcome, result.detail)
    brought = tuple(file for file in patch.files if view.belongs(file))
    missing = tuple(file for file in brought if view.content(file) is None)
    verdict = Verdict(
        patch,
        Status.UPSTREAM,
        edited=tuple(edited),
        brought=brought,
        missing=missing,
        present=tuple(present),
        moved=tuple(moved),
    )

    too_old = f"vLLM {view.version} is older than {OLDEST}, the first that this series knows: use a newer one"
    if not _is_before(view.version, OLDEST):
        too_old = ""
    if Outcome.CONFLICT in details:
        return replace(verdict, status=Status.CONFLICT, detail=too_old or details[Outcome.CONFLICT])
    if Outcome.ABSENT in details:
        for absence in patch.absent:
            if absence.holds(lambda release: _is_before(view.version, release)) and release_of(view.version):
                return replace(verdict, status=Status.ABSENT, detail=absence.detail, harmless=absence.harmless)
        return replace(verdict, status=Status.ABSENT, detail=details[Outcome.ABSENT])

    changed = {file: series.content(file) for file in missing}
    if Outcome.APPLIES in details or not edited:
        for file in brought:
            existing = view.content(file)
            if existing is not None and _lf(existing) != _lf(series.content(file)):
                way_out = "move it away, or, where commits of an older series brought it, drop those"
                detail = f"{file}: there already, with other content: {way_out}"
                return replace(verdict, status=Status.CONFLICT, detail=detail)
        if not edited and not missing:
            return verdict
        if too_old:
            return replace(verdict, status=Status.CONFLICT, detail=too_old)
        changed |= {file: data for file in edited if (data := after.changed[file]) is not None}
        detail = "a part of it is there already" if Outcome.PRESENT in details else ""
        return replace(verdict, status=Status.APPLIES, detail=detail, changed=changed)
    needed = [f for f in missing if f.startswith(f"{series.package}/") or not is_fixed_upstream(patch, view.version)]
    if needed:
        detail = f"{needed[0]} is missing: apply brings it"
        return replace(verdict, status=Status.APPLIES, detail=detail, changed=changed, incomplete=True)
    return verdict


def judge_series(series: Series, patches: Iterable[Patch], view: View) -> Iterator[Verdict]:
    """The verdict on each of `patches`, applied in order; a patch is absent where a patch that it requires is.

    view: updated with the changes of the patches.
    """
    absent: dict[str, Verdict] = {}
    for patch in patches:
        verdict = judge_patch(series, patch, view)
        if lacking := [absent[number] for number in sorted(patch.requires) if number in absent]:
            detail = f"builds on {lacking[0].patch.number}, which is absent: {lacking[0].detail}"
            verdict = Verdict(patch, Status.ABSENT, detail, lacking[0].harmless, edited=verdict.edited)
        if verdict.status is Status.ABSENT:
            absent[patch.number] = verdict
        view.changed.update(verdict.changed)
        yield verdict
