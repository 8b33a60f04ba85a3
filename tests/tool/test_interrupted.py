# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Killed at every step, and many at once."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from trees import cli, make_tree, snapshot, visible

from vllm_quark.patches import QuarkError
from vllm_quark.series import Series
from vllm_quark.shadow import make_shadow
from vllm_quark.tree import Tree

EVENTS = ("open", "os.", "shutil.", "tempfile.", "pathlib.")


def killed_at(step: int, root: Path, action: Callable[[], object]) -> bool:
    """Run `action` in a child that dies at its `step`-th file operation in `root`; False: it ended before."""
    child = os.fork()
    if child == 0:
        count = 0

        def watch(event: str, args: tuple) -> None:
            nonlocal count
            if event.startswith(EVENTS) and any(str(root) in str(a) for a in args):
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(watch)
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"failed before step {step}"
    return os.WIFSIGNALED(status)


def assert_true_status(root: Path, series: Series, before: dict, after: dict) -> None:
    """`status` says "applied" exactly of the patches whose files all lie there."""
    current = visible(root)
    files = {
        "0001-mapping": None,
        "0002-scale": ["vllm/model_executor/beta.py", "vllm/new/deep/gamma.py", "tests/test_gamma.py", "vllm/alpha.py"],
        "0003-only-files": ["vllm/configs/c.json"],
    }
    for verdict in Tree(root).status(series):
        name = verdict.patch.name
        if name not in files:
            continue
        expected = files[name] or ["vllm/alpha.py"]
        is_complete = all(current.get(f) == after[f] for f in expected)
        assert (verdict.status == "applied") == is_complete, (name, verdict)
        assert verdict.status in ("applied", "applies"), (name, verdict)


@pytest.mark.parametrize("action", ["apply", "revert"])
@pytest.mark.parametrize("finish", ["apply", "revert"])
def test_killed_at_every_step(tmp_path, series, action, finish):
    model = make_tree(tmp_path / "model")
    before = snapshot(model)
    Tree(model).apply(series, series.select())
    after = visible(model)
    step = 0
    while True:
        step += 1
        root = make_tree(tmp_path / f"{step}")
        if action == "revert":
            Tree(root).apply(series, series.select())
        died = killed_at(step, root, lambda root=root: getattr(Tree(root), action)(series, series.select()))
        assert_true_status(root, series, before, after)
        getattr(Tree(root), finish)(series, series.select())
        if finish == "apply":
            assert visible(root) == after, step
            Tree(root).revert(series, series.select())
        assert snapshot(root) == before, step
        if not died:
            break
    assert step > 25, "the kills did not reach the work"


def test_a_shadow_killed_at_every_step(tmp_path, series):
    """It is there as a whole or not at all: PYTHONPATH would take a part of it for all."""
    site, folder = make_tree(tmp_path / "site", source=False), tmp_path / "shadows"
    names = [patch.name for patch in series.patches]
    whole = snapshot(make_shadow(tmp_path / "whole", series, names, site))
    step, died = 0, True
    while died:
        step += 1
        out = folder / f"{step}"
        died = killed_at(step, folder, lambda out=out: make_shadow(out, series, names, site))
        assert not out.exists() or snapshot(out) == whole, step
        if not out.exists():
            assert snapshot(make_shadow(out, series, names, site)) == whole
    assert step > 15, "the kills did not reach the work"


def start(home: Path, *words: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "vllm_quark", *map(str, words)]
    env = {**os.environ, "PYTHONPATH": str(home)}
    return subprocess.Popen(command, env=env, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_many_applies_at_once(home, tree, tmp_path):
    whole = make_tree(tmp_path / "whole")
    before = snapshot(tree)
    cli(home, "apply", whole)
    running = [start(home, "apply", tree) for _ in range(6)]
    for r in running:
        _, err = r.communicate(timeout=120)
        assert r.returncode == 0, err
    assert visible(tree) == visible(whole)
    assert cli(home, "revert", tree).returncode == 0
    assert snapshot(tree) == before


def test_apply_and_revert_at_once(home, tree, tmp_path):
    whole = make_tree(tmp_path / "whole")
    before = snapshot(tree)
    cli(home, "apply", whole)
    running = [start(home, action, tree) for action in ["apply", "revert"] * 4]
    for r in running:
        _, err = r.communicate(timeout=120)
        assert r.returncode == 0, err
    assert visible(tree) in (before, visible(whole))
    assert cli(home, "revert", tree).returncode == 0
    assert snapshot(tree) == before


def test_only_the_last_record_cannot_be_written(tree, series, monkeypatch):
    """All files are in place then: it must not say that nothing was changed, and a second run finishes."""
    before = snapshot(tree)
    written = []

    def replace(new, path):
        written.append(path)
        if sum(str(p).endswith("record.json") for p in written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        os.rename(new, path)

    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(QuarkError) as e:
        Tree(tree).apply(series, series.select())
    monkeypatch.undo()
    assert "record.json" in str(e.value) and "make room and run again" in str(e.value)
    assert "nothing was changed" not in str(e.value)
    assert "packed" in (tree / "vllm/alpha.py").read_text()
    Tree(tree).apply(series, series.select())
    Tree(tree).revert(series, series.select())
    assert snapshot(tree) == before
