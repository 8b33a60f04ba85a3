# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The text the nano model learns and is judged on: the source of Python's standard library."""

import sysconfig
from pathlib import Path

BOS, EOS, VOCAB = 256, 257, 258

# Never seen in training. Small, well-known modules of different kinds.
HELD_OUT = (
    "bisect.py",
    "calendar.py",
    "cmd.py",
    "configparser.py",
    "csv.py",
    "fractions.py",
    "graphlib.py",
    "heapq.py",
    "html/parser.py",
    "json/encoder.py",
    "mailbox.py",
    "queue.py",
    "random.py",
    "shlex.py",
    "statistics.py",
    "textwrap.py",
    "timeit.py",
    "urllib/robotparser.py",
    "wave.py",
    "zipfile.py",
)
# Tests (many installations drop them), generated tables and vendored wheels.
SKIP = {
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
    "idlelib",
    "lib2to3",
    "ensurepip",
    "turtledemo",
    "__phello__",
}


def stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def training_files(root: Path) -> list[Path]:
    """Sources below `root` that are not held out, in name order."""
    held_out = {root / name for name in HELD_OUT}
    return [
        f
        for f in sorted(root.rglob("*.py"))
        if f not in held_out
        and not SKIP & set(f.relative_to(root).parts)
        and not f.name.startswith("_sysconfigdata")
        and not any(p.startswith("config-") for p in f.relative_to(root).parts)
    ]


def held_out_windows(root: Path | None = None, length: int = 512, per_file: int = 3) -> list[list[int]]:
    """Token ids: `per_file` windows of `length` bytes from each held-out module, each after a BOS."""
    windows = []
    for name in HELD_OUT:
        data = ((root or stdlib()) / name).read_bytes()
        for k in range(per_file):
            start = (len(data) - length) * (k + 1) // (per_file + 1)
            if start > 0:
                windows.append([BOS, *data[start : start + length]])
    return windows


def documents(**metadata: object) -> dict[str, object]:
    """20 of the held-out windows as lm-evaluation-harness reads a task's documents (held_out.yaml)."""
    import datasets

    return {"test": datasets.Dataset.from_list([{"text": text_of(w)} for w in held_out_windows()[::3]])}


def text_of(ids: list[int]) -> str:
    """Bytes of `ids` as text; special tokens dropped, broken UTF-8 shown as U+FFFD."""
    return bytes(i for i in ids if i < 256).decode("utf-8", "replace")
