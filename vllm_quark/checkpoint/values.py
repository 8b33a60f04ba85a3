# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The numbers in scales and zero points of safetensors files: read with numpy, and what is wrong with them."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from math import prod
from typing import Protocol

import numpy as np

# As safetensors spells them; BF16 is the upper half of a float32.
DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I8": "i1",
    "U8": "u1",
    "I16": "<i2",
    "U16": "<u2",
    "I32": "<i4",
    "U32": "<u4",
    "I64": "<i8",
    "U64": "<u8",
}
FLOATS = ("F64", "F32", "F16", "BF16")
SIZES = {name: np.dtype(code).itemsize for name, code in DTYPES.items()} | {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
# Tensors closer than this are read at once, up to that many bytes.
GAP, CHUNK = 64 << 10, 64 << 20


class Entry(Protocol):
    """A tensor by its header: dtype as safetensors spells it, offset in bytes from the start of its file."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


class ShortFileError(Exception):
    """A file that ends before a tensor does: `file` is its path."""

    def __init__(self, file: str) -> None:
        super().__init__(f"{file} ends before its tensors do")
        self.file = file


def find_misfit(entries: list[Entry], size: int) -> str | None:
    """The first tensor of a file of `size` bytes that is not where its header has it, or is no tensor.

    Tensors follow one another without gaps; the safetensors library opens no other file.
    """
    for entry in entries:
        numbers = (entry.offset, *entry.shape)
        if not isinstance(entry.dtype, str) or not all(type(n) is int and n >= 0 for n in numbers):
            return entry.name
    sizes = {e.name: prod(e.shape) * SIZES[e.dtype] for e in entries if e.dtype in SIZES}
    ordered = sorted(entries, key=lambda e: (e.offset, sizes.get(e.name, 1)))
    ends = [*(e.offset for e in ordered[1:]), size]
    for entry, after in zip(ordered, ends, strict=False):  # without tensors there is an end
        if entry.offset + sizes.get(entry.name, after - entry.offset) != after:
            return entry.name
    return None


def _read(file: int, path: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` on. Raises ShortFileError, OSError."""
    parts, remaining = [], size
    while remaining and (part := os.pread(file, remaining, offset + size - remaining)):
        parts.append(part)
        remaining -= len(part)
    if remaining:
        raise ShortFileError(path)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _decode(data: memoryview, dtype: str) -> np.ndarray:
    """Floats as the float32 that vLLM copies them to, integers as they are."""
    numbers = np.frombuffer(data, DTYPES[dtype])
    if dtype == "BF16":
        return (numbers.astype("<u4") << 16).view("<f4")
    if dtype not in FLOATS:
        return numbers
    with np.errstate(over="ignore", invalid="ignore"):
        return numbers.astype(np.float32, copy=False)


def read_values(entries: Iterable[Entry]) -> Iterator[tuple[Entry, np.ndarray]]:
    """Each entry with its values [numel]: float32, or the integers of its dtype; file by file, in the files' order.

    The dtypes are those of DTYPES. Raises ShortFileError and OSError.
    """
    by_file: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_file[entry.file].append(entry)
    for path, group in by_file.items():
        group.sort(key=lambda e: e.offset)
        sizes = [prod(e.shape) * np.dtype(DTYPES[e.dtype]).itemsize for e in group]
        file = os.open(path, os.O_RDONLY)
        try:
            first = 0
            while first < len(group):
                start, last = group[first].offset, first
                end = start + sizes[first]
                while last + 1 < len(group) and group[last + 1].offset <= end + GAP and end - start < CHUNK:
                    last += 1
                    end = max(end, group[last].offset + sizes[last])
                data = memoryview(_read(file, path, start, end - start))
                for entry, size in zip(group[first : last + 1], sizes[first : last + 1], strict=True):
                    begin = entry.offset - start
                    yield entry, _decode(data[begin : begin + size], entry.dtype)
                first = last + 1
        finally:
            os.close(file)


def _place(entry: Entry, wrong: np.ndarray) -> str:
    """Where the first of `wrong` (indices of values) is in `entry`, and how many others there are."""
    index = np.unravel_index(int(wrong[0]), entry.shape)
    position = f" at {[int(i) for i in index]}" if entry.shape and prod(entry.shape) > 1 else ""
    others = f" (and {len(wrong) - 1} more of its values)" if len(wrong) > 1 else ""
    return position + others


def judge_scale(entry: Entry, values: np.ndarray, weight: Entry | None) -> str | None:
    """Why `values` [numel], float32, are no scale; None: they are one.

    weight: what they scale, INT8 [rows, columns] or [experts, rows, columns], one value for all of it, an expert or a
    row; rows are read where their scale is zero, which is right for a row of zeros. None: zero is wrong.
    Raises ShortFileError and OSError.
    """
    if not values.size or (values.min() > 0 and values.max() < np.inf):  # a NaN is neither
        return None
    wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if wrong.size:
        return f"is {values[wrong[0]]}{_place(entry, wrong)}"
    wrong = np.flatnonzero(values == 0)
    if weight is None:
        return f"is 0{_place(entry, wrong)}"
    row = _find_row(weight, values == 0, entry)
    if row is None:
        return None
    place = f" at {row}, but its weight is not" if values.size > 1 else ", but its weight is not"
    return f"is 0{place}"


def _find_row(weight: Entry, is_wanted: np.ndarray, scale: Entry) -> list[int] | None:
    """The first row of `weight` with a number in it among those whose scale is_wanted."""
    *experts, rows, columns = weight.shape
    count = prod(experts)
    firsts = scale.shape[0] if experts and scale.shape and scale.shape[0] == count else 1
    is_row = np.broadcast_to(is_wanted.reshape(firsts, -1), (count, rows)).reshape(-1)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], is_row, [False])).astype(np.int8)))
    step = max(1, CHUNK // max(1, columns))
    file = os.open(weight.file, os.O_RDONLY)
    try:
        for start, stop in edges.reshape(-1, 2).tolist():
            for row in range(start, stop, step):
                size = min(step, stop - row)
                data = _read(file, weight.file, weight.offset + row * columns, size * columns)
                filled = np.flatnonzero(np.frombuffer(data, np.int8).reshape(size, columns).any(axis=1))
                if filled.size:
                    expert, of_expert = divmod(row + int(filled[0]), rows)
                    return [expert, of_expert] if experts else [of_expert]
    finally:
        os.close(file)
    return None


def judge_zero_point(entry: Entry, values: np.ndarray, is_zero: bool) -> str | None:
    """Why integers `values` [numel] are no zero point of INT8; None: they are one. is_zero: only 0 is one."""
    wrong = np.flatnonzero(values != 0) if is_zero else np.flatnonzero((values < -128) | (values > 127))
    return f"is {values[wrong[0]]}{_place(entry, wrong)}" if wrong.size else None
