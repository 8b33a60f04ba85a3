# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The whole of a conversion: judge, plan, write."""

import os
from pathlib import Path
from typing import Any

from vllm_quark.checkpoint import read_checkpoint
from vllm_quark.convert.compressed import to_compressed_tensors
from vllm_quark.convert.layouts import carry_config, split_experts, stack_experts
from vllm_quark.convert.plan import ConvertError, Plan, Source
from vllm_quark.convert.write import Tell, finish, is_unfinished, write

LAYOUTS = ("compressed-tensors", "stacked", "per-expert")


def convert_checkpoint(folder: Path, out: Path, layout: str, per_token: bool, tell: Tell) -> Plan:
    """Write the checkpoint in `folder` to the new folder `out`, in another layout.

    layout: of LAYOUTS. per_token: write dynamic per-token activations where the layout cannot say a layer's own.
    tell: called with the file at hand, the bytes written and the bytes in all.
    Raises NoCheckpointError, ConvertError (what the layout cannot say, before anything is written) and OSError.
    """
    if not folder.is_dir():
        raise ConvertError(f"{folder}: is no folder: name a checkpoint's folder (download it first: hf download NAME)")
    exists = os.path.lexists(out)
    if not exists or is_unfinished(out):
        plan = make_plan(folder, layout, per_token)
        if finish(plan, out):
            return plan
    if exists:
        raise ConvertError(f"{out}: exists already: delete it or name another folder")
    write(plan, out, tell)
    return plan


def make_plan(folder: Path, layout: str, per_token: bool = False) -> Plan:
    """What to write, judged; nothing is written. Raises as `convert_checkpoint`."""
    checkpoint = read_checkpoint(str(folder))
    if checkpoint.report.problems:
        first, *more = checkpoint.report.problems
        also = f" (and {len(more)} more: vllm-quark check {folder})" if more else ""
        raise ConvertError(f"{first}{also}")
    if checkpoint.modules is None or not checkpoint.modules.int8:
        raise ConvertError(f"{folder}: no layer is INT8: there is nothing to convert")
    source = Source(checkpoint)
    config: dict[str, Any]
    if layout == "compressed-tensors":
        tensors, config = to_compressed_tensors(source, per_token)
    else:
        tensors, moved = stack_experts(source) if layout == "stacked" else split_experts(source)
        if not moved:
            arrangement = "stacked" if layout == "stacked" else "one by one"
            raise ConvertError(f"{folder}: no INT8 experts that do not lie {arrangement} already: serve it as it is")
        config = carry_config(source, moved)
    source.raise_refusals()
    return Plan(folder, tensors, source.replace_config(config), [layout, per_token])
