# SPDX-License-Identifier: Apache-2.0
"""`vllm bench serve`: requests with random prompts for a server that runs."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def measure_serving(
    url: str,
    model: str,
    tokenizer: Path,
    flags: list[str],
    log: Path,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> dict:
    """The whole result of one `vllm bench serve` on the server at `url`, which serves `model`.

    flags: lengths, counts and rates. timeout: seconds. What it prints is appended to `log`. Raises RuntimeError, with
    the end of that, where it fails, and subprocess.TimeoutExpired.
    """
    result = log.with_suffix(".bench.json")
    result.unlink(missing_ok=True)
    words = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--base-url", url, "--model", model]
    words += ["--tokenizer", str(tokenizer), "--dataset-name", "random", "--temperature", "0", *flags, "--save-result"]
    words += ["--result-dir", str(result.parent), "--result-filename", result.name]
    with open(log, "a") as output:
        process = subprocess.run(
            words,
            env={**(env or os.environ), "HF_HUB_OFFLINE": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=timeout,
        )
    if process.returncode or not result.exists():
        raise RuntimeError(f"vllm bench serve failed: {log.read_text()[-2000:]}")
    data: dict = json.loads(result.read_text())
    result.unlink()
    return data
