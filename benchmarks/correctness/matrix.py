# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Which INT8 scheme is right, refused or garbage, on the vLLM that PYTHONPATH has first.

    python -m benchmarks.correctness.matrix measure OUT.json     # every cell of this machine's kernels
    python -m benchmarks.correctness.matrix table DIR DOC.md     # the page from all measurements below DIR

A cell is a random checkpoint of one layer through QuarkConfig, vLLM's loaders and one kernel, against
float64 (tests/quantization/quark/checkpoints.py): `right` within 1 % of the norm and 3 % for the worst
token; `per token` the same, but for per-token activations instead of the checkpoint's; `refused` by the
layer's name while loading; `stops` with any other error; else `garbage`. `make matrix` runs all of it.
"""

import argparse
import collections
import contextlib
import json
import os
import sys
from pathlib import Path

from benchmarks.pages import write_file

ROOT = Path(__file__).resolve().parents[2]
CUTLASS, TRITON = "CutlassInt8ScaledMMLinearKernel", "TritonInt8ScaledMMLinearKernel"
ORDER = ("right", "per token", "refused", "stops", "garbage")


def measure(out: Path) -> None:
    import torch
    import vllm

    from tests.quantization.quark import checkpoints as ck
    from tests.quantization.quark.utils import DEVICE, vllm_environment

    linear = {"CUTLASS": "", "Triton int8 linear": CUTLASS} if DEVICE == "cuda" else {"CPU": ""}
    experts = {"fused-MoE Triton" if DEVICE == "cuda" else "CPU": ""}
    cells = []
    with vllm_environment(), torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        for kind in ck.LINEAR + ck.EXPERTS:
            for kernel, disabled in (linear if kind in ck.LINEAR else experts).items():
                os.environ["VLLM_DISABLED_KERNELS"] = disabled
                for weight in ck.WEIGHTS:
                    for activation in ck.ACTIVATIONS:
                        for dtype in (torch.bfloat16, torch.float16):
                            with contextlib.redirect_stdout(sys.stderr):
                                cell = ck.serve_case(ck.Case(kind, weight, activation, dtype))
                            cells.append(
                                {
                                    "layer": kind,
                                    "kernel": kernel,
                                    "weight": weight,
                                    "activation": activation,
                                    "dtype": str(dtype).removeprefix("torch."),
                                    "status": cell.status,
                                    "error": round(cell.error, 5),
                                    "worst": round(cell.worst, 5),
                                    "detail": cell.detail,
                                }
                            )
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    page = {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "device": device,
        # shadows have no record
        "patched": (Path(vllm.__file__).parent / "model_executor/layers/quantization/quark/int8").is_dir(),
        "cells": cells,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, json.dumps(page, separators=(",", ":")).replace('{"layer"', '\n{"layer"') + "\n")
    totals = collections.Counter(c["status"] for c in cells)
    which = "patched" if page["patched"] else "stock"
    print(f"{page['vllm']} {which} {device}:", ", ".join(f"{totals[s]} {s}" for s in ORDER if totals[s]))


def _summary(cells: list[dict]) -> str:
    totals = collections.Counter(c["status"] for c in cells)
    worst = max((c["error"] for c in cells if c["status"] in ("right", "per token")), default=None)
    words = [s if len(totals) == 1 else f"{totals[s]} {s}" for s in ORDER if totals[s]]
    return ", ".join(words) + (f" ({worst:.4f})" if worst is not None and len(totals) == 1 else "")


def _answer(pages: list[dict]) -> str:
    """The page's first paragraph: how many cells came out how, stock and patched."""
    verbs = {"right": "are right", "per token": "run per token", "refused": "are refused", "stops": "stop"}
    sentences = []
    for patched, name in ((True, "With the series"), (False, "On stock")):
        cells = [cell for page in pages if page["patched"] is patched for cell in page["cells"]]
        counts = collections.Counter(cell["status"] for cell in cells)
        parts = [f"{counts[status]} {verbs.get(status, 'are garbage')}" for status in ORDER if counts[status]]
        listed = f"{', '.join(parts[:-1])} and {parts[-1]}" if parts[1:] else "".join(parts)
        sentences.append(f"{name}, {listed}, of {len(cells)} cells.")
    return " ".join(sentences)


def matrix_page(pages: list[dict]) -> str:
    """docs/matrix.md, of what `measure` wrote."""
    text = [
        "# Which INT8 W8A8 schemes does the series serve?",
        "",
        _answer(pages),
        "",
        "![Cells of each release and device by outcome, stock and series](matrix.svg)",
        "",
        "- A cell is one scheme, one layer and one dtype. A column joins the layers plain, fused qkv, fused gate_up "
        "and row-parallel (experts: stacked and one by one), and bfloat16 and float16.",
        "- Behind a word stands the largest error of its cells, over the norm.",
        "- `per token`: static, asymmetric and dynamic per-tensor activations are served with per-token ones. The log "
        "says so once.",
        "- The top of [benchmarks/correctness/matrix.py](../benchmarks/correctness/matrix.py) says what the other "
        "words mean.",
        "- [matrix/](matrix/) has each cell's error, and the words of each refusal.",
        "- [fixes.md](fixes.md) says why cells are garbage on stock.",
        "",
    ]
    runs = {(p["vllm"].split("+")[0], p["device"], p["patched"]): p for p in pages}
    for base in sorted({k[0] for k in runs}):
        text += [f"## vLLM {base}", ""]
        for device in sorted({k[1] for k in runs if k[0] == base}):
            both = [runs.get((base, device, patched)) for patched in (False, True)]
            point = next(p for p in both if p)
            text += [
                f"{device}, torch {point['torch']}. Cells: "
                + "; ".join(
                    f"{name} "
                    + ", ".join(f"{n} {s}" for s in ORDER if (n := sum(c["status"] == s for c in p["cells"])))
                    for name, p in zip(("stock", "patched"), both, strict=True)
                    if p
                )
                + ".",
                "",
            ]
            columns = list(dict.fromkeys((c["kernel"], c["layer"].startswith("moe")) for c in point["cells"]))
            head = [f"{k}{', experts' if m and k == 'CPU' else ''}" for k, m in columns]
            text += ["| weights | activations | | " + " | ".join(head) + " |", "|---" * (3 + len(head)) + "|"]
            schemes = list(dict.fromkeys((c["weight"], c["activation"]) for c in point["cells"]))
            for weight, activation in schemes:
                for name, p in zip(("stock", "patched"), both, strict=True):
                    if p is None:
                        continue
                    statuses = [
                        _summary(
                            [
                                c
                                for c in p["cells"]
                                if (c["weight"], c["activation"]) == (weight, activation)
                                and (c["kernel"], c["layer"].startswith("moe")) == column
                            ]
                        )
                        for column in columns
                    ]
                    text.append(f"| {weight} | {activation} | {name} | " + " | ".join(statuses) + " |")
            text.append("")
    text += [
        "## How it was measured",
        "",
        "`make matrix` ran the CPU's cells, and `python -m benchmarks.correctness.matrix measure` the GPU's. "
        "`python -m benchmarks.correctness.matrix table docs/matrix docs/matrix.md` wrote this page; do not edit it.",
        "",
    ]
    return "\n".join(text)


def table(folder: Path, doc: Path) -> None:
    pages = [json.loads(f.read_text()) for f in sorted(folder.glob("*.json"))]
    if not pages:
        sys.exit(f"matrix: {folder}: no measurements: run `make matrix`")
    write_file(doc, matrix_page(pages))
    patched = [p for p in pages if p["patched"]]
    bad = [(p["vllm"], p["device"]) for p in patched if any(c["status"] in ("garbage", "stops") for c in p["cells"])]
    if bad:
        sys.exit(f"matrix: patched columns with garbage: {bad}")


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = ap.add_subparsers(dest="what", required=True)
    one = sub.add_parser("measure")
    one.add_argument("out", type=Path)
    two = sub.add_parser("table")
    two.add_argument("folder", type=Path)
    two.add_argument("doc", type=Path)
    args = ap.parse_args()
    if args.what == "measure":
        measure(args.out)
    else:
        table(args.folder, args.doc)


if __name__ == "__main__":
    main()
