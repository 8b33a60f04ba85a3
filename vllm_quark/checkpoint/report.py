# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""What is said of a checkpoint: problems, and a summary. Words that several of them share."""

import os
from dataclasses import asdict, dataclass, field
from typing import Any

AGAIN = "export it again with AMD Quark"
ALIKE = "export them again, all alike"
RESTORE = "restore config.json from the export"
INCOMPLETE = "the checkpoint is incomplete: copy or export it again"


@dataclass(frozen=True)
class Finding:
    """A problem; layer, tensor and file (its name in the checkpoint) are "" where it has none.

    The tensor, or else the layer, or else the file, makes a sentence with the reason.
    """

    layer: str
    tensor: str
    file: str
    reason: str
    way_out: str

    @classmethod
    def of_tensor(cls, tensor: str, file: str, reason: str, way_out: str) -> "Finding":
        """file: its path, or "" for a tensor that is in none."""
        # "the norm of model" is a tensor whose name is not known.
        layer = tensor.rpartition(" ")[2] if " " in tensor else tensor.rpartition(".")[0]
        return cls(layer, tensor, os.path.basename(file), reason, way_out)

    @classmethod
    def of_layer(cls, layer: str, reason: str, way_out: str) -> "Finding":
        return cls(layer, "", "", reason, way_out)

    @classmethod
    def of_file(cls, file: str, reason: str, way_out: str) -> "Finding":
        """file: its path."""
        return cls("", "", os.path.basename(file), reason, way_out)

    def __str__(self) -> str:
        subject = self.tensor or self.layer
        place = f"{subject} ({self.file})" if subject and self.file else subject or self.file
        return f"{place} {self.reason}: {self.way_out}"


@dataclass
class Report:
    """What a checkpoint is, and what is wrong with it.

    schemes: modules (a tensor of all experts is one) by scheme, in words. excluded: modules with weights that
    `exclude` lists. unmatched: entries of `exclude` and `layer_quant_config` that name nothing in the files.
    """

    checkpoint: str
    tensors: int = 0
    files: int = 0
    schemes: dict[str, int] = field(default_factory=dict)
    excluded: int = 0
    unmatched: list[str] = field(default_factory=list)
    problems: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """As --json prints it."""
        return {"checkpoint": self.checkpoint, "sound": self.sound, **asdict(self)}
