# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Run `vllm-quark verify` over a checkpoint once for each fault that is planted in the vLLM of this process.

    PYTHONPATH=VLLM python verify_driver.py CKPT FAULT [FAULT ...]

Prints JSON: {fault: [exit code, {layer: [status, error]}]}.
"""

import contextlib
import importlib
import json
import os
import sys
import tempfile
from unittest import mock

import torch

from vllm_quark.cli import app

INT8 = "vllm.model_executor.layers.quantization.quark.int8.weights"
SCHEME = "vllm.model_executor.layers.quantization.quark.schemes.quark_w8a8_int8"
CPU_EXPERTS = "vllm.model_executor.layers.fused_moe.cpu_int8_moe"


def wrap(place: str, change) -> mock._patch:
    """Patch a function at "module:name" with one that calls change(original, *args, **kwargs)."""
    module, _, path = place.partition(":")
    holder, (*outer, name) = importlib.import_module(module), path.split(".")
    for part in outer:
        holder = getattr(holder, part)
    original = getattr(holder, name)

    def changed(*args, **kwargs):
        return change(original, *args, **kwargs)

    changed.__dict__.update(original.__dict__)
    return mock.patch.object(holder, name, changed)


def no_zero_points(make, *args, **kwargs):
    """The kernel of linear layers is told that activations are symmetric."""
    return make(*args, **{**kwargs, "input_symmetric": True})


def one_scale_for_all_tokens(init, experts, layer, scales, biases, input_scales):
    """The kernel of experts is configured for one static input scale where the scheme is per token."""
    init(experts, layer, scales, biases, tuple(torch.full((1,), 0.05, dtype=torch.float32) for _ in input_scales))


def swap_gate_and_up(load, layer, param, loaded_weight, weight_name, shard_id, *args, **kwargs):
    if weight_name.endswith("weight_scale"):
        shard_id = {"w1": "w3", "w3": "w1"}.get(shard_id, shard_id)
    return load(layer, param, loaded_weight, weight_name, shard_id, *args, **kwargs)


def swap_shards(load, layer, param, loaded_weight, *shard, **kwargs):
    """The scales of gate and up change places."""
    if param is getattr(layer, "weight_scale", None) and shard in ((0,), (1,)):
        shard = (1 - shard[0],)
    return load(layer, param, loaded_weight, *shard, **kwargs)


def keep_old_weight(load, layer, param, loaded_weight, weight_name, shard_id, expert_id, *args, **kwargs):
    """One projection of one expert is another's, as if a reload had left it out."""
    if weight_name.endswith("_weight") and shard_id == "w2":
        if expert_id == 0:
            layer.__dict__["old"] = loaded_weight
        elif expert_id == 5:
            loaded_weight = layer.__dict__["old"]
    return load(layer, param, loaded_weight, weight_name, shard_id, expert_id, *args, **kwargs)


def scale_one_row(load, layer, param, loaded_weight, *args, **kwargs):
    """One output channel of 96 has the scale of its neighbour."""
    if param is getattr(layer, "weight_scale", None) and loaded_weight.numel() == 96:
        loaded_weight = loaded_weight.clone()
        loaded_weight[7] = loaded_weight[8]
    return load(layer, param, loaded_weight, *args, **kwargs)


def stop(make, *args, **kwargs):
    raise NotImplementedError("no kernel for this")


FAULTS = {
    "none": lambda: contextlib.nullcontext(),
    "kernel config, linear": lambda: wrap(f"{SCHEME}:init_int8_linear_kernel", no_zero_points),
    "kernel config, experts": lambda: wrap(f"{CPU_EXPERTS}:CPUInt8Experts.__init__", one_scale_for_all_tokens),
    "swapped scales, experts": lambda: wrap(f"{INT8}:load_expert", swap_gate_and_up),
    "swapped scales, linear": lambda: wrap(f"{INT8}:load_linear", swap_shards),
    "stale weight": lambda: wrap(f"{INT8}:load_expert", keep_old_weight),
    "one row": lambda: wrap(f"{INT8}:load_linear", scale_one_row),
    "no kernel": lambda: wrap(f"{SCHEME}:init_int8_linear_kernel", stop),
}


def run(*words: str) -> tuple[int, str]:
    """The command's exit code and stdout, which vLLM wants to be a real file."""
    with tempfile.TemporaryFile("w+") as file:
        sys.stdout.flush()
        stdout = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            app(words)
        except SystemExit as e:
            code = e.code
        finally:
            sys.stdout.flush()
            os.dup2(stdout, 1)
            os.close(stdout)
        file.seek(0)
        return code, file.read()


def main() -> None:
    ckpt, *faults = sys.argv[1:]
    deviations = {}
    for fault in faults:
        with FAULTS[fault]():
            code, output = run("verify", ckpt, "--layers", "all", "--json")
        assert code < 2, code
        rows = json.loads(output)["layers"]
        deviations[fault] = [code, {row["layer"]: [row["status"], row["error"], row["detail"]] for row in rows}]
    print(json.dumps(deviations))


if __name__ == "__main__":
    main()
