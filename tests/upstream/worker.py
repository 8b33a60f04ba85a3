# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Upstream's test files on the vLLM that PYTHONPATH finds: run.py's other half, in the environment of that vLLM.

    PYTHONPATH=TREE PYTHON worker.py < ORDER

in a folder that holds upstream's tests/. vLLM and upstream's conftest.py are imported once; then each file is a
process of its own (forked, with its own process group). Each test is a line of JSON in the results the moment it is
known, so what ran before a crash stands; then one line for the end of its file. run.py says what stands in for what.
"""

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import re
import signal
import sys
import time
import traceback
import types
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# Fixtures that load a model of the hub.
OF_THE_HUB = {"vllm_runner", "hf_runner"}


@dataclass(frozen=True)
class Order:
    """What to run, how, and where the results go."""

    tree: str  # vLLM has to come from here
    files: list[str]
    gpu_files: list[str]  # only where vLLM's platform is not the CPU
    parts: dict[str, str | int]  # of these files only the tests that match, or one in so many
    results: str
    logs: str
    jobs: int
    test_seconds: float
    file_seconds: float


def install_stand_ins() -> None:
    """What upstream's tests import and an environment for serving lacks."""
    if importlib.util.find_spec("lm_eval") is None:
        sys.modules["lm_eval"] = types.ModuleType("lm_eval")
    if importlib.util.find_spec("tblib") is None:
        tblib, support = types.ModuleType("tblib"), types.ModuleType("tblib.pickling_support")
        support.install = lambda *_, **__: None
        tblib.pickling_support = support
        sys.modules.update({"tblib": tblib, "tblib.pickling_support": support})
    with contextlib.suppress(ImportError):
        import huggingface_hub
        from huggingface_hub.errors import RepositoryNotFoundError

        def no_such_repository(*_: object, **__: object) -> None:
            # its constructor wants the hub's answer
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError, "no hub here")

        huggingface_hub.list_repo_refs = huggingface_hub.HfApi.list_repo_refs = no_such_repository


class Recorder:
    """A pytest plugin: the outcome of each test of `file` to the results, none longer than `test_seconds`."""

    def __init__(self, order: Order, file: str):
        self.order, self.file = order, file
        self.known: dict[str, tuple[str, str]] = {}

    def say(self, **fields: object) -> None:
        # one write a line, so that the lines of processes do not mix
        with open(self.order.results, "a") as f:
            f.write(json.dumps({"file": self.file, **fields}) + "\n")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.say(test=report.nodeid, outcome="error", why=find_reason(report))

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        part = self.order.parts.get(self.file)
        if isinstance(part, int):  # by checksum: a test that vanishes does not move the others
            items[:] = [i for i in items if zlib.crc32(i.nodeid.encode()) % part == 0]
        elif part:
            items[:] = [i for i in items if re.search(part, i.nodeid)]
        for item in items:
            if OF_THE_HUB.intersection(getattr(item, "fixturenames", ())):
                item.add_marker(pytest.mark.skip(reason="a model of the hub"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        def fail_late(*_: object) -> None:
            pytest.fail(f"longer than {self.order.test_seconds:g} s")

        signal.signal(signal.SIGALRM, fail_late)
        signal.setitimer(signal.ITIMER_REAL, self.order.test_seconds)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            outcome, why = self.known.get(item.nodeid, ("error", "no report"))
            self.say(test=item.nodeid, outcome=outcome, why=why)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.known[report.nodeid] = "failed" if report.when == "call" else "error", find_reason(report)
        elif report.skipped:
            self.known[report.nodeid] = "skipped", find_reason(report)
        elif report.when == "call":
            self.known[report.nodeid] = "passed", ""


def find_reason(report: pytest.CollectReport | pytest.TestReport) -> str:
    """What a report says went wrong, on one line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return crash.message.strip().partition("\n")[0][:300]
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return ([line.strip() for line in text.splitlines() if line.strip()] or [""])[-1][:300]


def run_file(order: Order, file: str) -> int:
    """pytest on `file`, in this process. Returns its exit code."""
    log = Path(order.logs) / (file.replace("/", ".") + ".log")
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    return pytest.main(
        [file, "-c", "pytest.ini", "--rootdir", ".", "-p", "no:cacheprovider", "-q"], plugins=[Recorder(order, file)]
    )


def start_process(order: Order, file: str) -> int:
    """A process, and process group, for `file`."""
    if pid := os.fork():
        return pid
    os.setsid()
    exit_code = 70
    try:
        exit_code = int(run_file(order, file))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def run(order: Order) -> None:
    """Every file, `jobs` at a time."""
    waiting = list(order.files)
    running: dict[int, tuple[str, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < order.jobs:
                file = waiting.pop(0)
                running[start_process(order, file)] = file, time.monotonic()
            time.sleep(0.02)
            for pid, (file, started) in list(running.items()):
                seconds = time.monotonic() - started
                is_late = seconds > order.file_seconds
                if is_late:
                    kill(pid)
                result, status = os.waitpid(pid, 0 if is_late else os.WNOHANG)
                if result:
                    del running[pid]
                    code = os.waitstatus_to_exitcode(status)
                    ended = ""
                    if is_late:
                        ended = f"longer than {order.file_seconds:g} s"
                    elif code < 0:
                        ended = f"killed by {signal.Signals(-code).name}"
                    elif code not in (0, 1, 2, 5):  # failures, no import, no tests: the tests say it
                        ended = f"exit code {code}"
                    Recorder(order, file).say(ended=ended, seconds=round(seconds, 1))
    finally:
        for pid in running:
            kill(pid)


def main() -> None:
    order = Order(**json.load(sys.stdin))
    sys.path[0] = os.getcwd()
    install_stand_ins()
    import vllm

    if not Path(vllm.__file__).is_relative_to(order.tree):
        sys.exit(f"vLLM comes from {vllm.__file__}, not from {order.tree}")
    try:
        importlib.import_module("tests.conftest")
    except BaseException:
        traceback.print_exc()  # each file will say so
    if order.gpu_files:
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            order.files[:0] = order.gpu_files  # long ones first
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        sys.exit("importing vLLM initialised CUDA: processes forked from here could not use it")
    # vLLM's own clean-up after every test collects garbage, half a second for what was imported.
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None
    run(order)


if __name__ == "__main__":
    main()
