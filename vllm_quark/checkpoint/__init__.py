# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""What is wrong with an INT8 checkpoint of AMD Quark, said without vLLM, torch or a GPU.

Its headers are judged by the code of the series that vLLM runs before it reads a weight (int8). What vLLM finds while
it builds and loads layers is added: schemes that no kernel runs, parts of a layer that do not go together, tensors
that layers lack, the values of scales and zero points.

One direction: int8, values, report → entries → modules → parts, scales → files → here.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm_quark.checkpoint.entries import Entries
from vllm_quark.checkpoint.files import MEND, NoCheckpointError, find_quant_config, read_folder, read_hub
from vllm_quark.checkpoint.modules import Modules
from vllm_quark.checkpoint.parts import judge_parts
from vllm_quark.checkpoint.report import Finding, Report
from vllm_quark.checkpoint.scales import Wanted, judge_scale_headers, judge_values

__all__ = ["Checkpoint", "Finding", "NoCheckpointError", "Report", "check_checkpoint", "read_checkpoint"]


@dataclass
class Checkpoint:
    """A checkpoint that was judged: its config.json, its completed Quark config, its modules, and the report.

    quant_config and modules are None where the report says why there are none.
    """

    name: str
    config: dict[str, Any]
    quant_config: dict[str, Any] | None
    modules: Modules | None
    report: Report

    @property
    def text_config(self) -> dict[str, Any]:
        """The config of the language model inside another; empty where there is none."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else {}

    @property
    def own_quant_config(self) -> dict[str, Any]:
        """The quantization_config as it stands in config.json."""
        quant_config: dict[str, Any] = self.config.get("quantization_config") or self.text_config["quantization_config"]
        return quant_config


def check_checkpoint(name: str) -> Report:
    """The report of `read_checkpoint`, which has what is raised, too."""
    return read_checkpoint(name).report


def read_checkpoint(name: str) -> Checkpoint:
    """Read and judge the checkpoint in the folder `name`, or of that name on the Hugging Face hub (by its headers).

    Raises NoCheckpointError where there is nothing to judge: no folder, no config.json or index that can be read, no
    safetensors files, a quantization that is not Quark's, or none at all.
    """
    is_local, report = os.path.isdir(name), Report(name)
    config, contents = read_folder(name, report) if is_local else read_hub(name, report)
    if contents is None:
        return Checkpoint(name, config, None, None, report)
    entries = [entry for kinds in contents.modules.values() for entry in kinds.values()]
    report.tensors, report.files = len(entries), len({entry.file for entry in entries})
    quant_config = find_quant_config(config, contents, report)
    if quant_config is None:
        return Checkpoint(name, config, None, None, report)
    modules, wanted = Modules(Entries(quant_config), contents), list[Wanted]()

    def note(findings: Iterable[Finding]) -> None:
        for finding in findings:
            modules.judged.add(finding.tensor)
            report.problems.append(finding)

    note(modules.sort(report.notes))
    note(modules.judge_floats(report.notes))
    note(judge_parts(modules))
    note(judge_scale_headers(modules, wanted))
    if is_local:
        try:
            note(judge_values(modules, wanted))
        except OSError as e:
            raise NoCheckpointError(e.filename or name, f"cannot be read ({e.strerror})", MEND) from e
    report.schemes, report.excluded = dict(modules.schemes.most_common()), modules.excluded
    report.unmatched = modules.entries.find_unmatched(contents)
    return Checkpoint(name, config, quant_config, modules, report)
