# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""One layer of a checkpoint on vLLM's own classes, in any release: built, loaded by its parameters' loaders, run."""

import contextlib
import copy
import inspect
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vllm_quark.patches import QuarkError
from vllm_quark.verify.emulate import Numbers
from vllm_quark.verify.layers import EXPERTS, PARTS, Layer

TOP_K = 8
SHARDS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1}


class Builder:
    """Builds layers of one checkpoint, in `environment`."""

    def __init__(self, vllm_config: Any, device: str, dtype: torch.dtype) -> None:
        self.vllm_config = vllm_config
        self.device = device
        self.dtype = dtype
        self.quant_config: Any = None
        self._mapper: Any = None

    def read_config(self, folder: str, config: dict[str, Any], quant_config: dict[str, Any]) -> None:
        """Make vLLM's config of the checkpoint's, with the mappings of its model's class, as vLLM does when it serves.

        Raises ValueError where this vLLM refuses the checkpoint.
        """
        from vllm.model_executor.layers.quantization import get_quantization_config

        # vLLM takes it in any case.
        method = quant_config["quant_method"].lower()
        self.quant_config = get_quantization_config(method).from_config(copy.deepcopy(quant_config))
        model = _find_model((config.get("architectures") or [""])[0])
        self._mapper = getattr(model, "hf_to_vllm_mapper", None)
        for name in ("get_rename_mapper", "get_unstacked_mapper"):
            if hasattr(self._mapper, name):
                self._mapper = getattr(self._mapper, name)()
                break
        if self._mapper is not None:
            self.quant_config.apply_vllm_mapper(self._mapper)
        mapping = getattr(model, "packed_modules_mapping", None) if model else {k: list(v) for k, v in PARTS.items()}
        self.quant_config.packed_modules_mapping = mapping or {}
        self.quant_config.maybe_update_config(folder)
        self.vllm_config.quant_config = self.quant_config

    def build(self, layer: Layer, numbers: Numbers) -> Any:
        """The layer, loaded and processed. Raises what vLLM raises."""
        with torch.device(self.device):
            module = self._make_experts(layer) if layer.kind == "experts" else self._make_linear(layer, numbers)
            load = _load_experts if layer.kind == "experts" else _load_linear
            load(module, layer, numbers)
            module.quant_method.process_weights_after_loading(module)
        return module

    def name_of(self, layer: Layer) -> str:
        """What vLLM calls the layer."""
        return (self._mapper._map_name(layer.name) if self._mapper else None) or layer.name

    def _make_linear(self, layer: Layer, numbers: Numbers) -> Any:
        from vllm.model_executor.layers import linear

        rows = [numbers.rows(part) for part in range(len(layer.parts))]
        settings = {
            "bias": "bias" in numbers.kinds(0),
            "quant_config": self.quant_config,
            "prefix": self.name_of(layer),
            "params_dtype": self.dtype,
        }
        columns = layer.shape[1]
        if layer.kind == "linear":
            return linear.ReplicatedLinear(columns, rows[0], **settings)
        if layer.kind == "qkv_proj" and rows[1] == rows[2]:
            head = math.gcd(rows[0], rows[1])
            return linear.QKVParallelLinear(columns, head, rows[0] // head, rows[1] // head, **settings)
        return linear.MergedColumnParallelLinear(columns, rows, **settings)

    def _make_experts(self, layer: Layer) -> Any:
        from vllm.model_executor.layers import fused_moe

        make_layer = getattr(fused_moe, "FusedMoEFactory", None) or fused_moe.FusedMoE
        experts, width, hidden = layer.shape
        module = make_layer(
            num_experts=experts,
            top_k=min(TOP_K, experts),
            hidden_size=hidden,
            intermediate_size=width,
            params_dtype=self.dtype,
            renormalize=True,
            quant_config=self.quant_config,
            prefix=self.name_of(layer),
            activation=layer.activation,
        )
        return getattr(module, "routed_experts", module)

    def run(self, module: Any, x: torch.Tensor, routes: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """x [T, K] through a layer -> [T, N]; routes: weights and ids [T, top_k] of experts."""
        if not hasattr(module, "moe_config"):
            out: torch.Tensor = module(x)[0]
            return out
        for ensure in ("ensure_moe_quant_config_init", "_ensure_moe_quant_config_init"):
            if hasattr(module, ensure):
                getattr(module, ensure)()
        apply = module.quant_method.apply
        extra_arguments = len(inspect.signature(apply).parameters) - 4
        out = apply(module, x.clone(), *routes, *[None] * extra_arguments)
        return out

    def forget(self, layer: Layer) -> None:
        """Let go of what vLLM keeps of a layer beside itself."""
        names = self.vllm_config.compilation_config.static_forward_context
        for name in [n for n in names if n.startswith(self.name_of(layer))]:
            del names[name]


def _find_model(architecture: str) -> Any:
    """The class of a model; None: this vLLM has none of that name, or cannot import it."""
    from vllm.model_executor.models.registry import ModelRegistry

    try:
        return ModelRegistry.models[architecture].load_model_cls()
    except (KeyError, ImportError):
        return None


def _load_linear(module: Any, layer: Layer, numbers: Numbers) -> None:
    params: dict[str, Any] = dict(module.named_parameters())
    for part, (name,) in enumerate(layer.parts):
        for kind in numbers.kinds(part):
            if kind in params:
                shard = () if layer.kind == "linear" else (SHARDS[name.rpartition(".")[2]],)
                if layer.kind == "qkv_proj" and not hasattr(module, "num_heads"):
                    shard = (part,)
                params[kind].weight_loader(params[kind], numbers.get(part, kind), *shard)


def _load_experts(module: Any, layer: Layer, numbers: Numbers) -> None:
    params: dict[str, Any] = dict(module.named_parameters())
    for part, shard in enumerate(EXPERTS[1]):
        for expert in range(layer.shape[0]):
            for kind in numbers.kinds(part, expert):
                name = f"{'w2' if shard == 'w2' else 'w13'}_{kind}"
                if name in params:
                    tensor = numbers.get(part, kind, expert)
                    params[name].weight_loader(params[name], tensor, name, shard_id=shard, expert_id=expert)


def name_kernel(module: Any) -> str:
    """What runs a layer, by the names of vLLM's classes."""
    method = module.quant_method
    scheme = getattr(module, "scheme", None)
    for candidate in (getattr(scheme, "kernel", None), getattr(method, "cpu_experts", None), scheme):
        if candidate is not None:
            return type(candidate).__name__
    experts = getattr(method, "experts_cls", None)
    return str(experts.__name__) if experts is not None else type(method).__name__


@contextlib.contextmanager
def environment(dtype: torch.dtype) -> Iterator[Builder]:
    """One process as a worker of vLLM's: groups, default config, dtype, device. Raises QuarkError without vLLM."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is the report's
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment
        from vllm.distributed.parallel_state import initialize_model_parallel
        from vllm.platforms import current_platform
    except ImportError as e:
        raise QuarkError(f"this Python has no vLLM that can be imported ({e}): run it in vLLM's environment") from e
    device = current_platform.device_type
    if not device:
        raise QuarkError("vLLM finds no device on this machine: run where it serves")
    handle, store = tempfile.mkstemp()
    os.close(handle)
    config, old_dtype = VllmConfig(), torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        # The store takes its file along, in some releases.
        stack.callback(Path(store).unlink, missing_ok=True)
        stack.enter_context(set_current_vllm_config(config))
        stack.callback(cleanup_dist_env_and_memory)
        init_distributed_environment(
            world_size=1,
            rank=0,
            distributed_init_method=f"file://{store}",
            local_rank=0,
            backend=getattr(current_platform, "dist_backend", None) or "gloo",
        )
        initialize_model_parallel(1, 1)
        stack.callback(torch.set_default_dtype, old_dtype)
        torch.set_default_dtype(dtype)
        with contextlib.suppress(ImportError):
            from vllm.v1.worker import workspace

            # Fused kernels of experts take their buffers there.
            workspace.init_workspace_manager(torch.device(device))
            stack.callback(workspace.reset_workspace_manager)
        stack.enter_context(torch.no_grad())
        yield Builder(config, device, dtype)
