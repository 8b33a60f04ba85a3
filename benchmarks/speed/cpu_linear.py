# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""An INT8 linear layer on CPU: the float32 product of processors without VNNI, oneDNN's INT8, and PyTorch's BF16.

    PYTHONPATH=build/shadow .venv/bin/python -m benchmarks.speed.cpu_linear [--rounds 15]

Needs a vLLM with the series first on PYTHONPATH (`vllm-quark shadow -o build/shadow`). Times are medians of rounds in
which the contestants run one after the other on the same input, so compare within a run. oneDNN's product saturates
without VNNI; its time stands there for what stock takes to be wrong.
"""

import argparse
import statistics
import time

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.quantization.utils.cpu_int8_product import multiply_int8, onednn_saturates

SHAPES = ((4096, 4096), (28672, 8192))
ROWS = (1, 8, 64, 512)


def contestants(weight: torch.Tensor) -> dict:
    """Functions of quantized rows [M, K] int8, by name."""
    scale, x_scale = torch.ones(weight.size(0)), torch.ones(1, 1)
    handler = ops.create_onednn_scaled_mm(weight.t(), scale, torch.float32, True, False, 32)
    bf16 = weight.bfloat16()

    def multiply_onednn(x: torch.Tensor, scale: torch.Tensor = scale) -> torch.Tensor:  # oneDNN reads it in place
        out = torch.empty(x.size(0), weight.size(0))
        rows = x_scale.expand(x.size(0), 1).contiguous()
        torch.ops._C.onednn_scaled_mm(out, x, rows, None, None, None, handler.handler_tensor)
        return out

    return {
        "float32": lambda x: multiply_int8(x, weight),
        "oneDNN INT8": multiply_onednn,
        "BF16": lambda x: torch.nn.functional.linear(x.bfloat16(), bf16),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, oneDNN saturates: {onednn_saturates()}")
    for n, k in SHAPES:
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        sides = contestants(weight)
        for rows in ROWS:
            x = torch.randint(-127, 128, (rows, k), dtype=torch.int8)
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            for multiply in sides.values():
                multiply(x)
            for _ in range(rounds):
                for name, multiply in sides.items():
                    begin = time.perf_counter()
                    multiply(x)
                    seconds[name].append(time.perf_counter() - begin)
            middle = {name: statistics.median(took) for name, took in seconds.items()}
            others = ", ".join(
                f"{name} / float32 {middle[name] / middle['float32']:.2f}" for name in sides if name != "float32"
            )
            print(f"N={n} K={k}, {rows} rows: float32 {1e3 * middle['float32']:.2f} ms, {others}", flush=True)


if __name__ == "__main__":
    main()
