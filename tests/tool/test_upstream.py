# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""tests/upstream: what passes on stock and not with the series is found, whatever way it goes."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from trees import ROOT, make_tree, write

RUN = ROOT / "tests/upstream/run.py"
spec = importlib.util.spec_from_file_location("upstream_run", RUN)
upstream = importlib.util.module_from_spec(spec)
spec.loader.exec_module(upstream)

HEADER = """\
import os, signal, time
from pathlib import Path
import pytest
import vllm
PATCHED = "packed" in Path(vllm.__file__).with_name("alpha.py").read_text()
"""
# Upstream's tests; the series of trees.py puts "packed" into vllm/alpha.py.
TESTS = {
    "test_quark": """
        import lm_eval
        from tblib import pickling_support
        import huggingface_hub
        pickling_support.install()
        for look in (huggingface_hub.list_repo_refs, huggingface_hub.HfApi().list_repo_refs):
            try:
                look("amd/private")
            except huggingface_hub.errors.RepositoryNotFoundError:
                pass
        def test_fails(): assert not PATCHED, "patched"
        def test_passes(): pass
        def test_fails_on_both(): assert False
        def test_mended(): assert PATCHED
        def test_skipped(): PATCHED and pytest.skip("not here")
        @pytest.mark.parametrize("n", [1, 2] if not PATCHED else [1])
        def test_vanishes(n): pass
        @pytest.fixture
        def broken(): assert not PATCHED, "no set-up"
        def test_error(broken): pass
        @pytest.fixture
        def vllm_runner(): raise SystemExit
        def test_of_the_hub(vllm_runner): pass
    """,
    "test_crash": """
        def test_before(): pass
        def test_crash(): PATCHED and os.kill(os.getpid(), signal.SIGSEGV)
        def test_after(): pass
    """,
    "test_import": """
        assert not PATCHED, "cannot be imported"
        def test_one(): pass
    """,
    "test_slow": """
        def test_slow(): PATCHED and time.sleep(60)
        def test_after(): pass
    """,
    "test_wedged": """
        def test_wedged():
            if PATCHED:
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
                time.sleep(60)
    """,
}


def source(folder: Path, *names: str) -> Path:
    """Upstream's checkout with some of TESTS."""
    write(folder, {"tests/__init__.py": "", "tests/conftest.py": "", "tests/quantization/__init__.py": ""})
    for name in names:
        body = "\n".join(line[8:] for line in TESTS[name].splitlines())
        write(folder, {f"tests/quantization/{name}.py": HEADER + body})
    return folder


def cli(home: Path, tree: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, RUN, "9.9", "--series", home, "--site", tree, "--python", sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_way_to_lose_a_test(
    tmp_path: Path, home: Path, tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(upstream, "TEST_SECONDS", 2)
    monkeypatch.setattr(upstream, "FILE_SECONDS", 8)
    out = tmp_path / "out.json"
    words = [
        "9.9",
        "--series",
        home,
        "--site",
        tree,
        "--python",
        sys.executable,
        "--work",
        tmp_path / "work",
        "--source",
        source(tmp_path / "source", *TESTS),
        "--out",
        out,
    ]
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, words)])
    assert upstream.main() == 1
    printed = capsys.readouterr().out
    at = "tests/quantization"
    assert [line for line in printed.splitlines() if line.startswith("regression: ")] == [
        f"regression: {at}/test_crash.py::test_crash: missing: killed by SIGSEGV",
        f"regression: {at}/test_crash.py::test_after: missing: killed by SIGSEGV",
        f"regression: {at}/test_import.py::test_one: missing: AssertionError: cannot be imported",
        f"regression: {at}/test_quark.py::test_fails: failed: AssertionError: patched",
        f"regression: {at}/test_quark.py::test_skipped: skipped: Skipped: not here",
        f"regression: {at}/test_quark.py::test_vanishes[2]: missing",
        f"regression: {at}/test_quark.py::test_error: error: AssertionError: no set-up",
        f"regression: {at}/test_slow.py::test_slow: failed: Failed: longer than 2 s",
        f"regression: {at}/test_wedged.py::test_wedged: missing: longer than 8 s",
    ]
    (row,) = (line.split() for line in printed.splitlines() if line.startswith(f"{at}/test_quark.py"))
    assert row[1:] == ["6", "2", "1", "3", "3", "2"]


def test_no_regression(tmp_path: Path, home: Path, tree: Path):
    write(src := source(tmp_path / "source"), {"tests/quantization/test_quark.py": "def test_passes(): pass"})
    result = cli(home, tree, "--work", tmp_path / "work", "--source", src)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 of upstream's tests" in result.stdout


@pytest.mark.parametrize(
    "text, message",
    [
        ("def test_fails(): assert False", "nothing passes on stock"),
        ("import not_there", "test_quark.py cannot be imported on stock"),
    ],
)
def test_nothing_proved(tmp_path: Path, home: Path, tree: Path, text: str, message: str):
    write(src := source(tmp_path / "source"), {"tests/quantization/test_quark.py": text})
    result = cli(home, tree, "--work", tmp_path / "work", "--source", src)
    assert (result.returncode, message in result.stderr) == (2, True), result.stdout + result.stderr


def test_the_tree_is_tested_and_no_other(tmp_path: Path):
    """A vLLM that does not come from the shadow tree would pass as anything."""
    src = source(tmp_path / "source", "test_crash")
    elsewhere, empty = make_tree(tmp_path / "elsewhere"), tmp_path / "tree"
    (empty / "vllm").mkdir(parents=True)
    (src / "vllm").symlink_to(elsewhere / "vllm")
    with pytest.raises(upstream.QuarkError, match="not from"):
        upstream.run(Path(sys.executable), empty, src, ["tests/quantization/test_crash.py"], 1)


def test_pack(tmp_path: Path, home: Path, tree: Path):
    """What --pack writes is what --source takes."""
    src, pack = source(tmp_path / "source", "test_crash"), tmp_path / "pack.tar.gz"
    assert cli(home, tree, "--source", src, "--pack", pack).returncode == 0
    assert upstream.read_tests(pack) == upstream.read_tests(src)
