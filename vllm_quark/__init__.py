# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Patches for vLLM as rules over the syntax tree: their status in a tree, apply, revert, and git series.

Imports run one way: patches -> series -> edit -> judge -> (record, transaction) -> tree -> (topics, cover, commits,
release, repack, shadow, run, diff, configs) -> cli.
"""

import os
from pathlib import Path

SERIES = ("patches", "vllm", "csrc", "tests/quantization", "tests/entrypoints")
"""The folders of the repository that hold the series."""

_XDG = os.environ.get("XDG_CACHE_HOME", "")
CACHE = Path(_XDG if os.path.isabs(_XDG) else os.path.expanduser("~/.cache")) / "vllm-quark"
"""The folder for downloads and for the views of `vllm-quark run`."""
