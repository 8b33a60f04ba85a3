# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Export the nano model to INT8 W8A8 with AMD Quark (per-channel weights, dynamic per-token input).

Run in Quark's own environment (`make quark-env`):

    python -m examples.step3p5_nano.export SRC DST [--all-linear] [--mtp]

Attention, shared experts, router, lm_head and MTP layers stay BF16, as in the published Step-3.5
recipes; --all-linear quantizes attention and shared experts too, --mtp the MTP layers' attention and
MLP. Experts are written one by one: that is what Quark does with stacked tensors.
"""

import argparse
import json
import logging
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

KEEP = ["*lm_head", "*moe.gate", "*eh_proj", "*shared_head.output"]
KEEP_RECIPE = [*KEEP, "*self_attn*", "*share_expert*"]


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("src", type=Path)
    ap.add_argument("dst", type=Path)
    ap.add_argument("--all-linear", action="store_true", help="quantize attention and shared experts too")
    ap.add_argument("--mtp", action="store_true", help="quantize the MTP layers too")
    args = ap.parse_args()
    if not (args.src / "config.json").is_file():
        print(f"export: {args.src} has no config.json: name a checkpoint folder", file=sys.stderr)
        return 2
    try:
        from quark.torch import ModelQuantizer
        from quark.torch.quantization.config.config import Int8PerChannelSpec, QConfig, QLayerConfig
        from quark.torch.quantization.weight_convert import SplitFusedExperts, WeightConverter
    except ImportError as e:
        print(f"export: {e}: run in Quark's environment (make quark-env)", file=sys.stderr)
        return 2
    except RuntimeError as e:
        print(f"export: {e} It wants a C++ compiler and ninja on PATH (Debian: apt-get install g++)", file=sys.stderr)
        return 2
    logging.disable(logging.WARNING)
    weight = Int8PerChannelSpec(
        symmetric=True, scale_type="float", round_method="half_even", ch_axis=0, is_dynamic=False
    ).to_quantization_spec()
    # Quark calls one scale per token "per channel" of the activation's rows.
    tokens = Int8PerChannelSpec(
        symmetric=True, scale_type="float", round_method="half_even", ch_axis=1, is_dynamic=True
    ).to_quantization_spec()
    exclude = list(KEEP if args.all_linear else KEEP_RECIPE)
    model = json.loads((args.src / "config.json").read_text())
    mtp = [model["num_hidden_layers"] + i for i in range(model.get("num_nextn_predict_layers", 0))]
    if args.mtp:
        # Attention and MLP of the MTP layers only: a recipe that keeps "*self_attn*" would keep theirs as well.
        exclude = [e for e in exclude if "self_attn" not in e]
        if not args.all_linear:
            exclude += [f"*layers.{i}.self_attn*" for i in range(model["num_hidden_layers"])]
    else:
        exclude += [f"*layers.{i}.*" for i in mtp]
    config = QConfig(
        global_quant_config=QLayerConfig(weight=weight, input_tensors=tokens),
        exclude=exclude,
    )

    class SplitExperts(SplitFusedExperts):
        """moe.gate_proj.weight [E, N, K] -> moe.experts.{e}.gate_proj.weight [N, K]."""

        def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> Any:
            parts = super().convert(input_dict, source_patterns, target_patterns, **kwargs)
            return {f"moe.experts.{name}": tensor for name, tensor in parts.items()}

    converters = [
        WeightConverter(f"moe.{p}.weight", f"{p}.weight", operations=[SplitExperts()])
        for p in ("gate_proj", "up_proj", "down_proj")
    ]
    args.dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.dst.parent, prefix=f".{args.dst.name}.") as aside:
        # Quark copies every file beside the weights; hand it a folder with the checkpoint only.
        source, out = Path(aside, "src"), Path(aside, "dst")
        source.mkdir()
        for file in [*args.src.glob("*.safetensors"), *args.src.glob("*.json")]:
            (source / file.name).symlink_to(file.resolve())
        ModelQuantizer(config).direct_quantize_checkpoint(
            str(source), str(out), device="cpu", weight_converters=converters
        )
        shutil.rmtree(args.dst, ignore_errors=True)
        out.rename(args.dst)
    return 0


if __name__ == "__main__":
    sys.exit(main())
