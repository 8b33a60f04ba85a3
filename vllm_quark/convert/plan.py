# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Tensors to write as pieces of tensors that are there: which bytes go where, without reading one."""

import os
from collections import defaultdict
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from vllm_quark.checkpoint import Checkpoint
from vllm_quark.patches import QuarkError

# Layers that a message names; the others are counted.
FEW = 3


class ConvertError(QuarkError):
    """What cannot be converted, with a reason and a way out."""


class Piece(NamedTuple):
    """`size` bytes of a tensor from byte `start` on, `times` times over."""

    entry: Any
    start: int
    size: int
    times: int = 1


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: its header, and the pieces that follow one another in it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def kind(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(piece.size * piece.times for piece in self.pieces)

    @property
    def file(self) -> str:
        """The name of the file that its first piece is from."""
        path: str = self.pieces[0].entry.file
        return os.path.basename(path)


@dataclass(frozen=True)
class Plan:
    """All that a conversion writes. config: of config.json. options: what it was asked for."""

    folder: Path
    tensors: list[Tensor]
    config: dict[str, Any]
    options: list[Any]


@dataclass
class Source:
    """A sound checkpoint to convert, and why parts of it cannot be."""

    checkpoint: Checkpoint
    refused: dict[tuple[str, str], dict[str, None]] = field(default_factory=lambda: defaultdict(dict))

    def __post_init__(self) -> None:
        assert self.checkpoint.modules is not None
        self.modules = self.checkpoint.modules
        self.contents: Any = self.modules.contents
        self.sizes = _measure(self.contents)

    def refuse(self, layer: str, reason: str, way_out: str) -> None:
        """Note why a layer cannot be converted; `raise_refusals` says it."""
        self.refused[reason, way_out][layer] = None

    def raise_refusals(self) -> None:
        """Raise ConvertError where anything was refused: one line a reason."""
        lines = []
        for (reason, way_out), refused in self.refused.items():
            layers = list(refused)
            also = f" (and {len(layers) - FEW} more)" if layers[FEW:] else ""
            lines.append(f"{', '.join(layers[:FEW])}{also}: {reason}: {way_out}")
        if lines:
            raise ConvertError("\n".join(lines))

    def keep(self, entry: Any) -> Tensor:
        """A tensor as it is."""
        return Tensor(entry.name, entry.dtype, entry.shape, (Piece(entry, 0, self.sizes[entry.name]),))

    def replace_config(self, quant_config: dict[str, Any]) -> dict[str, Any]:
        """The checkpoint's config.json with another quantization_config, where its own is."""
        config = self.checkpoint.config
        if config.get("quantization_config") is None:
            return config | {"text_config": config["text_config"] | {"quantization_config": quant_config}}
        return config | {"quantization_config": quant_config}


def _measure(contents: Any) -> dict[str, int]:
    """Bytes of each tensor, of any dtype: `check` saw that they follow one another without gaps."""
    by_file: dict[str, list[Any]] = defaultdict(list)
    for kinds in contents.modules.values():
        for entry in kinds.values():
            by_file[entry.file].append(entry)
    sizes: dict[str, int] = {}
    for path, entries in by_file.items():
        entries.sort(key=lambda e: (e.offset, prod(e.shape) != 0))
        ends = [*(e.offset for e in entries[1:]), os.path.getsize(path)]
        sizes |= {entry.name: end - entry.offset for entry, end in zip(entries, ends, strict=True)}
    return sizes
