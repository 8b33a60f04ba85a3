# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""`vllm serve` with the series, and its OpenAI-compatible API."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from examples.step3p5_nano.lab import HERE, before, gap
from examples.step3p5_nano.model import load
from examples.step3p5_nano.run import PROMPT
from examples.step3p5_nano.text import BOS


@pytest.fixture
def server(ckpts, vllm, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [Path(sys.executable).parent / "vllm", "serve", ckpts["quark"], "--served-model-name", "nano"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", "1024"]
    env = {**os.environ, "PYTHONPATH": before(vllm()), "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True, cwd=HERE)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            if process.poll() is not None:
                pytest.fail((tmp_path / "log").read_text()[-3000:])
            try:
                if requests.get(f"{url}/health", timeout=2).ok:
                    break
            except requests.ConnectionError:
                time.sleep(1)
        else:
            pytest.fail("did not start: " + (tmp_path / "log").read_text()[-3000:])
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.engine
def test_completion_over_the_api(server, ckpts, judge):
    emulated = judge.emulate(ckpts["quark"])
    ask = {"model": "nano", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "logprobs": 1}
    answer = requests.post(f"{server}/v1/completions", json=ask, timeout=120)
    assert answer.ok, answer.text
    choice = answer.json()["choices"][0]
    # The same text, or another one from a near tie on.
    tokens = [list(text.encode()) for text in (choice["text"], emulated.text[:24])]
    assert (gap(load(ckpts["quark"]), [BOS, *PROMPT.encode()], *tokens) or 0) < 0.5, choice["text"]
    assert all(-10 < p <= 0 for p in choice["logprobs"]["token_logprobs"])
    assert requests.get(f"{server}/v1/models", timeout=10).json()["data"][0]["id"] == "nano"
