# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Change files of a tree, all or nothing. WRITES: files of the tree and its `.vllm-quark/`.

A file is never written in place: a new one is renamed over it, so that what it is linked to stays.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from vllm_quark.record import (
    RECORD_DIR,
    FileRecord,
    Record,
    State,
    TreeError,
    digest_of,
    find_way_out,
    original_path,
    record_path,
)

TEMP_SUFFIX = ".vllm-quark-new"


def _explain(e: OSError, path: Path | str, action: str, state: str = "nothing was changed") -> TreeError:
    return TreeError(f"{path}: cannot {action}: {e.strerror}: {state}, {find_way_out(e)}")


def read_file(root: Path, file: str) -> bytes | None:
    """Bytes of `file`, None where the tree has no such file."""
    try:
        return (root / file).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise TreeError(f"{root / file}: cannot be read: {e.strerror}: {find_way_out(e)}") from e


def _temp_path(path: Path) -> Path:
    return path.with_name(f".{path.name}{TEMP_SUFFIX}")


def _give_to_owner(path: Path, like: Path) -> None:
    """Give a file that root creates to the owner of `like`, or of the folder around it."""
    if os.geteuid() == 0:
        while not os.path.lexists(like):
            like = like.parent
        owner = like.lstat()
        if owner.st_uid or owner.st_gid:
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def make_folder(folder: Path) -> None:
    """Make `folder` and those around it; one that root makes belongs to the owner of the folder around it."""
    for path in [*reversed(folder.parents), folder]:
        if not path.is_dir():
            path.mkdir(exist_ok=True)
            _give_to_owner(path, path.parent)


def _stage(path: Path, data: bytes, mode: int | None = None, mtime: int | None = None) -> None:
    """Write `data` to a new file beside `path`, where a rename can take it from."""
    temp = _temp_path(path)
    with contextlib.suppress(FileNotFoundError):
        temp.unlink()
    try:
        with open(temp, "xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        _give_to_owner(temp, path)
        if mode is not None:
            os.chmod(temp, mode)
        if mtime is not None:
            os.utime(temp, ns=(mtime, mtime))
    except OSError:
        with contextlib.suppress(OSError):
            temp.unlink()
        raise


def _stage_known(path: Path, data: bytes, known: FileRecord) -> None:
    """Stage `data` beside `path`; an original comes back with its time of change, or as the link that it was."""
    is_original = digest_of(data) == known.original
    if known.link is None or not is_original:
        _stage(path, data, known.mode, known.mtime if is_original else None)
        return
    with contextlib.suppress(FileNotFoundError):
        _temp_path(path).unlink()
    os.symlink(known.link, _temp_path(path))
    _give_to_owner(_temp_path(path), path.parent)


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all; root gives it to the owner of what was there, or of its folder."""
    _stage(path, data)
    os.replace(_temp_path(path), path)


def _store(root: Path, record: Record) -> None:
    replace_file(record_path(root), record.to_json().encode())


@contextlib.contextmanager
def lock_tree(root: Path) -> Iterator[None]:
    """Hold the lock of the tree in `root`; waits for another run to end."""
    folder = root / RECORD_DIR
    while True:
        try:
            make_folder(folder)
            lock = open(folder / "lock", "a")  # noqa: SIM115
        except (FileNotFoundError, FileExistsError) as e:
            for path in (folder, folder / "lock"):
                if path.is_symlink() or (path == folder and folder.exists() and not folder.is_dir()):
                    raise TreeError(f"{path}: is in the way of vllm-quark's record: move it away") from e
            continue  # a run that ended took the folder away
        except OSError as e:
            with contextlib.suppress(OSError):
                folder.rmdir()
            raise _explain(e, folder, "write") from e
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                is_current = os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / "lock"))
            except FileNotFoundError:
                is_current = False
            if not is_current:
                continue
            try:
                _give_to_owner(folder / "lock", folder)
                if not (folder / ".gitignore").exists():
                    replace_file(folder / ".gitignore", b"*\n")
                yield
            except OSError as e:
                raise _explain(e, e.filename or folder, "write") from e
            finally:
                if not record_path(root).exists():
                    shutil.rmtree(folder, ignore_errors=True)
            return


def _path_inside(root: Path, file: str) -> Path:
    """Where `file` lies; refuses a way out of the tree through a linked folder."""
    path = root / file
    real = Path(os.path.realpath(path.parent))
    if not real.is_relative_to(os.path.realpath(root)):
        raise TreeError(f"{path}: leads out of the tree to {real}: name the tree that it belongs to")
    return path


def _keep_original(root: Path, file: str, data: bytes | None) -> FileRecord:
    path = root / file
    if data is None:
        return FileRecord(None, [])
    original = original_path(root, file)
    make_folder(original.parent)
    replace_file(original, data)
    stat = path.stat()
    link = os.readlink(path) if path.is_symlink() else None
    return FileRecord(digest_of(data), [], stat.st_mode & 0o7777, link, stat.st_mtime_ns)


def change_files(root: Path, record: Record, wanted: Mapping[str, bytes | None], after: Record) -> None:
    """Turn the files of `wanted` into that content (None: no file), all or nothing.

    record: what is on record, where what was replaced is off; after: patches, version and installation to record.
    The lock has to be held. Raises TreeError naming the file that cannot be written.
    """
    changes = {file: (old, new) for file, new in wanted.items() if (old := read_file(root, file)) != new}
    # New files first and old ones last: what imports them never lacks them.
    changes = dict(sorted(changes.items(), key=lambda c: 0 if c[1][0] is None else 2 if c[1][1] is None else 1))
    # Until the last rename a patch may still, or already, be there.
    applied_meanwhile = [*record.applied, *(n for n in after.applied if n not in record.applied)]
    begun = replace(after, applied=applied_meanwhile, files=dict(record.files), folders=list(record.folders))
    path = root
    try:
        for file, (old, new) in changes.items():
            path = _path_inside(root, file)
            known = begun.files.get(file)
            if known is None or (old is not None and known.state(old) is State.CHANGED):
                known = _keep_original(root, file, old)
            ours = {d for d in (digest_of(old), digest_of(new)) if d and d != known.original}
            begun.files[file] = replace(known, ours=sorted(ours))
            for folder in path.parents:
                if folder.exists():
                    break
                begun.folders.append(folder.relative_to(root).as_posix())
        path = root / RECORD_DIR
        _store(root, begun)
        for file, (_, new) in changes.items():
            path = root / file
            if new is not None:
                make_folder(path.parent)
                _stage_known(path, new, begun.files[file])
    except OSError as e:
        _finish(root, record, given_up=begun)
        raise _explain(e, path, "write") from e
    replaced: list[str] = []
    try:
        for file, (_, new) in changes.items():
            path = root / file
            if new is None:
                path.unlink(missing_ok=True)
            else:
                os.replace(_temp_path(path), path)
            replaced.append(file)
    except OSError as e:
        for file in reversed(replaced):
            old = changes[file][0]
            if old is None:
                (root / file).unlink(missing_ok=True)
            else:
                _stage_known(root / file, old, begun.files[file])
                os.replace(_temp_path(root / file), root / file)
        _finish(root, record, given_up=begun)
        raise _explain(e, path, "replace") from e
    try:
        _finish(root, replace(begun, applied=list(after.applied)))
    except OSError as e:
        state = "all other files are as they should be"
        raise _explain(e, record_path(root), "write", state) from e


def _finish(root: Path, record: Record, given_up: Record | None = None) -> None:
    """Store what is true once all files lie where they should; drop what is as it was.

    given_up: a record whose files and folders were begun and given up.
    """
    for file in {**record.files, **(given_up.files if given_up else {})}:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            _temp_path(root / file).unlink()
    for file, known in list(record.files.items()):
        digest = digest_of(read_file(root, file))
        if digest == known.original:
            del record.files[file]
        elif digest is not None:
            record.files[file] = replace(known, ours=[digest])
    if not record.files:
        record.applied = []
    recorded = {Path(f) for f in record.files}
    for folder in sorted({*record.folders, *(given_up.folders if given_up else ())}, reverse=True):
        if not any(p.is_relative_to(folder) for p in recorded):
            shutil.rmtree(root / folder / "__pycache__", ignore_errors=True)
            with contextlib.suppress(OSError):
                (root / folder).rmdir()
    record.folders = sorted({f for f in record.folders if (root / f).is_dir()})
    if record.files:
        _store(root, record)
    else:
        record_path(root).unlink(missing_ok=True)
