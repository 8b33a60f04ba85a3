# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Other layouts of a Quark export, the INT8 numbers untouched.

    python -m examples.step3p5_nano.convert stacked SRC DST
    python -m examples.step3p5_nano.convert compressed-tensors SRC DST

stacked: three keys per layer, moe.{gate,up,down}_proj.weight [E, N, K]. compressed-tensors: the twin that vLLM's
compressed-tensors path reads.

SRC is what export.py wrote.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

EXPERT = re.compile(r"^(.*\.moe)\.experts\.(\d+)\.(\w+_proj)\.(weight|weight_scale)$")


def stacked(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Per-expert tensors joined along a new first axis: weights [E, N, K], scales [E, N]."""
    experts: dict[str, dict[int, torch.Tensor]] = {}
    result = {}
    for name, tensor in tensors.items():
        if m := EXPERT.match(name):
            experts.setdefault(f"{m[1]}.{m[3]}.{m[4]}", {})[int(m[2])] = tensor
        else:
            result[name] = tensor
    for name, parts in experts.items():
        result[name] = torch.stack([parts[e] for e in range(len(parts))])
    return result


def compressed_tensors(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Scales [N] -> [N, 1], and the same scheme said in compressed-tensors' words."""
    exclude = config["quantization_config"]["exclude"]
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": exclude,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False},
                "input_activations": {
                    "num_bits": 8,
                    "type": "int",
                    "strategy": "token",
                    "symmetric": True,
                    "dynamic": True,
                },
            }
        },
    }
    return {k: v.unsqueeze(-1) if k.endswith("weight_scale") else v for k, v in tensors.items()}


LAYOUTS = {"stacked": stacked, "compressed-tensors": compressed_tensors}


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("layout", choices=LAYOUTS)
    ap.add_argument("src", type=Path)
    ap.add_argument("dst", type=Path)
    args = ap.parse_args()
    try:
        config = json.loads((args.src / "config.json").read_text())
        if config["quantization_config"]["quant_method"] != "quark":
            raise ValueError("its quant_method is not quark")
        tensors = {k: v for f in sorted(args.src.glob("*.safetensors")) for k, v in load_file(f).items()}
    except (OSError, ValueError, KeyError) as e:
        print(f"convert: {args.src}: not a Quark export ({e}): name the folder that export.py wrote", file=sys.stderr)
        return 2
    tensors = LAYOUTS[args.layout](tensors, config)
    args.dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.dst.parent, prefix=f".{args.dst.name}.") as aside:
        out = Path(aside, args.dst.name)
        out.mkdir()
        save_file({k: v.contiguous() for k, v in tensors.items()}, out / "model.safetensors", {"format": "pt"})
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file in args.src.glob("*.json"):
            if file.name not in ("config.json", "model.safetensors.index.json"):
                shutil.copy(file, out)
        shutil.rmtree(args.dst, ignore_errors=True)
        out.rename(args.dst)
    return 0


if __name__ == "__main__":
    sys.exit(main())
