# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""cpu_pairs.py refuses what it cannot build, and leaves nothing behind."""

from pathlib import Path

import pytest

from benchmarks.speed.cpu_pairs import main


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["cpu_pairs", *words])
        try:
            code = main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capsys.readouterr().err

    return call


def test_two_versions_of_one_name(run):
    code, message = run("HEAD", "HEAD")
    assert code == 2 and "the same name" in message


@pytest.mark.parametrize("words", [("--tokens", "8,"), ("--tokens", "0"), ("--shapes", "16,64,128")])
def test_numbers_that_are_none(run, words: tuple[str, str]):
    code, message = run("HEAD", *words)
    assert code == 2 and f"{words[0]}: {words[1]} is no list" in message


def test_a_revision_that_is_none(run):
    code, message = run("no-revision", "--build", "built")
    assert code == 2 and "cpu_pairs: no-revision:" in message
    assert not list(Path().iterdir())


@pytest.mark.parametrize("folder", ["there", "missing/built"])
def test_a_folder_that_is_not_new(run, folder: str):
    Path("there").mkdir()
    code, message = run("HEAD", "--build", folder)
    assert code == 2 and "has to be a new folder" in message
    assert [p.name for p in Path().iterdir()] == ["there"]
