# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""`vllm-quark verify`: what it takes, says and returns."""

import datetime
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_quark.arguments import read_folder
from vllm_quark.patches import QuarkError

if TYPE_CHECKING:
    from vllm_quark.checkpoint import Checkpoint
    from vllm_quark.verify.layers import Layer
    from vllm_quark.verify.measure import Row

ISSUE = "where we have no such machine (MI300X, MI350) the report helps us: .github/ISSUE_TEMPLATE/verify-report.yml"


def verify(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", parser=read_folder, help="a checkpoint's folder")],
    layers: Annotated[
        str, typer.Option("--layers", metavar="N|all", help="number of layers; each kind of layer comes first")
    ] = "12",
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.html", help="write the result as a page with a plot")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> int:
    """Compare this vLLM on this machine with the numbers of an INT8 checkpoint, layer by layer.

    The command builds the checkpoint's own layers one at a time from vLLM's classes, and loads their tensors. It feeds
    them activations whose tokens and channels differ by orders of magnitude. It compares the outputs with a float64
    emulation of the scheme. It needs memory for one layer, no engine and no server.

    Example: vllm-quark verify Step-3.5-Flash-INT8 --layers 20 --report report.html

    Exit codes: 0 right, 1 a layer is off by more than 1 % of the norm (or a token by 3 % of its own) or stops, 2 bad
    input.
    """
    count = _read_count(layers)
    _check_report_path(report)
    from vllm_quark.checkpoint import read_checkpoint
    from vllm_quark.verify.layers import choose_layers, find_layers

    if not checkpoint.is_dir():
        raise QuarkError(
            f"{checkpoint}: is no folder: name a checkpoint's folder (download it first: hf download NAME)"
        )
    contents = read_checkpoint(str(checkpoint))
    if contents.report.problems:
        first, *more = contents.report.problems
        raise QuarkError(f"{first}{f' (and {len(more)} more: vllm-quark check {checkpoint})' if more else ''}")
    if contents.modules is None or not contents.modules.int8 or not (all_layers := find_layers(contents)):
        raise QuarkError(f"{checkpoint}: no layer is INT8: there is nothing to verify")
    try:
        import torch  # noqa: F401
    except ImportError as e:
        raise QuarkError(f"this Python has no torch ({e}): run it in vLLM's environment") from e
    chosen = choose_layers(all_layers, len(all_layers) if count is None else count)
    machine, rows = _measure(contents, chosen)
    scope = f"{len(chosen)} of {len(all_layers)} layers, some of each kind, shape and scheme"
    origin = f"Made {datetime.datetime.now():%Y-%m-%d %H:%M} by: vllm-quark {' '.join(sys.argv[1:])}"
    notes = [f"{scope if len(chosen) < len(all_layers) else 'All layers'}. {origin}"]
    if report:
        from vllm_quark.verify.report import make_page

        unfinished = _unfinished_path(report)
        unfinished.write_text(make_page(checkpoint.absolute().name, machine, notes, rows), encoding="utf-8")
        unfinished.replace(report)
    is_right = all(row.is_good for row in rows)
    if as_json:
        entries = [vars(row) | {k: _as_json(getattr(row, k)) for k in ("error", "worst")} for row in rows]
        result = {"checkpoint": str(checkpoint), "right": is_right, "machine": machine, "layers": entries}
        print(json.dumps(result, indent=1))
    else:
        _show(rows, machine, len(all_layers))
        if report:
            print(f"{report}: {ISSUE}")
    return int(not is_right)


def _as_json(error: float | None) -> float | None:
    """JSON has no infinity."""
    return error if error is None or math.isfinite(error) else None


def _read_count(layers: str) -> int | None:
    if layers == "all":
        return None
    if not layers.isdecimal() or not int(layers):
        raise QuarkError(f"--layers {layers}: is neither a number nor all: --layers 12")
    return int(layers)


def _check_report_path(report: Path | None) -> None:
    if report and not report.absolute().parent.is_dir():
        raise QuarkError(f"{report.parent}: is no folder: make it first")
    if report and report.is_dir():
        raise QuarkError(f"{report}: is a folder: name a file")
    if report:
        # Hours of measuring are not to end here.
        try:
            _unfinished_path(report).touch()
            _unfinished_path(report).unlink()
        except OSError as e:
            raise QuarkError(f"{report}: cannot be written: {e.strerror}: name a file elsewhere") from e


def _unfinished_path(report: Path) -> Path:
    """Where a report lies until it is whole."""
    return report.with_name(f".{report.name}.{os.getpid()}")


def _measure(contents: "Checkpoint", chosen: list["Layer"]) -> tuple[dict[str, str], list["Row"]]:
    """The machine in words, and one row per layer; each row is printed on stderr when it is ready."""
    import torch

    from vllm_quark.verify.build import environment
    from vllm_quark.verify.measure import describe_machine, measure_layers

    name = next(
        (c[k] for c in (contents.config, contents.text_config) for k in ("dtype", "torch_dtype") if c.get(k)),
        "bfloat16",
    )
    dtype = torch.float16 if name == "float16" else torch.bfloat16
    with environment(dtype) as builder:
        machine = describe_machine(builder.device) | {"dtype": str(dtype).removeprefix("torch.")}
        try:
            builder.read_config(contents.name, contents.config, contents.own_quant_config)
        except ValueError as e:
            raise QuarkError(f"this vLLM refuses the checkpoint: {e}") from e
        rows = []
        for row in measure_layers(contents, chosen, builder):
            rows.append(row)
            print(f"{len(rows)} of {len(chosen)}  {row.layer}  {row.status}", file=sys.stderr, flush=True)
    return machine, rows


def _show(rows: list["Row"], machine: dict[str, str], count: int) -> None:
    from vllm_quark.verify.report import show_number

    table = Table()
    for name in ("layer", "shape", "scheme", "kernel", "error", "worst token", "result"):
        table.add_column(name, overflow="fold", justify="right" if name in ("error", "worst token") else "left")
    for row in rows:
        colour = "green" if row.is_good else "red"
        result = f"[{colour}]{row.status}[/]" + (f": {escape(row.detail)}" if row.detail else "")
        errors = show_number(row.error), show_number(row.worst)
        table.add_row(row.layer, row.shape, row.scheme, row.kernel, *errors, result)
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(", ".join(f"{k} {v}" for k, v in machine.items()), soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    bad = [row for row in rows if not row.is_good]
    print(f"{len(bad)} of {len(rows)} layers are off" if bad else f"right: {len(rows)} of the {count} layers")
