# SPDX-License-Identifier: Apache-2.0
"""The runs of gpu_engine and gpu_serve: which checkpoint of depth_checkpoint, which vLLM, which settings."""

import json
import shutil
from pathlib import Path

from benchmarks.speed.depth_checkpoint import write_apart

DECODE = (1, 32, 128)
COMPILATION = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": list(DECODE)}
# The experts of the BF16 checkpoint, per channel and per token, by vLLM's online quantization.
FP8 = {"quantization": "online", "quantization_config": {"moe": "fp8_per_channel"}}
# The checkpoint, the site and arguments of the engine.
RUNS: dict[str, tuple[str, str, dict]] = {
    "quark-series": ("quark", "series", {}),
    "quark-sums": ("quark", "sums", {}),
    "quark-stock": ("quark", "stock", {}),
    "compressed-tensors": ("compressed-tensors", "series", {}),
    "fp8": ("bf16", "series", FP8),
    "bf16": ("bf16", "series", {}),
}


def make_checkpoint(work: Path, kind: str, layers: int) -> Path:
    """The checkpoint `kind` of RUNS in `work`, written where it is not there yet."""
    checkpoint, quark = work / kind, work / "quark"
    if checkpoint.exists():
        return checkpoint
    if kind == "bf16":
        write_apart(checkpoint, layers, False)
    elif not quark.exists():
        write_apart(quark, layers, True)
    if kind == "compressed-tensors":
        write_twin(quark, checkpoint)
    return checkpoint


def write_twin(quark: Path, folder: Path) -> None:
    """The compressed-tensors checkpoint of the same numbers: weights linked, scales [E, N, 1]."""
    from safetensors.torch import load_file, save_file

    from examples.step3p5_nano.convert import compressed_tensors

    folder.mkdir(parents=True)
    config = json.loads((quark / "config.json").read_text())
    for file in sorted(quark.glob("*.safetensors")):
        if file.name.startswith("scales"):
            save_file(
                compressed_tensors(load_file(file), json.loads((quark / "config.json").read_text())), folder / file.name
            )
        else:
            (folder / file.name).symlink_to(file)
    compressed_tensors({}, config)
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(quark / "model.safetensors.index.json", folder)
