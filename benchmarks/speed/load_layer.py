# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""How long INT8 experts take to load, with the series' checks and without.

    python -m benchmarks.speed.load_layer [--experts 288] [--layers 1] [--tp 1 8] [--runs 3] [--rounds 1] [--model]

Writes a checkpoint of MoE layers, by default at Step-3.5-Flash's widths (one tensor per expert and projection, as AMD
Quark writes them; random bytes), and loads a rank's part of it with the installed vLLM, stock and with the series, in
turn, each in a process of its own: the tensors through the parameters' loaders, and the look at headers and scales
before and after. With --model they come as an engine's loader hands them over, through vLLM's iterator and
Step3p5Model.load_weights, which looks each name up. Prints each run's seconds and the ratio of the medians, series over
stock. The files lie in the page cache.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARDS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def write_checkpoint(folder: Path, layers: int, experts: int, hidden: int, width: int) -> None:
    """One safetensors file per layer."""
    import torch
    from safetensors.torch import save_file

    shapes = {p: (hidden, width) if shard == "w2" else (width, hidden) for p, shard in SHARDS.items()}
    weights = {p: torch.randint(-127, 128, shape, dtype=torch.int8) for p, shape in shapes.items()}
    for layer in range(layers):
        tensors = {}
        for expert in range(experts):
            for projection, (rows, _) in shapes.items():
                name = f"model.layers.{layer}.moe.experts.{expert}.{projection}"
                tensors[f"{name}.weight"] = weights[projection].clone()
                tensors[f"{name}.weight_scale"] = torch.rand(rows) + 0.01
        save_file(tensors, folder / f"model-{layer}.safetensors")


def load_tensors(layers: list, folder: Path) -> None:
    """Hand each tensor of `folder` to its parameter's loader."""
    from safetensors import safe_open

    from tests.quantization.quark.utils import parameter_name

    for number, layer in enumerate(layers):
        params = dict(layer.named_parameters())
        with safe_open(folder / f"model-{number}.safetensors", "pt") as file:
            for name in file.keys():  # noqa: SIM118
                *_, expert, projection, kind = name.split(".")
                shard = SHARDS[projection]
                target = parameter_name(shard, kind)
                param, tensor = params[target], file.get_tensor(name)
                param.weight_loader(param, tensor, target, shard_id=shard, expert_id=int(expert))


def load_model(layers: list, folder: Path, experts: int) -> None:
    """The same by Step3p5Model.load_weights."""
    from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator
    from vllm.model_executor.models.step3p5 import Step3p5Model

    from tests.quantization.quark.utils import make_step3p5

    root = make_step3p5(layers, experts)
    files = sorted(map(str, folder.glob("*.safetensors")))
    tensors = safetensors_weights_iterator(files, use_tqdm_on_load=False)
    if len(Step3p5Model.load_weights(root, tensors)) != 4 * len(layers):
        raise RuntimeError("Step3p5Model did not load every parameter")


def load(folder: Path, layers: int, experts: int, hidden: int, width: int, tp: int, by_model: bool) -> float:
    """Seconds that rank 0 of `tp` takes."""
    import torch

    from tests.quantization.quark import utils

    with utils.vllm_environment(), utils.shard(0, tp):
        config = utils.quark_config()
        start = time.perf_counter()
        config.maybe_update_config(str(folder))
        header_seconds = time.perf_counter() - start
        modules = [
            utils.make_experts(
                num_experts=experts,
                top_k=8,
                hidden_size=hidden,
                intermediate_size=width,
                params_dtype=torch.bfloat16,
                renormalize=True,
                quant_config=config,
                prefix=f"model.layers.{layer}.moe.experts",
            )
            for layer in range(layers)
        ]
        for layer in modules:
            for param in layer.parameters():
                param.data.zero_()  # its pages
    # Outside of the environment: its default device makes each of torch's functions slower, and the engine has none
    # while it loads.
    start = time.perf_counter()
    if by_model:
        load_model(modules, folder, experts)
    else:
        load_tensors(modules, folder)
    try:
        from vllm.model_executor.layers.quantization.quark.int8 import finish_experts
    except ImportError:
        pass
    else:
        for layer in modules:
            finish_experts(layer)
    if utils.DEVICE == "cuda":
        torch.cuda.synchronize()
    return header_seconds + time.perf_counter() - start


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--experts", type=int, default=288)
    ap.add_argument("--layers", type=int, default=1)
    ap.add_argument("--hidden", type=int, default=4096)
    ap.add_argument("--width", type=int, default=1280)
    ap.add_argument("--tp", type=int, nargs="+", default=[1, 8])
    ap.add_argument("--runs", type=int, default=3)
    ap.add_argument("--rounds", type=int, default=1, help="loads per process; the first of several does not count")
    ap.add_argument("--model", action="store_true", help="through Step3p5Model.load_weights")
    ap.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = ap.parse_args()
    shape = (args.layers, args.experts, args.hidden, args.width)
    if args.load:
        print("seconds", *(load(args.load, *shape, args.tp[0], args.model) for _ in range(args.rounds)))
        return
    from examples.step3p5_nano.lab import make_pythonpath, shadow

    with tempfile.TemporaryDirectory(prefix="load-time-") as temp:
        folder = Path(temp) / "ckpt"
        folder.mkdir()
        write_checkpoint(folder, *shape)
        size = sum(f.stat().st_size for f in folder.iterdir()) / 1e9
        trees = {"stock": shadow(Path(temp) / "stock", []), "series": shadow(Path(temp) / "series", None)}
        for tp in args.tp:
            durations: dict[str, list[float]] = {name: [] for name in trees}
            for run in range(args.runs + 1):
                for name, tree in trees.items():
                    command = [sys.executable, "-m", "benchmarks.speed.load_layer", "--load", folder, "--tp", str(tp)]
                    options = ("layers", "experts", "hidden", "width", "rounds")
                    for option, number in zip(options, (*shape, args.rounds), strict=True):
                        command += [f"--{option}", str(number)]
                    command += ["--model"] * args.model
                    env = {**os.environ, "PYTHONPATH": make_pythonpath(tree)}
                    result = subprocess.run(
                        [str(c) for c in command], cwd=ROOT, env=env, check=True, capture_output=True, text=True
                    )
                    if run:  # the first warms the page cache
                        rounds = [float(value) for value in result.stdout.split("seconds ")[1].split()]
                        durations[name].append(statistics.median(rounds[1:] or rounds))
            medians = {name: statistics.median(values) for name, values in durations.items()}
            print(
                f"{size:.2f} GB, tensor parallel {tp}:",
                "; ".join(f"{n} {', '.join(f'{v:.3f}' for v in values)} s" for n, values in durations.items()),
                f"; series / stock {medians['series'] / medians['stock']:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
