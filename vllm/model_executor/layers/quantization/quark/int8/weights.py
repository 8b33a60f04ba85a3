# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Parameters of INT8 layers: loaders that fit checkpoint tensors, and checks that all
were loaded.

A parameter's loader is a method of its layer: vLLM's records for reloading know
how to let go of those. It brings scales to the parameter's shape and notes the
shard on the parameter. What was not noted, or still holds the NaN that scales
start as, is refused when the weights are processed.
"""

import inspect
import weakref
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from types import MethodType
from typing import Any, NoReturn

import torch

from vllm import _custom_ops as ops
from vllm.config import get_current_vllm_config
from vllm.distributed.parallel_state import get_ep_group
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.quantization.utils.cpu_int8_product import (
    check_int8_operators,
    onednn_saturates,
)
from vllm.utils.torch_utils import set_default_torch_dtype

from .layers import count_experts, loads_as_vllm, shares_kv_cache

logger = init_logger(__name__)

_AGAIN = "export it again with AMD Quark"
_EXCLUDE = "its layer may be missing from `exclude`, or the checkpoint is incomplete"
_PROJECTIONS = {"w1": "gate_proj (w1)", "w3": "up_proj (w3)", "w2": "down_proj (w2)"}
_INPUTS = ("input_scale", "input_zero_point")
_EXPERTS_INPUTS = [f"{stem}_{kind}" for stem in ("w13", "w2") for kind in _INPUTS]
# A NaN that no arithmetic makes: an element that holds it was never loaded.
_UNFILLED = 0x7FC5_1E57
# A copy into every other half of a GPU's parameter takes a temporary as large.
_CHUNK_BYTES = 256 * 1024 * 1024


def _find_reload(layer: torch.nn.Module) -> Any:
    """What vLLM keeps of a layer that it is reloading, its `kernel_tensors` among it;
    None outside of reloads, and in releases that have none."""
    with suppress(ImportError):
        from vllm.model_executor.model_loader.reload import layerwise

        info = layerwise.LAYERWISE_INFO.get(layer)
        if info is not None and info.kernel_tensors is not None:
            return info
    return None


def _give_weights_back(layer: torch.nn.Module) -> bool:
    """During a reload, give `layer` its old weights: the next reload would begin with
    what this one had brought. Returns whether there is a reload."""
    if info := _find_reload(layer):
        from vllm.model_executor.model_loader.reload import layerwise

        layerwise._place_kernel_tensors(layer, info)
        info.reset()
    return bool(info)


def _refuse(layer: torch.nn.Module, where: str, kind: str, problem: str) -> NoReturn:
    """Raise ValueError. During a reload `layer` has its old weights back first."""
    if _give_weights_back(layer):
        problem += ". Or an earlier reload stopped halfway: reload again"
    raise ValueError(f"{where}: {kind} {problem}")


def _like(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _fit(
    layer: torch.nn.Module,
    where: str,
    kind: str,
    dim: int,
    tensor: torch.Tensor,
    rows: int | None,
    columns: int | None,
) -> torch.Tensor:
    """A checkpoint tensor in the form that vLLM's loader takes.

    rows, columns: of the shard's full weight, rows 1 for one scale per matrix; None:
    not known. Scales [N], [N, 1], [1, N] become [N] or, for a parameter of `dim` 2,
    [N, 1]; one value counts for all rows, where they are known. Raises ValueError for
    another dtype or shape, and for zero points that no kernel takes.
    """
    shape, expected, problem = list(tensor.shape), "", ""
    is_scale = kind.endswith("scale")
    if kind == "weight":
        if tensor.dtype != torch.int8:
            expected = f"int8: {_EXCLUDE}"
        elif rows is not None and len(shape) == 2 and shape != [rows, columns]:
            expected = f"int8 {[rows, columns]}: {_AGAIN}"
    elif tensor.is_floating_point() != is_scale:
        expected = f"{'float32' if is_scale else 'int8'}: {_AGAIN}"
    elif rows is not None and [n for n in shape if n != 1] not in ([], [rows]):
        expected = f"[{rows}]: {_AGAIN}"
    elif not is_scale and not tensor.is_meta:
        # Symmetric kernels have no use for it, so it is judged here.
        if kind == "weight_zero_point" and tensor.any():
            problem = "is not 0, but kernels take symmetric weights only: "
            problem += f"{_AGAIN} with symmetric=True"
        elif tensor.to(torch.int8).ne(tensor).any():
            problem = f"is no int8 value: {_AGAIN}"
    if expected:
        problem = f"is {_like(tensor)}, expected {expected}"
    if problem:
        _refuse(layer, where, kind, problem)
    if kind == "weight" or dim == 1 and shape == [rows]:
        return tensor
    if rows == 1:
        return tensor.reshape(())
    if rows is None:
        return tensor.reshape(-1, *[1] * (dim - 1))
    return tensor.reshape(-1, *[1] * (dim - 1)).expand(rows, *[1] * (dim - 1))


def _empty(param: torch.Tensor) -> None:
    """Fill a scale with the NaN that says it was not loaded."""
    if param.dtype == torch.float32 and not param.is_meta:
        param.data.view(torch.int32).fill_(_UNFILLED)


def _note(param: torch.Tensor, shards: Iterable[Any]) -> None:
    """Note on `param`, before they are copied, the shards that come. A reload
    hands tensors to parameters on meta first, and to new memory after that."""
    if param.is_meta:
        return
    if "int8_shards" not in param.__dict__:
        param.int8_shards = set()
        _empty(param)
    param.int8_shards.update(shards)


def _copy(
    layer: torch.nn.Module,
    load: Callable,
    where: str,
    kind: str,
    param: torch.Tensor,
    *args,
    **kwargs,
) -> Any:
    try:
        return load(param, *args, **kwargs)
    except (AssertionError, RuntimeError, IndexError, TypeError) as e:
        why = f"does not fit parameter {list(param.shape)}: {e or 'wrong shape'}"
        _refuse(layer, where, kind, f"{_like(args[0])} {why}")


def _check_filled(
    layer: torch.nn.Module,
    kind: str,
    param: torch.Tensor,
    shards: Iterable[Any],
    where: Callable,
) -> None:
    """Raise ValueError for one of `shards` that no loader brought."""
    came = param.__dict__.pop("int8_shards", set())
    if missing := [s for s in shards if s not in came]:
        more = f" (and {len(missing) - 1} more)" if missing[1:] else ""
        said = f"is not in the checkpoint{more}: {_EXCLUDE}"
        _refuse(layer, where(missing[0]), kind, said)


def _check_scale(
    layer: torch.nn.Module,
    kind: str,
    scale: torch.Tensor,
    weight: torch.Tensor | None,
    where: Callable,
    any_came: bool,
) -> None:
    """Raise ValueError naming the shard of a scale that was not loaded or is none.

    scale: [..., N] (or a last axis of 1), float32; weight: [..., N, K], whose rows
    may be all zero where the scale is. where: what to call the shard of an index.
    any_came: by loaders; else the values, of dummy weights, are not looked at.
    """
    if not scale.numel():  # of a rank without experts
        return
    low, high = torch.aminmax(scale)
    if low > 0 and torch.isfinite(high):  # neither is NaN
        return
    zero = scale == 0
    if weight is not None and any_came and zero.any():
        zero = zero & weight.ne(0).any(-1).reshape(scale.shape)
    problems = [
        (scale.contiguous().view(torch.int32) == _UNFILLED, "was not loaded"),
        (~torch.isfinite(scale) | (scale < 0), "is {}"),
        (zero, "is {}, but its weight is not 0"),
    ]
    for bad, problem in problems if any_came else problems[:1]:
        if bad.any():
            at = tuple(bad.nonzero()[0].tolist())
            way_out = _EXCLUDE if problem == "was not loaded" else _AGAIN
            problem = problem.format(scale[at].item())
            _refuse(layer, where(at), kind, f"at {list(at)} {problem}: {way_out}")


def _drop(
    param: torch.nn.Parameter,
    loaded_weight: torch.Tensor,
    *args,
    return_success: bool = False,
    **kwargs,
) -> bool | None:
    return True if return_success else None


def _drop_cache_scale(
    param: torch.nn.Parameter, loaded_weight: torch.Tensor, *args, **kwargs
) -> None:
    logger.warning_once(
        "This model has no place for the scales of an FP8 KV cache that lie beside "
        "its projections (output_scale): they are dropped"
    )


def _add_sinks(
    layer: torch.nn.Module, names: Iterable[str], loader: Callable = _drop
) -> None:
    """Empty parameters that take a checkpoint's tensors and drop them."""
    for name in names:
        if hasattr(layer, name):
            delattr(layer, name)
        sink = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        sink.weight_loader = loader
        layer.register_parameter(name, sink)


def _int8_of(layer: torch.nn.Module) -> Any:
    """The `Int8Layers` of the layer's checkpoint; None for a layer without a config."""
    return getattr(getattr(layer, "quant_config", None), "int8", None)


def _any_came(layer: torch.nn.Module) -> bool:
    """Whether loaders brought anything of the layer: dummy weights and those of
    other loaders come in other ways."""
    if int8 := _int8_of(layer):
        int8.check_claims()
    return any("int8_shards" in p.__dict__ for p in layer.parameters(recurse=False))


# Linear layers


def _linear_where(layer: torch.nn.Module, *shards: Any) -> str:
    count = len(layer.logical_widths)
    if not loads_as_vllm(layer):
        names = [str(s) for s in shards if s is not None]
    elif count == 1 or len(shards) == count:
        names = []
    else:
        ids = "qkv" if isinstance(layer, QKVParallelLinear) else range(count)
        names = [str(ids[i]) for i in shards]
    return f"{layer.prefix}: shard {', '.join(names)}" if names else layer.prefix


def _linear_rows(layer: torch.nn.Module, shards: tuple[int, ...]) -> int | None:
    """Rows of the shards' full weight; None: not known."""
    sizes = list(getattr(layer, "output_sizes", None) or [layer.output_size])
    if isinstance(layer, QKVParallelLinear):
        v_size = getattr(layer, "v_head_size", layer.head_size)
        kv = layer.total_num_kv_heads
        sizes = [layer.total_num_heads * layer.head_size]
        sizes += [kv * layer.head_size, kv * v_size]
    return (
        sum(sizes[i] for i in shards)
        if len(sizes) == len(layer.logical_widths)
        else None
    )


def load_linear(
    layer: torch.nn.Module,
    param: torch.nn.Parameter,
    loaded_weight: torch.Tensor,
    *args,
    **kwargs,
) -> Any:
    """`weight_loader` of an INT8 linear layer's parameters. Raises ValueError,
    naming layer and shard, for a tensor that does not fit."""
    kind = next(k for k, p in layer._parameters.items() if p is param)
    shard = args[0] if args else kwargs.get("loaded_shard_id")
    shards, rows = (shard,), None
    if loads_as_vllm(layer):
        shard = "qkv".index(shard) if isinstance(shard, str) else shard
        shard = range(len(layer.logical_widths)) if shard is None else shard
        shards = (shard,) if isinstance(shard, int) else tuple(shard)
        rows = _linear_rows(layer, shards)
    where = _linear_where(layer, *shards)
    if kind in _INPUTS or kind != "weight" and layer.scheme.qscheme == "per_tensor":
        rows = 1
    tensor = _fit(
        layer, where, kind, param.dim(), loaded_weight, rows, layer.input_size
    )
    other_shards = kind in _INPUTS and "int8_shards" in param.__dict__
    if other_shards and param.data.ne(tensor).any():
        problem = f"is {tensor.item()}, but {param.data.item()} in another shard: vLLM "
        problem += "quantizes a fused layer's input once. Set is_dynamic to true and "
        problem += "qscheme to per_channel in the input_tensors of config.json, for "
        _refuse(layer, where, kind, problem + "one scale per token")
    _note(param, shards)
    load = getattr(layer, "weight_loader_v2", layer.weight_loader)
    return _copy(layer, load, where, kind, param, tensor, *args, **kwargs)


def prepare_linear(scheme: Any, layer: torch.nn.Module) -> None:
    """Give a QuarkW8A8Int8 layer activations that its kernel computes, and its
    parameters their loader. Call it at the end of create_weights. Raises
    NotImplementedError, naming the layer, on a CPU without INT8 operators."""
    kernel, was_static = scheme.kernel, scheme.is_static_input_scheme
    name = type(kernel).__name__
    narrow = any(n % 16 for n in layer.weight.shape)
    flaw = ""
    if name == "TritonInt8ScaledMMLinearKernel":
        flaw = "loses zero points in rounding"
    elif name == "CutlassInt8ScaledMMLinearKernel" and narrow:
        flaw = "takes zero points for multiples of 16 rows and columns only"
    if flaw and not scheme.input_symmetric:
        logger.warning_once(
            "INT8 linear layers exported with asymmetric activations are served "
            "with dynamic per-token symmetric ones: %s %s",
            name,
            flaw,
        )
        kernel.config.is_static_input_scheme = scheme.is_static_input_scheme = False
        kernel.config.input_symmetric = scheme.input_symmetric = True
    absent = set(_INPUTS[1:] if scheme.input_symmetric else ())
    int8 = _int8_of(layer)
    is_attention = isinstance(layer, QKVParallelLinear)
    layer.int8_shares_kv_cache = is_attention and shares_kv_cache(layer.prefix)
    if not scheme.is_static_input_scheme:
        absent = set(_INPUTS)
        # None where no tensor comes: some models want all parameters filled.
        came = int8.input_kinds.get(layer.prefix, ()) if int8 else ()
        _add_sinks(layer, _INPUTS if was_static else sorted(came))
    if absent:
        # The kernel finds none of them, and sets none, under names of its own: a
        # reload registers these as parameters again.
        names = [f"no_{n}" if n in absent else n for n in kernel.layer_param_names]
        layer.no_input_scale = layer.no_input_zero_point = None
        kernel = scheme.kernel = type(kernel)(kernel.config, names)
    if int8 and layer.prefix in int8.with_cache_scales:
        # Models that know scales of a KV cache hand them to attention instead.
        _add_sinks(layer, ["output_scale"], _drop_cache_scale)
    if hasattr(kernel, "process_weights_for_onednn"):
        check_int8_operators(layer.prefix)
        kernel.process_weights_after_loading = MethodType(_process_on_cpu, kernel)
    if getattr(layer.weight.weight_loader, "__self__", None) is not layer:
        return
    if not loads_as_vllm(layer) and not layer.weight.is_meta:
        # The model makes rows of padding 0, and no others are.
        layer.weight.data.fill_(torch.iinfo(torch.int8).min)
    for param in layer.parameters(recurse=False):
        if param.weight_loader not in (_drop, _drop_cache_scale):
            _empty(param)
            param.weight_loader = MethodType(load_linear, layer)


def _process_on_cpu(kernel: Any, layer: torch.nn.Module) -> None:
    """The kernel's own processing. Its product for AMX quantizes per token whatever
    the scheme, ends the process over float16, and stops over rows that are no
    multiple of 32; oneDNN's is made for the default dtype, which a reload does not
    set, and reads the scales where they lie. Where it saturates, float32's follows."""
    weight = layer.weight.data
    fits_amx = layer.params_dtype is torch.bfloat16 and weight.size(0) % 32 == 0
    with set_default_torch_dtype(layer.params_dtype):
        if fits_amx and not kernel.config.is_static_input_scheme:
            type(kernel).process_weights_after_loading(kernel, layer)
        else:
            kernel.linear_method = kernel._apply_weights_onednn
            kernel.process_weights_for_onednn(layer)
    if kernel.linear_method == kernel._apply_weights_onednn:
        if onednn_saturates():
            kernel.dnnl_handler = None
            kernel.linear_method = MethodType(_apply_in_float, kernel)
        else:  # oneDNN has its own; LoRA asks for the device
            weight = torch.empty(0, dtype=torch.int8)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    kernel.int8_scales = layer.weight_scale


def _apply_in_float(
    kernel: Any, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """What the kernel's _apply_weights_onednn computes, with multiply_int8. Zero
    points go before the product: after it large sums would have to cancel out."""
    weight, scale, x_scale, x_zero, _ = kernel._get_layer_params(layer)
    x_q, x_scale, x_zero = ops.onednn_scaled_int8_quant(
        x.reshape(-1, x.size(-1)), x_scale, x_zero, kernel.config.input_symmetric
    )
    x_q = x_q.float() if x_zero is None else x_q.float() - x_zero
    out = torch.ops.vllm.multiply_int8(x_q, weight) * scale.flatten() * x_scale
    if bias is not None:
        out += bias
    return out.to(x.dtype).reshape(*x.shape[:-1], weight.size(0))


def finish_linear(scheme: Any, layer: torch.nn.Module) -> None:
    """Check what a QuarkW8A8Int8 layer was given. Call it before the weights are
    processed. Raises ValueError naming the layer and the shard."""
    any_came = _any_came(layer)
    widths = list(layer.logical_widths)
    is_static, symmetric = scheme.is_static_input_scheme, scheme.input_symmetric
    kinds = ["weight", "weight_scale"]
    kinds += _INPUTS[: 1 if symmetric else 2] if is_static else ()
    zero = getattr(layer, "input_zero_point", None)
    if symmetric and "int8_shards" in getattr(zero, "__dict__", ()) and zero.any():
        said = f"is not 0 in a symmetric scheme: {_AGAIN}"
        _refuse(layer, layer.prefix, "input_zero_point", said)
    params = {kind: getattr(layer, kind) for kind in kinds if any_came}
    shards: Collection[Any] = range(len(widths))
    came = {s for p in params.values() for s in getattr(p, "int8_shards", ())}
    if not loads_as_vllm(layer):
        shards = came
    elif layer.int8_shares_kv_cache and came:
        shards = _fill_unused(layer, came)
    for kind, param in params.items():
        if getattr(param.weight_loader, "__func__", None) is load_linear:
            _check_filled(layer, kind, param, shards, lambda i: _linear_where(layer, i))
    scale, weight = layer.weight_scale.data, layer.weight.data
    starts = range(len(widths))
    if scheme.qscheme == "per_tensor":
        parts = [part.ne(0).any() for part in weight.split(widths)]
        weight = torch.stack(parts).unsqueeze(-1)
    else:
        starts = [sum(widths[:i]) for i in starts]

    def shard_at(at: tuple[int, ...]) -> str:
        if not loads_as_vllm(layer):
            return layer.prefix
        return _linear_where(layer, sum(start <= at[0] for start in starts) - 1)

    if not loads_as_vllm(layer):
        _fill_padding(layer, scale, weight, any_came)
    _check_scale(layer, "weight_scale", scale, weight, shard_at, any_came)
    if is_static:
        scale = layer.input_scale.data
        _check_scale(
            layer, "input_scale", scale, None, lambda at: layer.prefix, any_came
        )


def _fill_unused(layer: torch.nn.Module, came: set[int]) -> list[int]:
    """Give k_proj and v_proj that no tensor came for, and that nothing uses, weights
    of 0. came: shards by their place. Returns the places of the others."""
    widths = list(layer.logical_widths)
    used = [i for i in range(len(widths)) if i == 0 or i in came]
    for kind in ("weight", "weight_scale"):
        param = getattr(layer, kind).data
        is_of_rows = len(param) == sum(widths)
        parts = param.split(widths if is_of_rows else 1)
        for i in set(range(len(widths))).difference(used):
            parts[i].fill_(kind == "weight_scale")
    return used


def _fill_padding(
    layer: torch.nn.Module, scale: torch.Tensor, weight: torch.Tensor, any_came: bool
) -> None:
    """Give a scale of 1 to rows of a model's own fused layer that are padding: no
    scale came for them, and the model made their weights 0. A reload finds them by
    the first load, since models do it once; after dummy weights, which fill them, any
    row may be one.

    scale: [N, 1] or [N], float32; weight: [N, K]; for one scale per matrix N counts
    shards. any_came: by loaders, not as dummy weights.
    """
    padding = scale.view(torch.int32).flatten() == _UNFILLED
    if not _find_reload(layer):
        padding &= weight.eq(0).all(-1)
        layer.int8_padding = padding.cpu() if any_came else None
    elif layer.int8_padding is not None:
        padding &= layer.int8_padding.to(scale.device)
    scale.view(-1)[padding] = 1


# Experts


def _experts_where(layer: torch.nn.Module, expert: int | None, shard: str) -> str:
    which = "" if expert is None else f": expert {expert}"
    return f"{layer.layer_name}{which}: {_PROJECTIONS.get(shard, shard)}"


def _kind_of(weight_name: str) -> str:
    """weight, weight_scale or weight_zero_point, of "w13_weight" and the like."""
    return weight_name.rpartition(".")[2].partition("_")[2]


def _w13_shards(layer: torch.nn.Module) -> tuple[str, ...]:
    _, _, gated = layer.int8_shapes["w1"]
    return ("w1", "w3") if gated else ("w1",)


def _local_experts(layer: torch.nn.Module) -> list[int]:
    """This rank's places among all ranks' experts, in the order of its parameters."""
    places = range(len(layer.w2_weight))
    if (expert_map := getattr(layer, "_expert_map", None)) is None:
        return list(places)
    experts = {place: expert for expert, place in enumerate(expert_map.tolist())}
    return [experts.get(place, place) for place in places]


def _places_of(layer: torch.nn.Module, expert: int) -> list[int]:
    """The places, among all ranks', of an expert that load balancing copies and moves.
    At the start the copies come after all experts, from the first one on."""
    count, total = count_experts(layer.moe_config), layer.moe_config.num_experts
    if layer.expert_places is None:  # nothing moved yet
        return list(range(expert, total, count))
    places = layer.expert_places[expert, : total - count + 1].tolist()
    return [place for place in places if place >= 0]


def _expert_at(layer: torch.nn.Module, place: int) -> int:
    """The expert of the checkpoint at a place among all ranks'."""
    if layer.expert_places is not None:
        for expert, _ in layer.expert_places.eq(place).nonzero().tolist():
            return expert
    return place % count_experts(layer.moe_config)


def load_expert(
    layer, param, loaded_weight, weight_name, shard_id, expert_id, return_success=False
) -> bool | None:
    """`weight_loader` of a parameter of INT8 experts, for one tensor of the files.

    weight_name: the parameter's name, such as "w13_weight_scale". shard_id: "w1",
    "w2" or "w3". expert_id: among all ranks' experts. loaded_weight: of this expert,
    or [E, N, K] of all. Returns whether it is one of this rank's, where
    `return_success` asks for that. Raises ValueError, naming layer, expert and
    projection, for a tensor that does not fit.
    """
    if not layer.moe_config.moe_parallel_config.enable_eplb:
        args = param, loaded_weight, weight_name, shard_id, expert_id, return_success
        return _load_place(layer, expert_id, *args)
    if _moves_async(layer) and not _are_moves_stopped(layer):
        _give_weights_back(layer)
        raise ValueError(f"{layer.layer_name}: {_MOVING}")
    count = count_experts(layer.moe_config)
    if loaded_weight.dim() == 3:  # of all experts, or of some from this one on
        first = 0 if len(loaded_weight) == count else expert_id
        parts = list(enumerate(loaded_weight, first))
    else:
        # Some models hand over a copy of its own for the others' places: a reload
        # counts what comes, so it is left out.
        parts = [(expert_id, loaded_weight)] if expert_id < count else []
    took = [
        _load_place(layer, expert, param, part, weight_name, shard_id, place, True)
        for expert, part in parts
        for place in _places_of(layer, expert)
    ]
    return any(took) if return_success else None


def stop_expert_moves(model_runner) -> None:
    """End the moves of INT8 experts that load balancing does asynchronously: they
    would bring old ones after a reload. The worker calls it on every rank, before a
    reload has changed anything; moves begin again with the next rearrangement.

    Raises ValueError with data parallelism, whose ranks do not reload at one step,
    and where the thread that moves them has ended.
    """
    layers = [*filter(_moves_async, model_runner.get_model().modules())]
    if not layers:
        return
    where, state = layers[0].layer_name, model_runner.eplb_state
    if layers[0].moe_config.moe_parallel_config.dp_size > 1:
        raise ValueError(f"{where}: {_MOVING}")
    # Its ranks have to agree, or some would wait for the others' moves for ever.
    thread = state.async_worker
    is_alive = torch.tensor(int(thread is not None and thread.is_alive()))
    group = get_ep_group().cpu_group
    torch.distributed.all_reduce(is_alive, torch.distributed.ReduceOp.MIN, group)
    if not is_alive:
        raise ValueError(
            f"{where}: INT8 experts cannot be reloaded since load balancing's thread "
            "has ended, as the log says: start vLLM anew"
        )
    state.drain_async()
    for layer in layers:
        layer.eplb_state_ref = weakref.ref(state)


_MOVING = (
    "INT8 experts cannot be reloaded while they move asynchronously: start vLLM with "
    "use_async false in eplb_config"
)


def _moves_async(layer: torch.nn.Module) -> bool:
    is_moved = getattr(layer, "expert_places", None) is not None
    return is_moved and getattr(layer, "moves_experts_async", False)


def _are_moves_stopped(layer: torch.nn.Module) -> bool:
    state = layer.eplb_state_ref and layer.eplb_state_ref()
    return bool(state) and not any(m.rebalanced for m in state.model_states.values())


def _load_place(
    layer, expert, param, loaded_weight, weight_name, shard_id, place, return_success
) -> bool | None:
    """The same for one place among all ranks' experts. expert: the checkpoint's."""
    kind = _kind_of(weight_name)
    rows, columns, _ = layer.int8_shapes[shard_id]
    if is_stack := kind == "weight" and loaded_weight.dim() == 3:
        expert = rows = columns = None
    where = _experts_where(layer, expert, shard_id)
    tensor = _fit(layer, where, kind, param.dim() - 1, loaded_weight, rows, columns)
    _note(param, [(None if is_stack else place, shard_id)])
    # Each expert is at its place where all are this rank's.
    all_here = getattr(layer, "_expert_map", "unknown") is None
    if not is_stack and all_here and place < len(param):
        shard = _shard_of(layer, kind, param.data[place], shard_id, tensor)
        if shard:
            shard[0].copy_(shard[1])
            return True if return_success else None
    args = tensor, weight_name, shard_id, place, return_success
    return _copy(layer, layer.weight_loader, where, kind, param, *args)


# As of FusedMoE.weight_loader: some models ask before they hand experts over.
load_expert.supports_moe_loading = True  # type: ignore[attr-defined]


def _shard_of(
    layer: torch.nn.Module,
    kind: str,
    target: torch.Tensor,
    shard_id: str,
    source: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Where a projection goes, and this rank's part of it.

    target: of a parameter, of one expert or [E, ...] of some. source: weights
    [..., N, K] or scales [..., N] of the same experts, over all ranks. None: dtype
    or layout are others, or `target` is on meta, as in a reload.
    """
    rows, columns, gated = layer.int8_shapes[shard_id]
    is_weight = kind == "weight"
    shape = (rows, columns) if is_weight else (rows,)
    rank = target.dim()
    if (
        kind not in ("weight", "weight_scale")
        or target.is_meta
        or source.dtype != target.dtype
        or source.shape != (*target.shape[: rank - len(shape)], *shape)
    ):
        return None
    axis = rank - 1 if shard_id == "w2" or not is_weight else rank - 2
    size = target.shape[axis]
    if gated:
        size //= 2
        target = target.narrow(axis, size if shard_id == "w3" else 0, size)
    if (is_weight or shard_id != "w2") and source.shape[axis] != size:
        tp_rank = layer.moe_config.moe_parallel_config.tp_rank
        source = source.narrow(axis, size * tp_rank, size)
    return target, source


def load_stacked(
    param: torch.nn.Parameter,
    loaded_weight: torch.Tensor,
    weight_name: str,
    shard_id: str,
) -> bool:
    """Copy one projection of all experts at once.

    loaded_weight: [experts, rows, columns] or a per-channel scale [experts, rows]
    or [experts, rows, 1], of all ranks. Returns False, with nothing copied, where
    `param` is no INT8 experts' parameter in real memory with the loader of this
    module, or dtype, shape or the experts' places are others: then load them one
    by one.
    """
    loader = getattr(param, "weight_loader", None)
    # On meta, in a reload, the map of experts may be, too.
    if getattr(loader, "__func__", None) is not load_expert or param.is_meta:
        return False
    layer = loader.__self__  # type: ignore[union-attr]
    if layer.moe_config.moe_parallel_config.enable_eplb:
        return False
    if loaded_weight.dim() > param.dim() and loaded_weight.shape[-1] == 1:
        loaded_weight = loaded_weight.squeeze(-1)
    experts = _local_experts(layer)
    step = experts[1] - experts[0] if len(experts) > 1 else 1
    end = experts[0] + step * len(experts)
    if step < 1 or experts != list(range(experts[0], end, step)):
        return False
    source = loaded_weight[experts[0] : end : step]
    shard = _shard_of(layer, _kind_of(weight_name), param.data, shard_id, source)
    if shard is None:
        return False
    _note(param, [(expert, shard_id) for expert in experts])
    target, source = shard
    bytes_per_expert = max(1, target[0].numel() * target.element_size())
    count = max(1, _CHUNK_BYTES // bytes_per_expert)
    for into, part in zip(target.split(count), source.split(count)):
        into.copy_(part)
    return True


def prepare_experts(layer: torch.nn.Module) -> None:
    """Give INT8 experts' parameters their loader, and take what per-token kernels
    have no use for. Call it at the end of create_weights."""
    _add_sinks(layer, _EXPERTS_INPUTS)
    _, hidden, width = layer.w2_weight.shape
    unpadded = getattr(layer.moe_config, "hidden_dim_unpadded", None) or hidden
    if unpadded != hidden:
        raise ValueError(
            f"{layer.layer_name}: the all2all backend rounds the hidden size "
            f"{unpadded} up to {hidden}, and INT8 experts are not padded: start vLLM "
            "with another --all2all-backend"
        )
    gated = layer.w13_weight.shape[1] == 2 * width
    width *= layer.moe_config.moe_parallel_config.tp_size
    # [experts, copies]: where load balancing has each; None: where they were at first.
    layer.expert_places = None
    eplb_config = get_current_vllm_config().parallel_config.eplb_config
    layer.moves_experts_async = getattr(eplb_config, "use_async", False)
    layer.eplb_state_ref = None  # the state that was seen to move nothing
    # Rows and columns of an expert's projections, over all ranks, and whether two
    # share a parameter.
    layer.int8_shapes = dict.fromkeys(("w1", "w3"), (width, hidden, gated))
    layer.int8_shapes["w2"] = (hidden, width, False)
    loader = layer.w13_weight.weight_loader
    takes_experts = "expert_id" in inspect.signature(loader).parameters
    if getattr(loader, "__self__", None) is not layer or not takes_experts:
        return
    for stem in ("w13", "w2"):
        for kind in ("weight", "weight_scale", "weight_zero_point"):
            param = getattr(layer, f"{stem}_{kind}")
            _empty(param)
            param.weight_loader = MethodType(load_expert, layer)


def finish_experts(layer: torch.nn.Module) -> None:
    """Check what INT8 experts were given. Call it before the weights are
    processed. Raises ValueError naming layer, expert and projection."""

    def place_at(at: tuple[int, str]) -> str:
        return _experts_where(layer, _expert_at(layer, at[0]), at[1])

    any_came = _any_came(layer)
    for name in _EXPERTS_INPUTS:
        # Not deleted: a reload registers it again.
        layer.register_parameter(name, None)
    places = _local_experts(layer)
    for stem, shards in (("w13", _w13_shards(layer)), ("w2", ("w2",))):
        weight = getattr(layer, f"{stem}_weight")
        scale = getattr(layer, f"{stem}_weight_scale")
        expected = [(place, shard) for place in places for shard in shards]
        for kind, param in (("weight", weight), ("weight_scale", scale)):
            came = param.__dict__.get("int8_shards", set())
            came |= {w for w in expected if (None, w[1]) in came}
            if any_came:
                _check_filled(layer, kind, param, expected, place_at)
        rows = weight.shape[1] // len(shards)

        def shard_at(at: tuple[int, ...], shards=shards, rows=rows) -> str:
            return place_at((places[at[0]], shards[at[1] // rows]))

        _check_scale(layer, "weight_scale", scale.data, weight.data, shard_at, any_came)


def keep_scales(layer: torch.nn.Module) -> None:
    """At a reload, put the scales where they were before: the kernel is given them,
    and load balancing moves those that it has known. Call it when they have their
    last form."""
    info = _find_reload(layer)
    before = info.kernel_tensors[0] if info else {}
    for name in ("w13_weight_scale", "w2_weight_scale"):
        scale, old = getattr(layer, name), before.get(name)
        if old is not None and old.shape == scale.shape:
            old.data.copy_(scale.data)
            layer.register_parameter(name, old)
