# SPDX-License-Identifier: Apache-2.0
"""vLLM's kernels for INT8 experts side by side, through Quark's method: Triton and Humming (from 0.27 on).

    PYTHONPATH=SITE python -m benchmarks.speed.gpu_backends OUT.json [--backends triton,humming] [--counts 1 64 4096]

One layer at `--shape` (as gpu_tune's, without the dtype), the same numbers for each kernel; microseconds of CUDA-graph
replays, interleaved, and the error against float64 over four tokens. A kernel that does not run is told of.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.speed.gpu_layer import EXPERTS, WIDTH, Graph, Layer, Shape, time_together

COUNTS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def make_layer(backend: str, numbers: Layer, config):
    """Quark's experts with the weights of `numbers` on `backend`."""
    import torch

    from tests.quantization.quark.utils import make_experts, quark_config

    config.kernel_config.moe_backend = backend
    shape = numbers.shape
    layer = make_experts(
        num_experts=shape.E,
        top_k=shape.top_k,
        hidden_size=shape.hidden,
        intermediate_size=shape.N,
        params_dtype=torch.bfloat16,
        renormalize=True,
        quant_config=quark_config(),
        prefix=f"model.layers.0.{backend}.experts",
    )
    for stem, weight, scale in zip(("w13", "w2"), (numbers.w1, numbers.w2), numbers.scales, strict=True):
        getattr(layer, f"{stem}_weight").data.copy_(weight)
        getattr(layer, f"{stem}_weight_scale").data.copy_(scale.view(shape.E, -1))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backends", default="triton,humming")
    parser.add_argument("--counts", type=int, nargs="*", default=COUNTS)
    parser.add_argument("--shape", default=f"{EXPERTS}:{WIDTH}")
    args = parser.parse_args()
    import torch
    import triton
    import vllm
    from vllm.forward_context import set_forward_context

    from tests.quantization.quark.utils import apply_experts, vllm_environment

    versions = {"vllm": vllm.__version__, "torch": torch.__version__, "triton": triton.__version__}
    results: dict = {"device": torch.cuda.get_device_name(), "versions": versions, "rows": []}
    numbers = Layer(Shape.parse(f"int8:{args.shape}"))
    results["shape"] = str(numbers.shape)
    with vllm_environment() as config, set_forward_context(None, config):
        layers = {}
        for backend in args.backends.split(","):
            try:
                layers[backend] = make_layer(backend, numbers, config)
            except Exception as error:
                results[f"{backend} failed"] = f"{type(error).__name__}: {error}"[:500]
                print(backend, results[f"{backend} failed"], flush=True)
        for tokens in args.counts:
            inputs = numbers.mixed_inputs(tokens)
            exact = numbers.reference(inputs[1], min(4, tokens))
            row: dict = {"tokens": tokens, "us": {}, "error": {}}
            graphs = {}
            for backend, layer in layers.items():
                try:
                    out = apply_experts(layer, *inputs[1])[:4].double()
                    row["error"][backend] = float((out - exact).norm() / exact.norm())
                    graphs[backend] = Graph(lambda x, a=layer: apply_experts(a, *x), inputs)
                except Exception as error:
                    row["error"][backend] = f"{type(error).__name__}: {error}"[:200]
            row["us"] = {name: round(us, 2) for name, us in time_together(graphs, rounds=6).items()}
            results["rows"].append(row)
            print(json.dumps(row), flush=True)
            args.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
