# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""`vllm serve` under load: the clients `openai` and `vllm bench serve`, many requests at once.

    PYTHONPATH=VLLM python -m benchmarks.correctness.serve_load CKPT [--requests 500] [--at-once 32]
        [--json OUT] [--logs FOLDER]

Completions and chats, streamed and not, prompts of 1 to 900 tokens, a tenth cancelled halfway. The server answers as
many others first, then all of them, is killed (SIGKILL) with requests in flight, is started again and does the same
again, then answers those of `vllm bench serve`. Exit code 1 where a request fails, an answer is not the one of an
offline engine that has the request alone (from a near tie of the float reference on it may be another one), memory
rises over the last half, the server still holds a request at the end, or its log has an error.
"""

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import requests

from benchmarks.bench_serve import measure_serving
from examples.step3p5_nano.lab import find_port, gap
from examples.step3p5_nano.model import load
from examples.step3p5_nano.text import BOS, HELD_OUT, stdlib

NAME = "nano"
LONGEST, CONTEXT = 900, 1024
# What the chat template writes around one message of the user, in tokens.
AROUND = 21
# Small enough that the requests fill it early and come back to blocks that were used.
CACHE = 64 << 20
# Two tokens nearer than this (nats, float reference) are a tie; memory is flat that rises by less than this share.
TIE, FLAT = 0.5, 0.01


@dataclass(frozen=True)
class Request:
    """prompt: token ids or text of a completion, or what the user says in a chat."""

    chat: bool
    stream: bool
    cancel: bool
    prompt: list[int] | str
    max_tokens: int


@dataclass
class Answer:
    """tokens: generated ids, None where the request was cancelled before one came; error: "" where none."""

    tokens: list[int] | None = None
    cancelled: bool = False
    error: str = ""
    seconds: float = 0.0


@dataclass
class Report:
    """What `compare` finds. parted: the gaps (nats) at which answers leave the offline ones, sorted."""

    requests: int = 0
    cancelled: int = 0
    tokens: int = 0
    same: int = 0
    parted: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def make_requests(count: int, seed: int = 0) -> list[Request]:
    """Prompts of 1 to 900 tokens of held-out text, evenly spread and in random order."""
    chance = random.Random(seed)
    text = "".join(c for name in HELD_OUT for c in (stdlib() / name).read_text() if c.isascii())
    lengths = [1 + (LONGEST - 1) * i // max(1, count - 1) for i in range(count)]
    chance.shuffle(lengths)
    cancelled = set(chance.sample(range(count), count // 10))
    workload = []
    for i, length in enumerate(lengths):
        start = chance.randrange(len(text) - LONGEST)
        chat = length > AROUND and i % 4 >= 2
        prompt: list[int] | str = text[start : start + length - (AROUND if chat else 1)]
        if not chat and (length == 1 or i % 8 < 4):
            prompt = [BOS, *prompt.encode()]
        tokens = 64 if i in cancelled else chance.randint(4, 48)
        workload.append(Request(chat, i % 2 == 1, i in cancelled, prompt, tokens))
    return workload


# The client


async def send_request(client: openai.AsyncOpenAI, request: Request, patience: float) -> Answer:
    """One request; `patience`: seconds after which one that is to be cancelled is, if it is not streamed."""
    answer, started = Answer(), time.monotonic()
    common = {
        "model": NAME,
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "stream": request.stream,
        "extra_body": {"return_token_ids": True},
    }
    if request.chat:
        call = client.chat.completions.create(messages=[{"role": "user", "content": request.prompt}], **common)
    else:
        call = client.completions.create(prompt=request.prompt, **common)
    try:
        if request.stream:
            answer.tokens = []
            async with await call as stream:
                async for chunk in stream:
                    answer.tokens += (chunk.choices and getattr(chunk.choices[0], "token_ids", None)) or []
                    if request.cancel and len(answer.tokens) >= request.max_tokens // 2:
                        answer.cancelled = True
                        break
        else:
            completion = await asyncio.wait_for(call, patience if request.cancel else None)
            answer.tokens = list(completion.choices[0].token_ids)
    except TimeoutError:
        answer.cancelled = True
    except openai.OpenAIError as e:
        answer.error = f"{type(e).__name__}: {e} ({e.__cause__!r})"
    answer.seconds = time.monotonic() - started
    return answer


async def send_requests(url: str, workload: list[Request], at_once: int, watch: "Memory | None" = None) -> list[Answer]:
    """The answers of the server at `url`, in the requests' order; `at_once` requests in flight."""
    answers = [Answer() for _ in workload]
    indices = iter(range(len(workload)))
    durations = [2.0]

    async def send_next(client: openai.AsyncOpenAI) -> None:
        for i in indices:
            answers[i] = await send_request(client, workload[i], durations[-1] / 2)
            if not answers[i].cancelled:
                durations.append(answers[i].seconds)
            if watch is not None:
                watch.look()

    # A client drops idle connections before the server does (5 s), or a request may meet one that is being closed:
    # openai's own answer to that, a retry, would hide other errors.
    http = openai.DefaultAsyncHttpxClient(limits=httpx.Limits(keepalive_expiry=2))
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300, http_client=http
    ) as client:
        await asyncio.gather(*(send_next(client) for _ in range(at_once)))
    return answers


class Memory:
    """MB that the processes of a server hold (PSS), looked at after each request."""

    def __init__(self, process: int) -> None:
        self.process = process
        self.seen: list[float] = []

    def look(self) -> None:
        root = psutil.Process(self.process)
        size = 0
        for p in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                size += p.memory_full_info().pss
        self.seen.append(size / 1e6)

    def quarters(self) -> list[float]:
        """The mean of each quarter of the requests."""
        size = max(1, len(self.seen) // 4)
        parts = (self.seen[i : i + size] for i in range(0, 4 * size, size))
        return [round(sum(part) / len(part), 1) for part in parts]

    def faults(self) -> list[str]:
        third, last = self.quarters()[2:]
        return [f"memory rose from {third} to {last} MB over the last half"] if last > third * (1 + FLAT) else []


# The server


class Server:
    """`vllm serve CKPT` of the vLLM on PYTHONPATH (or of `env`) with its log in the file `log`.

    Raises RuntimeError with the log's end where it does not start.
    """

    def __init__(self, ckpt: Path, log: Path, port: int, *flags: str, env: dict[str, str] | None = None) -> None:
        command = [
            Path(sys.executable).with_name("vllm"),
            "serve",
            ckpt,
            "--served-model-name",
            NAME,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--max-model-len",
            str(CONTEXT),
            "--max-num-seqs",
            "32",
            "--kv-cache-memory-bytes",
            str(CACHE),
            *flags,
        ]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **(env or {})}
        for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
            env.pop(name, None)  # set by lab.py for engines in its own process
        started = time.monotonic()
        with open(log, "w") as out:
            self.process = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
        try:
            while not self._answers():
                if self.process.poll() is not None or time.monotonic() - started > 600:
                    raise RuntimeError(f"vllm serve did not start: {log.read_text(errors='replace')[-3000:]}")
                time.sleep(0.5)
        except BaseException:
            self.kill()
            raise
        self.start_seconds = time.monotonic() - started

    def _answers(self) -> bool:
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{self.url}/health", timeout=2).ok
        return False

    def kill(self) -> None:
        """SIGKILL for all of its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)
        try:
            self.process.wait(30)
        finally:
            self.kill()

    def faults(self) -> list[str]:
        """Requests that it still holds 20 s after the last one, and errors in its log."""
        gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        for _ in range(40):
            text = requests.get(f"{self.url}/metrics", timeout=10).text
            values = {name: re.search(rf"^vllm:{name}{{.*}} (\S+)$", text, re.M) for name in gauges}
            figures = {name: float(m[1]) for name, m in values.items() if m}
            if len(figures) == len(gauges) and not any(figures.values()):
                break
            time.sleep(0.5)
        leftovers = [] if figures == dict.fromkeys(gauges, 0.0) else [f"without a request: {figures}"]
        return (
            leftovers
            + [
                line
                for line in self.log.read_text(errors="replace").splitlines()
                if re.search(r"\bERROR\b|Traceback|\b50\d\b Internal", line)
            ][:5]
        )


@contextlib.contextmanager
def serving(*args: Any, **settings: Any) -> Iterator[Server]:
    """A `Server`, stopped at the end."""
    server = Server(*args, **settings)
    try:
        yield server
    finally:
        server.stop()


# What the answers should be


def answer_alone(ckpt: Path, workload: list[Request], folder: Path, **env: str) -> list[dict]:
    """For each request its "prompt" and "tokens", ids, by an offline engine in another process that has it alone."""
    questions, out = folder / "requests.json", folder / "alone.json"
    questions.write_text(json.dumps([asdict(r) for r in workload]))
    words = [sys.executable, "-m", "benchmarks.correctness.serve_load", ckpt, "--alone", questions, out]
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "WARNING", **env}
    with open(folder / "alone.log", "w") as log:
        process = subprocess.run(words, stdout=log, stderr=log, env=env, cwd=Path(__file__).parents[2])
    if process.returncode:
        raise RuntimeError(f"the offline engine failed: {(folder / 'alone.log').read_text()[-2000:]}")
    return json.loads(out.read_text())


def _answer_alone(ckpt: Path, questions: Path, out: Path) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        str(ckpt),
        max_model_len=CONTEXT,
        max_num_seqs=1,
        enforce_eager=True,
        kv_cache_memory_bytes=CACHE,
        enable_prefix_caching=False,
        seed=0,
    )
    answers = []
    for r in (Request(**r) for r in json.loads(questions.read_text())):
        params = SamplingParams(temperature=0, max_tokens=r.max_tokens)
        if r.chat:
            output = llm.chat([{"role": "user", "content": r.prompt}], params, use_tqdm=False)[0]
        else:
            prompt = TokensPrompt(prompt_token_ids=r.prompt) if isinstance(r.prompt, list) else r.prompt
            output = llm.generate(prompt, params, use_tqdm=False)[0]
        answers.append({"prompt": list(output.prompt_token_ids), "tokens": list(output.outputs[0].token_ids)})
    out.write_text(json.dumps(answers))


def compare(ckpt: Path, workload: list[Request], answers: list[Answer], alone: list[dict]) -> Report:
    """Hold the answers against those that an engine gives to each request alone."""
    reference, report = load(ckpt), Report(len(workload))
    for i, (request, answer, expected) in enumerate(zip(workload, answers, alone, strict=True)):
        label = f"request {i} ({'chat' if request.chat else 'completion'}, {len(expected['prompt'])} tokens)"
        report.cancelled += answer.cancelled
        if answer.error:
            report.faults.append(f"{label}: {answer.error}")
        if answer.tokens is None:
            continue
        report.tokens += len(answer.tokens)
        size = min(len(answer.tokens), len(expected["tokens"]))
        split_gap = gap(reference, expected["prompt"], answer.tokens[:size], expected["tokens"][:size])
        if split_gap is None:
            report.same += 1
            if not answer.cancelled and not answer.error and len(answer.tokens) != len(expected["tokens"]):
                report.faults.append(f"{label}: {len(answer.tokens)} tokens, alone {len(expected['tokens'])}")
        else:
            report.parted.append(round(split_gap, 3))
            if split_gap > TIE:
                report.faults.append(f"{label}: another answer than alone, {split_gap:.2f} nats from it")
    report.parted.sort()
    return report


# The whole


async def kill_under_load(server: Server, workload: list[Request]) -> int:
    """Kill the server with `asked` in flight; how many of them came back with an error of the connection."""
    load = asyncio.create_task(send_requests(server.url, workload, len(workload)))
    await asyncio.sleep(1)
    server.kill()
    return sum(bool(a.error) for a in await load)


def bench(url: str, ckpt: Path, count: int, at_once: int, folder: Path) -> dict:
    """The result of `vllm bench serve`. Raises RuntimeError where it fails."""
    flags = ["--random-input-len", "450", "--random-output-len", "32", "--random-range-ratio", "0.9"]
    flags += ["--num-prompts", str(count), "--max-concurrency", str(at_once)]
    result = measure_serving(url, NAME, ckpt, flags, folder / "bench.log")
    return {
        k: result[k]
        for k in (
            "completed",
            "failed",
            "duration",
            "request_throughput",
            "output_throughput",
            "total_token_throughput",
            "median_ttft_ms",
            "p99_ttft_ms",
            "median_tpot_ms",
            "p99_tpot_ms",
        )
        if k in result
    }


def run(ckpt: Path, count: int, at_once: int, folder: Path, flags: list[str]) -> dict:
    """All of it; "faults" is empty where it went as it should."""
    workload = make_requests(count)
    alone = answer_alone(ckpt, workload, folder)
    result: dict[str, Any] = {"faults": []}
    port = find_port()
    for name in ("first", "again"):
        with serving(ckpt, folder / f"{name}.log", port, *flags) as server:
            # oneDNN keeps what it compiles for each number of rows, up to a limit: memory grows until that is reached.
            warm_up = asyncio.run(send_requests(server.url, make_requests(count, seed=1), at_once))
            memory = Memory(server.process.pid)
            memory.look()
            memory_before, started = memory.seen.pop(), time.monotonic()
            answers = asyncio.run(send_requests(server.url, workload, at_once, memory))
            seconds = time.monotonic() - started
            report = compare(ckpt, workload, answers, alone)
            failed = [a.error for a in warm_up if a.error]
            faults = [f"{name}: {f}" for f in failed + report.faults + memory.faults() + server.faults()]
            result[name] = {
                **asdict(report),
                "seconds": round(seconds, 1),
                "faults": faults,
                "start_seconds": round(server.start_seconds, 1),
                "memory_before": round(memory_before, 1),
                "memory": memory.quarters(),
            }
            print(name, json.dumps(result[name]), flush=True)
            result["faults"] += faults
            if name == "first":
                result["broken off"] = asyncio.run(kill_under_load(server, workload[:at_once]))
                if not result["broken off"]:
                    result["faults"].append("killed: every request in flight was answered")
            else:
                result["bench"] = figures = bench(server.url, ckpt, count, at_once, folder)
                print("bench", json.dumps(figures), flush=True)
                if figures["completed"] != count or figures.get("failed"):
                    result["faults"].append(f"vllm bench serve: {figures['completed']} of {count} completed")
                result["faults"] += [f"after bench: {f}" for f in server.faults()]
    return result


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("ckpt", type=Path)
    ap.add_argument("--requests", type=int, default=500)
    ap.add_argument("--at-once", type=int, default=32)
    ap.add_argument("--eager", action="store_true", help="no torch.compile")
    ap.add_argument("--json", type=Path, help="file for the figures")
    ap.add_argument("--logs", type=Path, help="folder for the logs; default: one that goes at the end")
    ap.add_argument("--alone", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.alone:
        _answer_alone(args.ckpt, *args.alone)
        return 0
    with tempfile.TemporaryDirectory() as temp:
        folder = (args.logs or Path(temp)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        flags = ["--enforce-eager"] if args.eager else []
        result = run(args.ckpt.absolute(), args.requests, args.at_once, folder, flags)
    result["versions"] = {p: importlib.metadata.version(p) for p in ("vllm-cpu", "torch", "openai")}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    for fault in result["faults"]:
        print("FAULT", fault)
    print(f"broken off by the kill: {result['broken off']}; faults: {len(result['faults'])}")
    return bool(result["faults"])


if __name__ == "__main__":
    sys.exit(main())
