# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""`format-patch --topic`: the series as pull requests."""

import subprocess
from collections import Counter
from pathlib import Path

import pytest
import yaml
from trees import NEWER, ROOT, cli, one_line

from vllm_quark.cover import pull_request
from vllm_quark.series import Series
from vllm_quark.topics import find_topic

TOPICS = yaml.safe_load((ROOT / "patches/topics.yaml").read_text())
SYNTHETIC = """\
small: {title: "[Bugfix] Two of three", purpose: Two of three., patches: ["0001", "0003"], results: []}
"""


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=A Committer", "-c", "user.email=c@example.com", *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture(autouse=True)
def author(monkeypatch):
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "Ann Author")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "ann@example.com")


def test_each_patch_has_one_topic(real_series: Series):
    """An optional one's topic holds what it requires besides."""
    optional = {patch.number for patch in real_series.optional}
    topics = [topic["patches"] for topic in TOPICS.values()]
    counts = Counter(number for numbers in topics for number in numbers if not optional.intersection(numbers))
    assert counts == Counter(patch.number for patch in real_series.patches)
    assert optional == {number for numbers in topics for number in numbers} & optional


def test_a_topic_holds_what_its_patches_require(real_series: Series):
    for name in TOPICS:
        topic = find_topic(real_series, name)
        series = real_series.with_optional(topic.numbers)
        needed = {number for patch in topic.select_patches(series) for number in patch.requires}
        assert needed <= set(topic.numbers), name


@pytest.mark.parametrize("name", TOPICS)
def test_each_topic_is_a_series_of_its_own(name: str, unpacked: Path, tmp_path: Path):
    """On the unpacked 0.21.0, without the other topics: git am takes it, and nothing of it is left to apply."""
    result = cli(ROOT, "format-patch", unpacked, "-o", tmp_path / "out", "--topic", name, "--cover")
    assert result.returncode == 0, result.stderr
    git(unpacked, "init", "-q")
    git(unpacked, "add", "-A", "-f")
    git(unpacked, "commit", "-q", "-m", "base")
    git(unpacked, "am", "-q", "--keep-non-patch", "--empty=drop", *map(str, sorted((tmp_path / "out").glob("*.patch"))))
    numbers = [number for number in TOPICS[name]["patches"] if number not in NEWER]
    assert git(unpacked, "rev-list", "--count", "HEAD").strip() == str(1 + len(numbers))
    left = cli(ROOT, "status", unpacked, "--only", ",".join(numbers))
    # What a patch requires stands in the same topic, hence --only adds nothing.
    assert left.returncode == 0, left.stdout
    letter = (tmp_path / "out/0000-cover-letter.patch").read_text()
    assert TOPICS[name]["title"].partition("] ")[0] in letter


@pytest.mark.parametrize("name", TOPICS)
def test_a_pull_request_has_its_topics_tables(name: str, real_series: Series):
    topic = find_topic(real_series, name)
    series = real_series.with_optional(topic.numbers)
    text = pull_request(series, topic.select_patches(series), topic)
    for _, _, sentence in topic.results:
        assert f"{sentence}\n\n|" in text
    assert topic.results


def test_only_the_topics_patches_are_written(home, tree, tmp_path):
    (home / "patches/topics.yaml").write_text(SYNTHETIC)
    result = cli(home, "format-patch", tree, "-o", tmp_path / "out", "--topic", "small")
    assert result.returncode == 0, result.stderr
    subjects = [
        p.read_text().partition("Subject: ")[2].partition("\n")[0] for p in sorted((tmp_path / "out").iterdir())
    ]
    assert len(subjects) == 2 and "[PATCH 1/2]" in subjects[0]


def test_bad_topics(home, tree, tmp_path):
    out = ["-o", tmp_path / "out"]
    one_line(cli(home, "format-patch", tree, *out, "--topic", "small"), "has no topics", "use --only")
    (home / "patches/topics.yaml").write_text(SYNTHETIC)
    one_line(cli(home, "format-patch", tree, *out, "--topic", "large"), "no topic 'large'", "small")
    one_line(cli(home, "format-patch", tree, *out, "--topic", "small", "--only", "1"), "--topic excludes")
    (home / "patches/topics.yaml").write_text("small: {title: only}\n")
    one_line(
        cli(home, "format-patch", tree, *out, "--topic", "small"),
        "topics.yaml",
        "needs title, purpose, patches and results",
    )
    assert not (tmp_path / "out").exists()
