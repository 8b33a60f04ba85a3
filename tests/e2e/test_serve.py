# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""`vllm serve` with the series: its OpenAI-compatible API, and a short benchmarks/correctness/serve_load.py."""

import asyncio
from dataclasses import replace

import pytest
import requests

from benchmarks.correctness.serve_load import (
    Answer,
    Memory,
    Server,
    answer_alone,
    compare,
    make_requests,
    send_requests,
    serving,
)
from examples.step3p5_nano.lab import find_port, gap, make_pythonpath
from examples.step3p5_nano.model import load
from examples.step3p5_nano.run import PROMPT
from examples.step3p5_nano.text import BOS

pytestmark = pytest.mark.xdist_group("serve")
COUNT, AT_ONCE = 64, 32


@pytest.fixture(scope="module")
def server(ckpts, vllm, tmp_path_factory) -> Server:
    log, env = tmp_path_factory.mktemp("serve") / "log", {"PYTHONPATH": make_pythonpath(vllm())}
    with serving(ckpts["quark"], log, find_port(), "--enforce-eager", env=env) as server:
        yield server


@pytest.mark.engine
def test_completion_over_the_api(server, ckpts, judge):
    emulated = judge.emulate(ckpts["quark"])
    question = {"model": "nano", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "logprobs": 1}
    answer = requests.post(f"{server.url}/v1/completions", json=question, timeout=120)
    assert answer.ok, answer.text
    choice = answer.json()["choices"][0]
    # The same text, or another one from a near tie on.
    tokens = [list(text.encode()) for text in (choice["text"], emulated.text[:24])]
    assert (gap(load(ckpts["quark"]), [BOS, *PROMPT.encode()], *tokens) or 0) < 0.5, choice["text"]
    assert all(-10 < p <= 0 for p in choice["logprobs"]["token_logprobs"])
    assert requests.get(f"{server.url}/v1/models", timeout=10).json()["data"][0]["id"] == "nano"


@pytest.mark.engine
def test_answers_under_load_are_those_of_each_request_alone(server, ckpts, vllm, tmp_path):
    """Completions and chats, streamed, cancelled; no error, nothing held at the end. `make load` has the whole."""
    workload = make_requests(COUNT)
    answers = asyncio.run(send_requests(server.url, workload, AT_ONCE))
    alone = answer_alone(ckpts["quark"], workload, tmp_path, PYTHONPATH=make_pythonpath(vllm()))
    report = compare(ckpts["quark"], workload, answers, alone)
    print(f"\n{report}")
    assert not report.faults and not server.faults()
    assert report.cancelled and report.same >= 0.9 * (report.same + len(report.parted))


def test_what_is_amiss_is_seen(ckpts):
    """Another token, an answer too short, an error of the client; memory that rises."""
    workload = [replace(r, cancel=False) for r in make_requests(4)]
    alone = [{"prompt": [BOS, *b"def run(self"], "tokens": [*b"):\n  "]}] * 4
    answers = [Answer([*b"):\n  "]), Answer([0, *b":\n  "]), Answer([*b"):\n"]), Answer(error="APIError: 500")]
    report = compare(ckpts["quark"], workload, answers, alone)
    assert report.same == 2 and len(report.parted) == 1
    assert [f.partition("tokens): ")[2][:8] for f in report.faults] == ["another ", "3 tokens", "APIError"]
    memory = Memory(0)
    memory.seen = [100.0] * 30 + [102.0] * 10
    assert memory.faults()
    memory.seen = [90.0] * 20 + [100.0] * 20
    assert not memory.faults()
