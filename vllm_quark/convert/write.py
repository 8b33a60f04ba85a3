# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Writes to disk: a planned checkpoint, into OUT.part, which becomes OUT when all of it is there.

A file of it is whole or not there (written beside its place, synced, renamed), so that the next run goes on where a
killed one stopped. Tensors are copied in chunks, whatever their size.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vllm_quark.checkpoint.values import DTYPES
from vllm_quark.convert.plan import ConvertError, Plan, Tensor

# The file at hand, bytes that are written, bytes in all.
Tell = Callable[[str, int, int], None]
CHUNK = 16 << 20
INDEX = "model.safetensors.index.json"
# Files of a checkpoint's folder that are not copied, and the record of OUT.part's source.
OTHERS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
RECORD = ".vllm-quark-convert.json"


def write(plan: Plan, out: Path, tell: Tell) -> None:
    """Write `plan` to the folder `out`, which must not exist. Raises ConvertError and OSError."""
    folder = out.with_name(f"{out.name}.part")
    files: dict[str, list[Tensor]] = defaultdict(list)
    for tensor in plan.tensors:
        files[tensor.file].append(tensor)
    headers = {name: _make_header(tensors) for name, tensors in files.items()}
    sizes = {name: len(headers[name]) + sum(t.size for t in tensors) for name, tensors in files.items()}
    with _claim(folder, plan):
        remaining = sum(size for name, size in sizes.items() if not _is_there(folder / name, size))
        free = shutil.disk_usage(folder).free
        if remaining > free:
            reason = f"{remaining / 1e9:.1f} GB are to be written, and {free / 1e9:.1f} GB are free"
            raise ConvertError(f"{folder}: {reason}: make room or name a folder on another disk")
        written, total = 0, sum(sizes.values())
        for name in sorted(files):
            if not _is_there(folder / name, sizes[name]):
                with _replacing(folder / name) as file:
                    file.write(headers[name])
                    for size in _copy(sorted(files[name], key=_width), file):
                        written += size
                        tell(name, written, total)
                    written -= sizes[name] - len(headers[name])
            written += sizes[name]
            tell(name, written, total)
        _write_rest(plan, folder, files)
        os.rename(folder, out)
        _sync(out.parent)
    (out / RECORD).unlink()


def is_unfinished(out: Path) -> bool:
    """Whether a run was killed between its last two steps: all of `out` is there, and its record, too."""
    return (out / RECORD).is_file()


def finish(plan: Plan, out: Path) -> bool:
    """Take the last step of a killed run of `plan`; whether there was one."""
    if not is_unfinished(out) or (out / RECORD).read_text() != _fingerprint(plan):
        return False
    (out / RECORD).unlink()
    return True


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


@contextlib.contextmanager
def _claim(folder: Path, plan: Plan) -> Iterator[None]:
    """Make `folder` this conversion's, or take it up; no second process does at the same time."""
    fingerprint = _fingerprint(plan)
    if folder.exists() and not (folder / RECORD).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConvertError(f"{folder}: is no part of a conversion: delete it or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / RECORD, "a+") as record:
        try:
            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConvertError(f"{folder}: another process writes it: wait for it") from None
        record.seek(0)
        owner = record.read()
        if owner and owner != fingerprint:
            reason = "is of another conversion, or the checkpoint has changed since"
            raise ConvertError(f"{folder}: {reason}: delete it and run again")
        if not owner:
            record.write(fingerprint)
            record.flush()
            os.fsync(record.fileno())
        yield


def _fingerprint(plan: Plan) -> str:
    """What makes two runs the same conversion: source files, and what is to be written."""
    sources = {piece.entry.file for tensor in plan.tensors for piece in tensor.pieces}
    stats = {path: os.stat(path) for path in sorted(sources)}
    source_stats = [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()]
    text = json.dumps([os.path.realpath(plan.folder), plan.options, source_stats, plan.config], sort_keys=True)
    return json.dumps({"of": str(plan.folder), "sha256": hashlib.sha256(text.encode()).hexdigest()})


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when it is whole and on disk."""
    part = path.with_name(f"{path.name}.new")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.rename(part, path)
    except OSError as e:
        e.filename = e.filename or str(part)
        raise


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _width(tensor: Tensor) -> tuple[int, str]:
    """Wide dtypes first, as the safetensors library writes them: each is aligned to its width."""
    return -np.dtype(DTYPES[tensor.dtype]).itemsize if tensor.dtype in DTYPES else -1, tensor.name


def _make_header(tensors: list[Tensor]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in sorted(tensors, key=_width):
        end = start + tensor.size
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _copy(tensors: list[Tensor], file: BinaryIO) -> Iterator[int]:
    """Write the tensors' bytes; how many, after each chunk."""
    with contextlib.ExitStack() as stack:
        opened: dict[str, int] = {}
        for tensor in tensors:
            for piece in tensor.pieces:
                path = piece.entry.file
                if path not in opened:
                    opened[path] = os.open(path, os.O_RDONLY)
                    stack.callback(os.close, opened[path])
                for offset in range(0, piece.size, CHUNK):
                    size = min(CHUNK, piece.size - offset)
                    data = os.pread(opened[path], size, piece.entry.offset + piece.start + offset)
                    if len(data) != size:
                        raise ConvertError(f"{path}: was cut short while it was read: copy or export it again")
                    file.write(data * piece.times)
                    yield size * piece.times


def _find_beside(folder: Path, above: frozenset[str] = frozenset()) -> list[Path]:
    """Files beside a checkpoint's weights, those in folders, too: chat templates, code.

    Folders that hold weights are other checkpoints, hidden ones are those of git and of downloads. above: real paths
    of the folders that hold this one; a link to one of them is not followed.
    """
    others, above = [], above | {os.path.realpath(folder)}

    def is_above(path: Path) -> bool:
        return os.path.realpath(path) in above

    def holds_weights(path: Path) -> bool:
        return any(p.name.endswith(OTHERS) for p in path.iterdir())

    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.endswith(OTHERS):
            others.append(path)
        elif path.is_dir() and path.name[0] != "." and not (is_above(path) or holds_weights(path)):
            others += [p for p in _find_beside(path, above) if p.name[0] != "."]
    return others


def _write_rest(plan: Plan, folder: Path, files: dict[str, list[Tensor]]) -> None:
    """The index, what lies beside the weights (tokenizer, chat template, code), and config.json."""
    texts = {"config.json": json.dumps(plan.config, indent=2) + "\n"}
    if len(files) > 1 or (plan.folder / INDEX).is_file():
        names = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
        total = sum(tensor.size for tensor in plan.tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
        texts[INDEX] = json.dumps(index, indent=2) + "\n"
    for path in _find_beside(plan.folder):
        if path.name not in ("config.json", INDEX) or path.parent != plan.folder:
            target = folder / path.relative_to(plan.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            with _replacing(target) as file, open(path, "rb") as source:
                shutil.copyfileobj(source, file)
    for name, text in texts.items():
        with _replacing(folder / name) as file:
            file.write(text.encode())
    _sync(folder)
