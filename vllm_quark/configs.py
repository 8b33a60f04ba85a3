# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The launch configs of INT8 experts as files for VLLM_TUNED_CONFIG_FOLDER."""

from pathlib import Path, PurePosixPath

from vllm_quark.patches import QuarkError
from vllm_quark.series import Series
from vllm_quark.transaction import make_folder, replace_file

PATCH = "0013"
DTYPE = ",dtype=int8_w8a8"


def write_configs(series: Series, out: Path, stock: bool = False) -> list[Path]:
    """Write the series' launch configs into the folder `out`, which may hold other files; their paths.

    stock: under the names that a vLLM without patch 0013 looks for, which name no dtype. Raises QuarkError where `out`
    has a file of such a name with other content, before a file is written.
    """
    (patch,) = series.select([PATCH], alone=True)
    contents = {}
    for file in patch.files:
        if file.endswith(".json"):
            name = PurePosixPath(file).name
            contents[out / (name.replace(DTYPE, "") if stock else name)] = series.content(file)
    try:
        for path, content in contents.items():
            if path.exists() and path.read_bytes() != content:
                raise QuarkError(f"{path}: there already, with other content: move it away, or name another folder")
        make_folder(out)
        for path, content in contents.items():
            replace_file(path, content)
    except OSError as e:
        raise QuarkError(f"{e.filename or out}: cannot be written: {e.strerror}: name another folder") from e
    return list(contents)
