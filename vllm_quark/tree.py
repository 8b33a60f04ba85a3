# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""A vLLM tree on disk: what the series is in it, apply, revert. The only module that touches files.

What was done to a tree is kept beside it in `.vllm-quark/`: the originals of all changed files and
a record of the digests that may lie in their place. The record is written before the first file
changes and again after the last, so a killed run leaves every file either as it was or as it
should become, and both are on record.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from vllm_quark.edit import Edited, Outcome, edit, matches, names_in
from vllm_quark.patches import FileEdit, Patch, QuarkError
from vllm_quark.series import Series

RECORD_DIR = ".vllm-quark"
TEMP_SUFFIX = ".vllm-quark-new"
WHEEL_NOTE = "vllm-quark.txt"


class TreeError(QuarkError):
    """A tree that cannot be used or changed; names the file and the way out."""


@dataclass(frozen=True)
class Verdict:
    """What one patch is in a tree.

    status: "applied", "applies", "upstream" (the same fix is there, not by us), "absent" (this
    release lacks what the patch edits) or "conflict"; detail names the file and the anchor.
    """

    patch: Patch
    status: str
    detail: str = ""


@dataclass
class _File:
    """Record of one changed file: digest before us (None: no file), digests that are our doing."""

    original: str | None
    ours: list[str]
    mode: int | None = None
    link: str | None = None


@dataclass
class _Record:
    applied: list[str] = field(default_factory=list)
    files: dict[str, _File] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)


_UNFINISHED = {
    "rebase-merge": "rebase",
    "rebase-apply": "rebase or am",
    "MERGE_HEAD": "merge",
    "CHERRY_PICK_HEAD": "cherry-pick",
    "REVERT_HEAD": "revert",
}


def _lf(data: bytes) -> bytes:
    return data.replace(b"\r\n", b"\n")


def _text(raw: bytes) -> tuple[str, bool]:
    """Text with plain line ends, and whether they were Windows'. Raises UnicodeDecodeError."""
    source = raw.decode()
    return source.replace("\r\n", "\n"), "\r\n" in source


def _digest(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()


def _says(e: OSError, path: Path | str, what: str) -> TreeError:
    ways = {
        errno.ENOSPC: "make room and run again",
        errno.EDQUOT: "make room and run again",
        errno.EFBIG: "make room and run again",
        errno.EROFS: "remount it writable or work on a copy",
        errno.EACCES: "run as the owner of the tree or work on a copy",
        errno.EPERM: "run as the owner of the tree or work on a copy",
    }
    way = ways.get(e.errno or 0, "mend that and run again")
    return TreeError(f"{path}: cannot {what}: {e.strerror}: nothing was changed, {way}")


def find_installed() -> Path:
    """Folder that holds the `vllm` package of this Python, found without importing it."""
    try:
        spec = importlib.util.find_spec("vllm")
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin:
        raise TreeError("no vLLM is installed in this Python: name a TREE (site-packages or a source checkout)")
    return Path(spec.origin).parents[1]


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(p for p in root.iterdir() if p.name != "vllm" and p.name.isidentifier())
    except OSError as e:
        raise TreeError(f"{root}: cannot be read: {e.strerror}: name a folder that holds a vLLM tree") from e


def _is_package(folder: Path) -> bool:
    return (folder / "__init__.py").is_file() and (folder / "model_executor").is_dir()


class Tree:
    """A site-packages folder, a source checkout or an unpacked source distribution.

    `package`: the folder that holds vLLM's code, "vllm" but for a fork that renamed it; series have
    to be for that package. Raises TreeError where `root` is none of these.
    """

    def __init__(self, root: Path):
        self.root = root = Path(os.path.abspath(root))
        if not root.exists():
            raise TreeError(f"{root}: does not exist: name a site-packages folder or a vLLM source tree")
        packages = [p for p in (root / "vllm", *_folders(root)) if _is_package(p)]
        if not packages:
            hint = ""
            if _is_package(root):
                hint = f": name {root.parent} instead"
            raise TreeError(f"{root}: not a vLLM tree (no vllm/__init__.py with vllm/model_executor in it){hint}")
        if packages[0].name != "vllm" and len(packages) > 1:
            names = " and ".join(p.name for p in packages)
            raise TreeError(f"{root}: {names} both look like vLLM: name a tree that holds one of them")
        self.package = packages[0].name
        self.is_source = (root / "pyproject.toml").is_file() or (root / "setup.py").is_file()

    @property
    def version(self) -> str:
        """The release as the tree itself tells it, "unknown" where it does not."""
        with contextlib.suppress(OSError):
            if m := re.search(r"""^(?:__version__|version)\b[^'"\n]*['"]([^'"]+)""",
                              (self.root / self.package / "_version.py").read_text(), re.M):  # fmt: skip
                return m[1]
        with contextlib.suppress(OSError):
            if m := re.search(r"^Version: (\S+)", (self.root / "PKG-INFO").read_text(), re.M):
                return m[1]
        return "unknown"

    # Reading

    def read(self, file: str) -> bytes | None:
        """Bytes of `file`, None where the tree has no such file."""
        try:
            return (self.root / file).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as e:
            raise TreeError(f"{self.root / file}: cannot be read: {e.strerror}") from e

    def _takes(self, file: str) -> bool:
        """An installed package has no build, docs or tests of its own: it takes only what lies in vllm/."""
        return self.is_source or file.startswith(f"{self.package}/")

    def brings(self, patch: Patch) -> list[str]:
        """Files of `patch` that belong here."""
        return [f for f in patch.files if self._takes(f)]

    def edits(self, patch: Patch) -> list[FileEdit]:
        """Edits of `patch` that belong here."""
        return [e for e in patch.edits if self._takes(e.file)]

    def _holders(self, rules: FileEdit, text: Mapping[str, bytes | None]) -> list[str]:
        """Files of the whole package, but for the named one, that have what `rules` need.

        text: contents that differ from those on disk.
        """
        needs, names = rules.needs, [name.encode() for name in names_in(rules.needs)]
        if not needs or not names:
            return []
        found = []
        for path in sorted((self.root / self.package).rglob("*.py")):
            file = path.relative_to(self.root).as_posix()
            raw = text[file] if file in text else self.read(file)
            with contextlib.suppress(UnicodeDecodeError):
                if file != rules.file and raw and all(name in raw for name in names) and matches(_text(raw)[0], needs):
                    found.append(file)
        return found

    def judge(
        self, series: Series, patch: Patch, text: dict[str, bytes | None]
    ) -> tuple[str, str, dict[str, bytes], list[str]]:
        """What `patch` is on the virtual tree `text` (filled from disk on demand).

        Returns "applies", "present", "absent" or "conflict"; a detail; the new content of its files; the
        files that it touches.
        """

        def get(file: str) -> bytes | None:
            if file in changed:
                return changed[file]
            if file not in text:
                text[file] = self.read(file)
            return text[file]

        def done(rules: FileEdit) -> Edited:
            raw = get(rules.file)
            if raw is None:
                return Edited(Outcome.ABSENT, "", f"{rules.file}: no such file")
            try:
                source, crlf = _text(raw)
            except UnicodeDecodeError:
                return Edited(Outcome.CONFLICT, "", f"{rules.file}: not UTF-8 text")
            result = edit(source, rules)
            if result.outcome is Outcome.APPLIES:
                changed[rules.file] = (result.text.replace("\n", "\r\n") if crlf else result.text).encode()
            return result

        changed: dict[str, bytes] = {}
        touched: list[str] = []
        outcomes: list[Outcome] = []
        details: dict[Outcome, str] = {}
        edits = self.edits(patch)
        for rules in edits:
            result = done(rules)
            if result.outcome is Outcome.ABSENT and (holders := self._holders(rules, ChainMap(changed, text))):
                # What it edits moved: within its folder that is the same to us, elsewhere it is not.
                folder = PurePosixPath(rules.file).parent
                beside = [file for file in holders if PurePosixPath(file).parent == folder]
                if len(beside) > 1:
                    where = f"{' and '.join(beside)}: each has what belongs into {rules.file}: leave one of them"
                    return "conflict", where, {}, []
                if not beside:
                    where = f"{rules.file}: what it edits stands in {holders[0]}: move it back for this"
                    return "conflict", where, {}, []
                rules = rules.model_copy(update={"file": beside[0]})
                result = done(rules)
            touched.append(rules.file)
            outcomes.append(result.outcome)
            details.setdefault(result.outcome, result.detail)
        touched += self.brings(patch)
        if Outcome.CONFLICT in outcomes:
            return "conflict", details[Outcome.CONFLICT], {}, touched
        if Outcome.ABSENT in outcomes:
            return "absent", details[Outcome.ABSENT], {}, touched
        edited = Outcome.APPLIES in outcomes
        missing = []
        for file in self.brings(patch):
            ours, theirs = series.content(file), get(file)
            if theirs is None:
                missing.append(file)
                changed[file] = ours
            elif _lf(theirs) != _lf(ours) and (edited or not edits):
                return "conflict", f"{file}: there already, with other content", {}, touched
        if edited or (missing and not edits):
            partly = "partly applied" if Outcome.PRESENT in outcomes else ""
            return "applies", partly, changed, touched
        return "present", "" if not missing else "files", {}, touched

    def walk(
        self, series: Series, patches: Iterable[Patch], text: dict[str, bytes | None]
    ) -> Iterator[tuple[Patch, str, str, dict[str, bytes], list[str]]]:
        """`judge` of each of `patches`, one on top of the other; a patch is absent where one that it requires is."""
        absent: set[str] = set()
        for patch in patches:
            outcome, detail, changed, touched = self.judge(series, patch, text)
            if lacking := absent.intersection(patch.requires):
                outcome, detail, changed = "absent", f"builds on {min(lacking)}, which is absent", {}
            if outcome == "absent":
                absent.add(patch.name.split("-")[0])
            text.update(changed)
            yield patch, outcome, detail, changed, touched

    def status(self, series: Series, patches: Iterable[Patch] | None = None) -> list[Verdict]:
        """What each patch is in this tree, as its files lie there now, in series order."""
        record = self._load()
        old = self._outdated(series, record)
        # A file that an older version of us brought is no conflict.
        text: dict[str, bytes | None] = {
            f: series.content(f) for p in series.patches for f in self.brings(p) if f in old
        }
        by_wheel = self._by_wheel()
        verdicts = []
        for patch, outcome, detail, _, touched in self.walk(
            series, patches if patches is not None else series.patches, text
        ):
            brought = self.brings(patch)
            if outcome == "present" and patch.name in record.applied:
                gone = [f for f in brought if text.get(f) is None]
                odd = [f for f in touched if f in record.files and self._state(record, f) == "changed"]
                if gone:
                    outcome, detail = "applies", f"{gone[0]}: missing, apply finishes"
                elif old.intersection(touched):
                    outcome, detail = "applies", "from another version of vllm-quark, apply renews it"
                else:
                    outcome, detail = "applied", f"{odd[0]}: changed since" if odd else ""
            elif outcome == "present" and patch.name in by_wheel:
                outcome, detail = "applied", "by wheel"
            elif outcome == "present" and brought and detail != "files":
                outcome, detail = "applied", "by commit"
            elif outcome == "present":
                outcome, detail = "upstream", ""
            verdicts.append(Verdict(patch, outcome, detail))
        return verdicts

    def _by_wheel(self) -> set[str]:
        """Patches that came with an installed wheel (see repack)."""
        if self.is_source:
            return set()
        notes = self.root.glob(f"*+*quark.dist-info/{WHEEL_NOTE}")
        return {name for note in notes for name in note.read_text().split()}

    def _outdated(self, series: Series, record: _Record) -> set[str]:
        """Files that are our doing, but not what `series` would make of them today."""
        try:
            text = self._start(series, record)
            self.steps(series, [p for p in series.patches if p.name in record.applied], text)
        except QuarkError:
            return set()  # changed since: said file by file
        settled = (f for f, known in record.files.items() if known.ours == [_digest(self.read(f))])
        return {f for f in settled if text[f] != self.read(f)}

    def _refuse_unfinished(self) -> None:
        """Raises TreeError in the middle of a rebase, merge or the like, which a change of files would disturb."""
        git = self.root / ".git"
        with contextlib.suppress(OSError):
            if git.is_file() and (m := re.match(r"gitdir: (.+)", git.read_text())):
                git = self.root / m[1].strip()
        for mark, what in _UNFINISHED.items():
            if (git / mark).exists():
                raise TreeError(f"{self.root}: in the middle of a git {what}: finish or abort it and run again")

    # The record

    def _load(self) -> _Record:
        path = self.root / RECORD_DIR / "record.json"
        try:
            data = json.loads(path.read_text())
            files = {name: _File(**f) for name, f in data["files"].items()}
            return _Record(data["applied"], files, data["folders"])
        except (FileNotFoundError, NotADirectoryError):
            return _Record()
        except OSError as e:
            raise TreeError(f"{path}: cannot be read: {e.strerror}") from e
        except (ValueError, TypeError, KeyError) as e:
            raise TreeError(f"{path}: damaged record: reinstall vLLM and delete {path.parent}") from e

    def _store(self, record: _Record) -> None:
        data = {
            "applied": record.applied,
            "files": {name: vars(f) for name, f in record.files.items()},
            "folders": record.folders,
        }
        self._write(self.root / RECORD_DIR / "record.json", json.dumps(data, indent=1).encode())

    def _state(self, record: _Record, file: str) -> str:
        """ "ours", "original" or "changed": whose content a recorded file has now."""
        now = _digest(self.read(file))
        known = record.files[file]
        if now in known.ours:
            return "ours"
        return "original" if now == known.original else "changed"

    def _original(self, record: _Record, file: str) -> bytes | None:
        """Content of `file` without us."""
        if record.files[file].original is None:
            return None
        try:
            data = (self.root / RECORD_DIR / "original" / file).read_bytes()
        except OSError:
            data = None
        if _digest(data) != record.files[file].original:
            backup = f"{RECORD_DIR}/original/{file}"
            raise TreeError(f"{self.root / backup}: the original is lost or damaged: reinstall vLLM {self.version}")
        return data

    # Writing

    @staticmethod
    def _temp(path: Path) -> Path:
        return path.with_name(f".{path.name}{TEMP_SUFFIX}")

    def _write(self, path: Path, data: bytes) -> None:
        """New file + rename; a file in place, and what it is linked to, is never written to."""
        self._stage(path, data)
        os.replace(self._temp(path), path)

    def _stage(self, path: Path, data: bytes, mode: int | None = None) -> None:
        """Write `data` to a new file beside `path`, where a rename can take it from."""
        temp = self._temp(path)
        with contextlib.suppress(FileNotFoundError):
            temp.unlink()
        try:
            with open(temp, "xb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            if mode is not None:
                os.chmod(temp, mode)
        except OSError:
            with contextlib.suppress(OSError):
                temp.unlink()
            raise

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold this tree's lock; waits for another run to end."""
        folder = self.root / RECORD_DIR
        while True:
            try:
                folder.mkdir(exist_ok=True)
                lock = open(folder / "lock", "a")  # noqa: SIM115
            except (FileNotFoundError, FileExistsError) as e:
                if folder.exists() and not folder.is_dir():
                    raise TreeError(f"{folder}: is in the way of vllm-quark's record: move it away") from e
                continue  # a run that ended took the folder away
            except OSError as e:
                with contextlib.suppress(OSError):
                    folder.rmdir()
                raise _says(e, folder, "write") from e
            with lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                try:
                    same = os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / "lock"))
                except FileNotFoundError:
                    same = False
                if not same:
                    continue
                try:
                    if not (folder / ".gitignore").exists():
                        self._write(folder / ".gitignore", b"*\n")
                    yield
                except OSError as e:
                    raise _says(e, e.filename or folder, "write") from e
                finally:
                    self._leave()
                return

    def _leave(self) -> None:
        """Take the record's folder away where nothing is recorded."""
        folder = self.root / RECORD_DIR
        if not (folder / "record.json").exists():
            shutil.rmtree(folder, ignore_errors=True)

    def _target(self, file: str) -> Path:
        """Where `file` lies; refuses a way out of the tree through a linked folder."""
        path = self.root / file
        real = Path(os.path.realpath(path.parent))
        if not real.is_relative_to(os.path.realpath(self.root)):
            raise TreeError(f"{path}: leads out of the tree to {real}: name the tree that it belongs to")
        return path

    def _become(self, record: _Record, wanted: dict[str, bytes | None], applied: list[str]) -> None:
        """Turn the files of `wanted` into that content (None: no file), all or nothing."""
        changes = {file: (old, new) for file, new in wanted.items() if (old := self.read(file)) != new}
        # Until the last rename a patch may still, or already, be there.
        between = [*record.applied, *(n for n in applied if n not in record.applied)]
        after = _Record(between, dict(record.files), list(record.folders))
        path = self.root
        try:
            for file, (old, new) in changes.items():
                path = self._target(file)
                known = after.files.get(file)
                if known is None or _digest(old) not in (*known.ours, known.original):
                    link = os.readlink(path) if path.is_symlink() else None
                    mode = path.stat().st_mode & 0o7777 if old is not None else None
                    known = _File(_digest(old), [], mode, link)
                    if old is not None:
                        keep = self.root / RECORD_DIR / "original" / file
                        keep.parent.mkdir(parents=True, exist_ok=True)
                        self._write(keep, old)
                ours = {d for d in (_digest(old), _digest(new)) if d and d != known.original}
                after.files[file] = _File(known.original, sorted(ours), known.mode, known.link)
                for folder in path.parents:
                    if folder.exists():
                        break
                    after.folders.append(folder.relative_to(self.root).as_posix())
            path = self.root / RECORD_DIR
            self._store(after)
            for file, (_, new) in changes.items():
                path = self.root / file
                if new is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self._stage_known(path, new, after.files[file])
        except OSError as e:
            self._finish(record, also=after)
            raise _says(e, path, "write") from e
        done: list[str] = []
        try:
            for file, (_, new) in changes.items():
                path = self.root / file
                if new is None:
                    path.unlink(missing_ok=True)
                else:
                    os.replace(self._temp(path), path)
                done.append(file)
        except OSError as e:
            for file in done:
                old = changes[file][0]
                if old is None:
                    (self.root / file).unlink(missing_ok=True)
                else:
                    self._stage_known(self.root / file, old, after.files[file])
                    os.replace(self._temp(self.root / file), self.root / file)
            self._finish(record, also=after)
            raise _says(e, path, "replace") from e
        after.applied = list(applied)
        self._finish(after)

    def _stage_known(self, path: Path, data: bytes, known: _File) -> None:
        """Stage `data` beside `path`; the original of a linked file comes back as the link it was."""
        if known.link is None or _digest(data) != known.original:
            self._stage(path, data, known.mode)
            return
        with contextlib.suppress(FileNotFoundError):
            self._temp(path).unlink()
        os.symlink(known.link, self._temp(path))

    def _finish(self, record: _Record, also: _Record | None = None) -> None:
        """Store what is true once all files lie where they should; drop what is as it was.

        `also`: a record whose files and folders were begun and given up.
        """
        for file in {**record.files, **(also.files if also else {})}:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                self._temp(self.root / file).unlink()
        for file, known in list(record.files.items()):
            now = _digest(self.read(file))
            if now == known.original:
                del record.files[file]
            elif now is not None:
                record.files[file] = _File(known.original, [now], known.mode, known.link)
        if not record.files:
            record.applied = []
        kept = {Path(f) for f in record.files}
        for folder in sorted({*record.folders, *(also.folders if also else ())}, reverse=True):
            if not any(p.is_relative_to(folder) for p in kept):
                shutil.rmtree(self.root / folder / "__pycache__", ignore_errors=True)
                with contextlib.suppress(OSError):
                    (self.root / folder).rmdir()
        record.folders = sorted({f for f in record.folders if (self.root / f).is_dir()})
        if record.files:
            self._store(record)
        else:
            (self.root / RECORD_DIR / "record.json").unlink(missing_ok=True)

    def _start(self, series: Series, record: _Record) -> dict[str, bytes | None]:
        """Content of all recorded files without us.

        Raises TreeError for a file that was edited on top of our patches; a file that was replaced,
        as a reinstall does, counts as a new original.
        """
        text: dict[str, bytes | None] = {}
        for file in record.files:
            if self._state(record, file) != "changed":
                text[file] = self._original(record, file)
                continue
            now = self.read(file)
            by = [p for p in series.patches if p.name in record.applied]
            folder = PurePosixPath(file).parent
            rules = [e for p in by for e in p.edits if PurePosixPath(e.file).parent == folder]
            ours = any(file in p.files for p in by)
            visible = now is not None and any(
                matches(now.decode(errors="replace").replace("\r\n", "\n"), r.present) for r in rules
            )
            if visible or ours or not rules:
                raise TreeError(
                    f"{self.root / file}: changed since vllm-quark wrote it: undo that change (keep a copy of it), "
                    "or reinstall vLLM"
                )
            text[file] = now
        return text

    def apply(self, series: Series, patches: list[Patch]) -> list[Verdict]:
        """Make `patches` part of the tree, besides those applied before; all or nothing.

        Returns what each of `patches` is afterwards. Raises TreeError for a conflict (naming file
        and anchor) and where none of them has anything to edit here.
        """
        self._refuse_unfinished()
        with self._locked():
            record = self._load()
            names = {p.name for p in patches} | set(record.applied)
            self._replay(series, names, record)
            after = self.status(series, patches)
            if after and all(v.status == "absent" for v in after):
                raise TreeError(
                    f"{self.root}: {after[0].detail}: vLLM {self.version} lacks what "
                    f"{after[0].patch.name if len(after) == 1 else 'the patches'} edits: use a release that "
                    "`vllm-quark status` shows as applies"
                )
            return after

    def revert(self, series: Series, patches: list[Patch]) -> list[str]:
        """Take `patches` out again; every file that no other patch needs is as before, byte for byte.

        Returns the names taken out. Raises TreeError naming a file that was changed since.
        """
        self._refuse_unfinished()
        with self._locked():
            record = self._load()
            for file in record.files:
                if self._state(record, file) == "changed":
                    raise TreeError(
                        f"{self.root / file}: changed since vllm-quark wrote it: undo that change (keep a copy of "
                        "it) and revert again, or reinstall vLLM"
                    )
            gone = [p.name for p in patches if p.name in record.applied]
            # A patch that a newer vllm-quark no longer has goes, too.
            self._replay(series, set(record.applied) - set(gone), record)
            return gone

    def _replay(self, series: Series, names: set[str], record: _Record) -> None:
        """Make the tree what it was before us, with the patches `names` on top in series order."""
        start = self._start(series, record)
        done = self.steps(series, [p for p in series.patches if p.name in names], dict(start))
        wanted = dict(start)
        for _, changed in done:
            wanted.update(changed)
        self._become(record, wanted, [patch.name for patch, _ in done])

    def steps(
        self, series: Series, patches: list[Patch], text: dict[str, bytes | None]
    ) -> list[tuple[Patch, dict[str, bytes]]]:
        """(patch, new content of its files) for each of `patches` that applies, one on top of the other.

        `text` holds contents that differ from those on disk, and is brought up to date. Raises
        TreeError for a conflict, naming file and anchor.
        """
        done = []
        for patch, outcome, detail, changed, _ in self.walk(series, patches, text):
            if outcome == "conflict":
                raise TreeError(f"{patch.name}: conflict: {detail}: nothing was changed")
            if outcome == "applies":
                done.append((patch, changed))
        return done
