# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Load a stacked checkpoint tensor of all experts at once, not expert by expert."""

import inspect

import torch

# A copy into every other half of a GPU's parameter takes a temporary as large.
_CHUNK_BYTES = 256 * 1024 * 1024
# A class that overrides them may place or fill experts in another way.
_LOADERS = ("FusedMoE.weight_loader", "RoutedExperts.weight_loader")
_OTHER_LAYOUTS = (
    "is_transposed",
    "use_bitsandbytes_4bit",
    "is_gguf_weight",
    "is_gguf_weight_type",
)


def _local(layer: torch.nn.Module, experts: int, local: int) -> slice | None:
    """Which of all `experts` this rank's `local` ones are, in their order."""
    places = [layer._map_global_expert_id_to_local_expert_id(e) for e in range(experts)]
    here = [expert for expert, place in enumerate(places) if place >= 0]
    if [places[expert] for expert in here] != list(range(local)) or not here:
        return None
    step = here[1] - here[0] if local > 1 else 1
    found = range(here[0], here[-1] + 1, step)
    return slice(found.start, found.stop, step) if list(found) == here else None


def _target(
    param: torch.nn.Parameter, shard_id: str, per_channel: bool, tp_size: int
) -> tuple[torch.Tensor, int] | None:
    """Where a projection lies in `param`, and the axis that tensor parallelism
    cuts it along (-1: none)."""
    data = param.data
    if shard_id == "w2":
        return data, -1 if per_channel or tp_size == 1 else 2
    if data.shape[1] % 2:
        return None
    half = data.shape[1] // 2
    return data.narrow(1, 0 if shard_id == "w1" else half, half), 1


def load_stacked_experts(
    param: torch.nn.Parameter,
    loaded_weight: torch.Tensor,
    weight_name: str,
    shard_id: str,
) -> bool:
    """Copy one projection of this rank's experts into their parameter.

    param: weight [E, rows, columns], or per-channel scale [E, rows] or
    [E, rows, 1], of the module that `param.weight_loader` belongs to; gate (w1)
    above up (w3) in w13. loaded_weight: the projection of all experts, not
    sharded, [experts, rows, columns] or [experts, rows(, 1)]. weight_name: the
    parameter's. shard_id: w1, w2 or w3.

    Returns False, with nothing copied, for any other layout, dtype, loader or
    placement of experts: then load expert by expert. A wrapper around the loader
    that has to see what is loaded says so with an attribute `on_stacked`, called
    with the tensor and shard_id; around other wrappers nothing is copied.
    """
    loader = getattr(param, "weight_loader", None)
    on_stacked = getattr(loader, "on_stacked", None)
    if loader is None or (on_stacked is None and hasattr(loader, "__wrapped__")):
        return False
    loader = inspect.unwrap(loader)
    layer = getattr(loader, "__self__", None)
    moe_config = getattr(layer, "moe_config", None)
    if getattr(loader, "__qualname__", "") not in _LOADERS or moe_config is None:
        return False
    if not getattr(moe_config, "is_act_and_mul", True):
        return False
    if any(getattr(param, name, False) for name in _OTHER_LAYOUTS):
        return False
    kind = getattr(param, "quant_method", None)
    per_channel = weight_name.endswith("_weight_scale") and kind == "channel"
    is_weight = weight_name.endswith("_weight") and kind is None
    if (
        not (is_weight or per_channel)
        or shard_id not in ("w1", "w2", "w3")
        or param.dtype != loaded_weight.dtype
        or param.dim() not in ((3,) if is_weight else (2, 3))
        or loaded_weight.dim() not in ((3,) if is_weight else (2, 3))
    ):
        return False
    parallel = moe_config.moe_parallel_config
    target = _target(param, shard_id, per_channel, parallel.tp_size)
    if target is None:
        return False
    data, axis = target
    if per_channel:
        if loaded_weight.dim() == 3 and loaded_weight.shape[2] != 1:
            return False
        loaded_weight = loaded_weight.reshape(*loaded_weight.shape[:2])
        data = data.squeeze(-1) if data.dim() == 3 else data
    full = list(data.shape[1:])
    if axis > 0:
        full[axis - 1] *= parallel.tp_size
    if data.dim() != loaded_weight.dim() or list(loaded_weight.shape[1:]) != full:
        return False
    local = _local(layer, loaded_weight.shape[0], param.shape[0])
    if local is None:
        return False
    if on_stacked is not None:
        on_stacked(loaded_weight, shard_id)
    source = loaded_weight[local]
    if axis > 0:
        size = data.shape[axis]
        source = source.narrow(axis, size * parallel.tp_rank, size)
    if data.is_contiguous():
        data.copy_(source)
        return True
    each = max(1, _CHUNK_BYTES // max(1, data[0].numel() * data.element_size()))
    for into, part in zip(data.split(each), source.split(each)):
        into.copy_(part)
    return True
