# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Tensors of a checkpoint, one at a time and never mapped: what was read and let go takes no memory."""

import os
from math import prod
from typing import Any

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


def read_tensor(entry: Any, expert: int | None = None) -> torch.Tensor:
    """The tensor of a header entry, on CPU; expert: that part of a tensor of all experts, without the first axis.

    Raises OSError, and ValueError for a dtype that no layer has or a file that was cut short.
    """
    if entry.dtype not in DTYPES:
        raise ValueError(f"{entry.name} is {entry.dtype}, which is not read here")
    dtype, shape, start = DTYPES[entry.dtype], entry.shape, 0
    if expert is not None:
        shape = shape[1:]
        start = prod(shape) * dtype.itemsize * (expert if entry.shape[0] > 1 else 0)
    size = prod(shape) * dtype.itemsize
    data = bytearray(size)
    with open(entry.file, "rb", buffering=0) as file:
        file.seek(entry.offset + start)
        view, filled = memoryview(data), 0
        while filled < size and (count := file.readinto(view[filled:])):
            filled += count
    if filled < size:
        raise ValueError(f"{os.path.basename(entry.file)} was cut short while it was read")
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(shape)
