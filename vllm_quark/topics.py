# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Topics: the parts of the series that make one pull request each (patches/topics.yaml)."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from vllm_quark.patches import Patch, PatchError, QuarkError
from vllm_quark.series import Series

TABLE_PARTS = 3


@dataclass(frozen=True)
class Topic:
    """The title, the purpose and the numbers of one pull request's patches, and the tables that show their results.

    results: (page of docs/, heading, sentence before the table) for each table.
    """

    title: str
    purpose: str
    numbers: tuple[str, ...]
    results: tuple[tuple[str, str, str], ...]

    def select_patches(self, series: Series) -> list[Patch]:
        """The topic's patches, in series order."""
        return [patch for patch in series.patches if patch.number in self.numbers]


def _read_topic(path: Path, name: str, data: object) -> Topic:
    if not isinstance(data, dict) or data.keys() != {"title", "purpose", "patches", "results"}:
        raise PatchError(f"{path}: topic '{name}' needs title, purpose, patches and results, and nothing else")
    if any(len(table) != TABLE_PARTS for table in data["results"]):
        raise PatchError(f"{path}: topic '{name}': each result needs a page, a heading and a sentence")
    results = tuple((str(page), str(heading), str(sentence)) for page, heading, sentence in data["results"])
    return Topic(str(data["title"]), str(data["purpose"]), tuple(map(str, data["patches"])), results)


def find_topic(series: Series, name: str) -> Topic:
    """The topic `name` of the series.

    Raises QuarkError for an unknown name or a series without topics, PatchError for a broken patches/topics.yaml.
    """
    path = series.home / "patches/topics.yaml"
    if not path.is_file():
        raise QuarkError(f"--topic: this series has no topics, as {path} is missing: use --only")
    try:
        topics = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as e:
        raise PatchError(f"{path}: is not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(topics, dict):
        raise PatchError(f"{path}: needs topics by name")
    if name not in topics:
        raise QuarkError(f"--topic: no topic '{name}': the series has {', '.join(topics)}")
    return _read_topic(path, name, topics[name])
