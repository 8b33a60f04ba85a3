# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""`vllm-quark convert`: what it takes, says and returns."""

import enum
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from vllm_quark.arguments import read_folder


class Layout(str, enum.Enum):
    COMPRESSED_TENSORS = "compressed-tensors"
    STACKED = "stacked"
    PER_EXPERT = "per-expert"


def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", parser=read_folder, help="a checkpoint's folder")],
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", metavar="DIR", parser=read_folder, help="folder to write, which does not exist yet"
        ),
    ],
    to: Annotated[Layout, typer.Option("--to", help="layout to write")],
    per_token: Annotated[
        bool,
        typer.Option("--per-token", help="dynamic per-token activations where the format cannot say a layer's own"),
    ] = False,
) -> int:
    """Write an INT8 checkpoint of AMD Quark in another layout, its INT8 numbers bit for bit.

    compressed-tensors: for a vLLM that cannot be patched. stacked, per-expert: Step-3.5's experts in three tensors per
    layer, or one by one. The command refuses a layer that the layout cannot express, by its name, before it writes
    anything.

    The command needs little memory for any size of checkpoint. If it is killed or the disk is full, run it again: it
    continues where it stopped.

    Example: vllm-quark convert Step-3.5-Flash-INT8 -o Step-3.5-Flash-CT --to compressed-tensors

    Exit codes: 0 written, 2 not, with a line that says why.
    """
    from vllm_quark.convert.conversion import convert_checkpoint

    plan = convert_checkpoint(checkpoint, out, to.value, per_token, _Progress())
    print(f"{out}: {len(plan.tensors)} tensors, {to.value}: vllm serve {shlex.quote(str(out))}")
    return 0


class _Progress:
    """A line on stderr that goes on at a terminal; elsewhere one a file, and one every 10 %."""

    def __init__(self) -> None:
        self.shown = ("", -1)

    def __call__(self, file: str, written: int, total: int) -> None:
        is_terminal = sys.stderr.isatty()
        percent = 100 * written // max(1, total)
        progress = file, percent if is_terminal else percent // 10
        if progress == self.shown:
            return
        self.shown = progress
        line = f"{percent:3}% of {total / 1e9:.1f} GB  {file}"
        if is_terminal:
            print(f"\r{line}\x1b[K", end="\n" if written == total else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
