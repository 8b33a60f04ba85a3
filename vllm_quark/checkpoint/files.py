# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Read what a checkpoint is made of: its config.json and the headers of its safetensors files."""

import json
import os
import re
from pathlib import Path
from typing import Any

from vllm_quark.checkpoint.int8 import headers, scheme
from vllm_quark.checkpoint.report import INCOMPLETE, RESTORE, Finding, Report
from vllm_quark.checkpoint.values import find_misfit
from vllm_quark.patches import QuarkError

CONFIG = "config.json"
EXPORT = "name a checkpoint that AMD Quark exported as INT8"
MEND = "mend that and run again"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


class NoCheckpointError(QuarkError):
    """What cannot be judged: `file`, `reason` and `way_out` make the line that the user sees."""

    def __init__(self, file: str | os.PathLike[str], reason: str, way_out: str) -> None:
        super().__init__(f"{file}: {reason}: {way_out}")
        self.file, self.reason, self.way_out = str(file), reason, way_out


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        way_out = f"name the folder of a checkpoint, with its {CONFIG}"
        raise NoCheckpointError(path, "does not exist", way_out) from None
    except OSError as e:
        raise NoCheckpointError(path, f"cannot be read ({e.strerror})", MEND) from e
    except (ValueError, RecursionError) as e:
        raise NoCheckpointError(path, f"is no JSON ({e})", "restore it from the export") from e
    if not isinstance(config, dict):
        raise NoCheckpointError(path, "is no JSON object", "restore it from the export")
    return config


def read_folder(folder: str, report: Report) -> tuple[dict[str, Any], Any]:
    """The config and the contents of a local checkpoint.

    No contents, and a problem in `report` for each, where files are broken. Raises NoCheckpointError.
    """
    config = _read_config(Path(folder) / CONFIG)
    try:
        files = headers.find_files(folder)
    except headers.CheckpointError as e:
        name, _, rest = str(e).removeprefix(folder).partition(": ")
        raise NoCheckpointError(folder + name, *_split_reason(rest)) from e
    except RecursionError as e:
        raise NoCheckpointError(folder, "has an index that is none", INCOMPLETE) from e
    except OSError as e:
        raise NoCheckpointError(folder, f"cannot be read ({e.strerror})", MEND) from e
    if not files:
        raise NoCheckpointError(folder, "has no safetensors files", "download or export the whole checkpoint")
    report.files, entries = len(files), []
    for path in files:
        tensors, problems = _read_header(path)
        entries += tensors
        report.problems += problems
    report.tensors = len(entries)
    if report.problems:
        report.notes.append("nothing else was judged: the layers of the other files may go on in these")
        return config, None
    if not entries:
        raise NoCheckpointError(folder, "has no tensors in its safetensors files", "copy or export it again")
    return config, headers.Contents(entries, config)


def _split_reason(text: str) -> tuple[str, str]:
    """Reason and way out of "REASON: WAY OUT"."""
    if text.endswith(f": {INCOMPLETE}"):
        return text.removesuffix(f": {INCOMPLETE}"), INCOMPLETE
    reason, _, way_out = text.rpartition(": ")
    return reason, way_out


def _read_header(path: str) -> tuple[list[Any], list[Finding]]:
    """The tensors of a file, or why it is none."""
    try:
        entries = list(headers.read_header(path))
        misfit = find_misfit(entries, os.path.getsize(path))
    except headers.CheckpointError as e:
        return [], [Finding.of_file(path, *_split_reason(str(e).removeprefix(f"{path}: ")))]
    except RecursionError:
        return [], [Finding.of_file(path, "is no safetensors file", INCOMPLETE)]
    if misfit is not None:
        return [], [Finding.of_file(path, f"does not hold what its header says, {misfit} for one", INCOMPLETE)]
    return entries, []


def read_hub(name: str, report: Report) -> tuple[dict[str, Any], Any]:
    """The config and the contents of a model on the Hugging Face hub; `report` says that values are not read.

    Raises NoCheckpointError.
    """
    if os.path.exists(name):
        raise NoCheckpointError(name, "is a file", f"name its folder, {os.path.dirname(name) or '.'}")
    if not _HUB_NAME.fullmatch(name):
        raise NoCheckpointError(name, "does not exist", "name the folder of a checkpoint")
    way_out = f"download it first (hf download {name}) and name its folder"
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError:
        reason = "is no folder, and without huggingface_hub no model of the Hugging Face hub can be read"
        raise NoCheckpointError(name, reason, way_out) from None
    disable_progress_bars()
    try:
        config = _read_config(Path(hf_hub_download(name, CONFIG)))
        contents = headers.contents_of_hub(name, None, config)
    except (OSError, ValueError, HfHubHTTPError) as e:
        message = next(iter(str(e).strip().splitlines()), type(e).__name__).rstrip(".:")
        reason = f"is no folder, and cannot be read from the Hugging Face hub ({message})"
        raise NoCheckpointError(name, reason, way_out) from e
    if contents is None:
        reason = "is no folder, and has no safetensors files on the Hugging Face hub that can be read"
        raise NoCheckpointError(name, reason, way_out)
    report.notes.append("values of scales and zero points were not looked at: of the hub, headers alone are read")
    return config, contents


def find_quant_config(config: dict[str, Any], contents: Any, report: Report) -> dict[str, Any] | None:
    """The completed Quark config of an INT8 checkpoint; None, and a word in `report`, where there is none.

    Raises NoCheckpointError where nothing says that it ought to be one.
    """

    def refuse(reason: str, way_out: str) -> None:
        report.problems.append(Finding.of_file(CONFIG, reason, way_out))

    path = os.path.join(report.checkpoint, CONFIG)
    text_config = config.get("text_config")
    quant_config = config.get("quantization_config")
    if quant_config is None and isinstance(text_config, dict):
        quant_config = text_config.get("quantization_config")
    int8 = [m for m in contents.int8_modules() if "weight_scale" in contents.modules[m]]
    int8_weights = f"{len(int8)} weights are int8, {int8[0]}.weight the first of them" if int8 else ""
    if quant_config is None:
        if not int8:
            raise NoCheckpointError(path, "has no quantization_config, and no weight is int8", EXPORT)
        refuse(f"has no quantization_config, but {int8_weights}", RESTORE)
        return None
    if not isinstance(quant_config, dict):
        raise NoCheckpointError(path, "its quantization_config is no JSON object", RESTORE)
    method = quant_config.get("quant_method")
    if method is None and (int8 or scheme.has_int8(quant_config)):
        refuse("has no quant_method in its quantization_config", 'add "quant_method": "quark" there')
        return None
    if not isinstance(method, str) or method.lower() != "quark":
        reason = f"its quant_method is {method!r}, not 'quark'"
        raise NoCheckpointError(path, reason, f"{EXPORT}; vLLM serves others without vllm-quark")
    if not scheme.has_int8(quant_config):
        if int8:
            refuse(f"quantizes no layer to INT8, but {int8_weights}", RESTORE)
        else:
            report.notes.append("no layer is INT8: nothing was judged but that the files are whole")
        return None
    try:
        return scheme.complete_config(quant_config)
    except ValueError as e:
        reason, _, way_out = str(e).rpartition(": ")
        refuse(f"is wrong, {reason}", way_out)
        report.notes.append("nothing else was judged: it is not known how layers are quantized")
        return None
