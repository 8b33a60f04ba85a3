# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether an INT8 checkpoint of AMD Quark fills its layers, and with what.

Layers watch what their parameters' loaders are given: the shape and dtype of
each tensor, and, before the weights are processed, that every shard and expert
has come and that scales and zero points are sound. Around the whole checkpoint
`watched_weights` does the same for what is not quantized.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any

import torch

from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear
from vllm.model_executor.layers.quantization.quark.int8_config import int8_layers
from vllm.model_executor.layers.quantization.quark.int8_serving import (
    quantize_per_token,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

logger = init_logger(__name__)

# These fill parameters without the parameters' loaders.
_OTHER_LOADERS = ("dummy", "sharded_state", "runai_streamer_sharded", "tensorizer")
# NaNs that no arithmetic makes: what still holds one was never loaded.
_SENTINELS = {
    torch.float32: (torch.int32, 0x7FC5_1E57),
    torch.bfloat16: (torch.int16, 0x7FD7),
    torch.float16: (torch.int16, 0x7E57),
}
_EXCLUDE = "its layer may be missing from `exclude`, or the checkpoint is incomplete"
_PROJECTIONS = {"w1": "gate_proj (w1)", "w3": "up_proj (w3)", "w2": "down_proj (w2)"}


def _fill_sentinel(param: torch.Tensor) -> None:
    kind, bits = _SENTINELS[param.dtype]
    param.data.view(kind).fill_(bits)


def _unfilled(param: torch.Tensor) -> torch.Tensor:
    """Which elements of a parameter still hold the sentinel."""
    kind, bits = _SENTINELS[param.dtype]
    return param.data.contiguous().view(kind) == bits


def _loads_tensors() -> bool:
    return get_current_vllm_config().load_config.load_format not in _OTHER_LOADERS


def _like(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


class _Watch:
    """What the loaders of one layer's parameters were given.

    Subclasses say what a shard is called and which shape it has in full.
    """

    def __init__(self, layer: torch.nn.Module, name: str) -> None:
        self.name = name
        self.seen: dict[str, dict[Any, torch.Tensor | None]] = {}
        self.loaders: dict[str, Callable] = {}

    def where(self, shard: Any) -> str:
        raise NotImplementedError

    def shard(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def shape(self, kind: str, shard: Any) -> list[int] | None:
        """Full shape of a shard's weight, rows of its scale; None: not known."""
        raise NotImplementedError

    def refuse(self, shard: Any, kind: str, problem: str) -> None:
        raise ValueError(f"{self.where(shard)}: {kind} {problem}")

    def _fitting(self, kind: str, shard: Any, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` in the form the layer's loader takes; raises ValueError."""
        expected = self.shape(kind, shard)
        if kind == "weight":
            if tensor.dtype != torch.int8:
                self.refuse(
                    shard, kind, f"is {_like(tensor)}, expected int8: {_EXCLUDE}"
                )
            if expected is not None and list(tensor.shape) != expected:
                self.refuse(
                    shard,
                    kind,
                    f"is {_like(tensor)}, expected int8 {expected}: export it again",
                )
            return tensor
        is_scale = kind.endswith("scale")
        if tensor.is_floating_point() != is_scale or tensor.is_complex():
            self.refuse(
                shard,
                kind,
                f"is {_like(tensor)}, expected "
                f"{'float32' if is_scale else 'int8'}: export it again",
            )
        rows = 1 if expected is None else expected[0]
        flat = max(tensor.shape, default=1) == tensor.numel()
        if expected is not None and not (flat and tensor.numel() in (1, rows)):
            self.refuse(
                shard,
                kind,
                f"is {_like(tensor)}, expected [{rows}]: export it again",
            )
        if not is_scale:
            # Symmetric kernels have no use for it, so it is judged here.
            values = tensor.to(torch.int64)
            if kind == "weight_zero_point" and values.ne(0).any():
                self.refuse(
                    shard,
                    kind,
                    "is not 0, but kernels take symmetric weights only: export it "
                    "again with symmetric=True",
                )
            if ((values < -128) | (values > 127)).any():
                self.refuse(shard, kind, "is no int8 value: export it again")
        return tensor

    def watch(self, kind: str, param: torch.nn.Parameter, loader: Callable) -> None:
        @wraps(loader)
        def load(
            param: torch.nn.Parameter, loaded_weight: torch.Tensor, *args, **kwargs
        ):
            shard = self.shard(args, kwargs)
            tensor = self._fitting(kind, shard, loaded_weight)
            try:
                result = loader(param, tensor, *args, **kwargs)
            except (AssertionError, RuntimeError, IndexError, TypeError) as e:
                raise ValueError(
                    f"{self.where(shard)}: {kind} {_like(loaded_weight)} does not fit "
                    f"parameter {list(param.shape)}: {e or 'wrong shape'}"
                ) from e
            if result is not False:
                self._note(kind, shard, tensor)
            return result

        # load_stacked_experts hands over all experts of a projection
        load.on_stacked = lambda tensor, proj: self._note(kind, (None, proj), tensor)
        self.loaders[kind] = load
        param.weight_loader = load

    def _note(self, kind: str, shard: Any, tensor: torch.Tensor) -> None:
        # Values of single-valued inputs are kept: later shards overwrite them.
        kept = tensor if kind.startswith("input") else None
        self.seen.setdefault(kind, {})[shard] = kept

    def came(self, kind: str, param: torch.nn.Parameter, shards: Iterable) -> None:
        """Raise ValueError naming a shard of `kind` that was not loaded."""
        if getattr(param, "weight_loader", None) is not self.loaders[kind]:
            return  # a model's own loader took over
        missing = [s for s in shards if s not in self.seen.get(kind, {})]
        if missing:
            more = f" (and {len(missing) - 1} more)" if missing[1:] else ""
            self.refuse(missing[0], kind, f"is not in the checkpoint{more}: {_EXCLUDE}")

    def sound(
        self,
        kind: str,
        scale: torch.Tensor,
        shard_of: Callable[[tuple[int, ...]], Any],
        weight: torch.Tensor | None,
    ) -> None:
        """Raise ValueError naming the shard of a scale that is no scale.

        scale: [..., N] (or a last axis of 1); weight: [..., N, K], whose rows may
        be all zero where the scale is.
        """

        def refuse_any(bad: torch.Tensor, problem: str) -> None:
            if bad.any():
                at = tuple(bad.nonzero()[0].tolist())
                problem = problem.format(scale[at].item())
                self.refuse(shard_of(at), kind, f"at {list(at)} {problem}")

        refuse_any(_unfilled(scale), f"was not loaded: {_EXCLUDE}")
        refuse_any(
            ~torch.isfinite(scale) | (scale < 0), "is {}: export it again with Quark"
        )
        zero = scale == 0
        if weight is not None and zero.any():
            zero = zero & weight.ne(0).any(-1).reshape(scale.shape)
        refuse_any(zero, "is {}, but its weight is not 0: export it again with Quark")


class _LinearWatch(_Watch):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__(layer, layer.prefix)
        self.is_qkv = isinstance(layer, QKVParallelLinear)
        self.count = len(layer.logical_widths)
        self.in_size = layer.input_size
        if self.is_qkv:
            kv = layer.total_num_kv_heads
            v_size = getattr(layer, "v_head_size", layer.head_size)
            self.sizes = [
                layer.total_num_heads * layer.head_size,
                kv * layer.head_size,
                kv * v_size,
            ]
        else:
            sizes = getattr(layer, "output_sizes", None) or [layer.output_size]
            self.sizes = list(sizes)
        self.per_tensor = layer.scheme.qscheme == "per_tensor"

    def where(self, shard: Any) -> str:
        if self.count == 1 or shard is None:
            return self.name
        names = "qkv" if self.is_qkv else range(self.count)
        return f"{self.name}: shard {', '.join(str(names[i]) for i in shard)}"

    def shard(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        shard = args[0] if args else kwargs.get("loaded_shard_id")
        if isinstance(shard, str):
            shard = "qkv".index(shard)
        if isinstance(shard, int):
            shard = (shard,)
        return tuple(shard) if shard is not None else tuple(range(self.count))

    def shape(self, kind: str, shard: Any) -> list[int] | None:
        if len(self.sizes) != self.count:
            return None
        rows = sum(self.sizes[i] for i in shard)
        if kind == "weight":
            return [rows, self.in_size]
        return [1] if kind.startswith("input") or self.per_tensor else [rows]

    def _fitting(self, kind: str, shard: Any, tensor: torch.Tensor) -> torch.Tensor:
        tensor = super()._fitting(kind, shard, tensor)
        expected = self.shape(kind, shard)
        if kind == "weight" or expected is None:
            return tensor
        if expected == [1]:
            return tensor.reshape(())
        # [N], [N, 1], [1, N]; one value counts for all channels
        return tensor.reshape(-1).expand(expected)

    def _note(self, kind: str, shard: Any, tensor: torch.Tensor) -> None:
        for i in shard:
            super()._note(kind, i, tensor)

    def refuse(self, shard: Any, kind: str, problem: str) -> None:
        super().refuse((shard,) if isinstance(shard, int) else shard, kind, problem)


class _ExpertsWatch(_Watch):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__(layer, layer.layer_name)
        self.layer = layer
        local, rows, width = layer.w2_weight.shape
        self.local = local
        self.rows = rows
        self.width = width * layer.moe_config.moe_parallel_config.tp_size
        gated = layer.w13_weight.shape[1] == 2 * width
        self.in_w13 = ("w1", "w3") if gated else ("w1",)

    def _global(self, expert: int) -> int:
        expert_map = getattr(self.layer, "_expert_map", None)
        if expert_map is None:
            return expert
        found = (expert_map == expert).nonzero()
        return int(found[0]) if len(found) else expert

    def where(self, shard: Any) -> str:
        expert, proj = shard
        which = self.name if expert is None else f"{self.name}: expert {expert}"
        return f"{which}: {_PROJECTIONS.get(proj, proj)}"

    def shard(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        # positions as in FusedMoE.weight_loader: weight_name, shard_id, expert_id
        proj = kwargs.get("shard_id", args[1] if len(args) > 1 else None)
        return kwargs.get("expert_id", args[2] if len(args) > 2 else None), proj

    def shape(self, kind: str, shard: Any) -> list[int] | None:
        expert, proj = shard
        if expert is None or proj not in _PROJECTIONS:
            return None
        rows, width = self.rows, self.width
        if kind == "weight":
            return [rows, width] if proj == "w2" else [width, rows]
        return [rows] if proj == "w2" else [width]

    def _note(self, kind: str, shard: Any, tensor: torch.Tensor) -> None:
        expert, proj = shard
        experts = [expert]
        if expert is None:
            experts = [self._global(e) for e in range(self.local)]
        for e in experts:
            super()._note(kind, (e, proj), tensor)


def watch_linear(layer: torch.nn.Module) -> None:
    """Watch the parameters of a QuarkW8A8Int8 layer. Call it at the end of
    create_weights."""
    if not _loads_tensors():
        return
    watch = _LinearWatch(layer)
    for kind in (
        "weight",
        "weight_scale",
        "weight_zero_point",
        "input_scale",
        "input_zero_point",
    ):
        param = getattr(layer, kind, None)
        if param is None:
            continue
        if param.dtype in _SENTINELS:
            _fill_sentinel(param)
        elif kind != "weight":
            param.data.zero_()
        watch.watch(kind, param, param.weight_loader)
    layer.int8_watch = watch


def check_linear(scheme: Any, layer: torch.nn.Module) -> None:
    """Check what a QuarkW8A8Int8 layer was given. Call it before the weights are
    processed.

    Shards of one layer whose static input scales or zero points differ have no
    common grid: the layer then quantizes per token.

    Raises ValueError naming the layer and the shard.
    """
    watch = layer.__dict__.pop("int8_watch", None)
    if watch is None:
        return
    shards = range(watch.count)
    watch.came("weight", layer.weight, shards)
    watch.came("weight_scale", layer.weight_scale, shards)
    scale = layer.weight_scale.data
    bounds = torch.tensor(layer.logical_widths).cumsum(0)

    def shard_of(at: tuple[int, ...]) -> int:
        if watch.per_tensor:
            return at[0]
        return int(
            torch.searchsorted(bounds, at[0], right=True).clamp(max=watch.count - 1)
        )

    if watch.per_tensor:
        parts = layer.weight.data.split(list(layer.logical_widths))
        weight = torch.stack([p.ne(0).any() for p in parts]).unsqueeze(-1)
    else:
        weight = layer.weight.data
    watch.sound("weight_scale", scale, shard_of, weight)
    if scheme.is_static_input_scheme:
        watch.came("input_scale", layer.input_scale, shards)
        watch.sound("input_scale", layer.input_scale.data, lambda at: 0, None)
        given = watch.seen
        if not scheme.input_symmetric:
            watch.came("input_zero_point", layer.input_zero_point, shards)
        elif any(z.ne(0).any() for z in given.get("input_zero_point", {}).values()):
            watch.refuse(
                0, "input_zero_point", "is not 0 in a symmetric scheme: export again"
            )
        different = False
        for kind in ("input_scale", "input_zero_point"):
            values = [v.reshape(()) for v in given.get(kind, {}).values()]
            for value in values if kind == "input_scale" else ():
                if not (torch.isfinite(value) and value > 0):
                    watch.refuse(0, kind, f"is {value.item()}: export again")
            different |= any(v != values[0] for v in values)
        if different:
            logger.warning_once(
                "Static input scales differ between the shards of fused INT8 layers "
                "(%s first): these layers are served with dynamic per-token ones",
                layer.prefix,
            )
            quantize_per_token(scheme, layer)


def watch_experts(layer: torch.nn.Module) -> None:
    """Watch the parameters of INT8 experts. Call it at the end of
    create_weights."""
    if not _loads_tensors():
        return
    watches: dict[str, _ExpertsWatch] = {}
    for stem in ("w13", "w2"):
        for kind in ("weight", "weight_scale", "weight_zero_point"):
            param = getattr(layer, f"{stem}_{kind}", None)
            if param is None:
                continue
            if param.dtype in _SENTINELS:
                _fill_sentinel(param)
            part = watches.setdefault(stem, _ExpertsWatch(layer))
            part.watch(kind, param, param.weight_loader)
    layer.int8_watch = watches


def check_experts(layer: torch.nn.Module) -> None:
    """Check what INT8 experts were given. Call it before the weights are
    processed.

    Raises ValueError naming the layer, the expert and the projection.
    """
    watches = layer.__dict__.pop("int8_watch", None)
    if watches is None:
        return
    for stem, watch in watches.items():
        shards = watch.in_w13 if stem == "w13" else ("w2",)
        wanted = [(watch._global(e), s) for e in range(watch.local) for s in shards]
        weight = getattr(layer, f"{stem}_weight")
        watch.came("weight", weight, wanted)
        scale = getattr(layer, f"{stem}_weight_scale")
        watch.came("weight_scale", scale, wanted)
        rows = weight.shape[1] // len(shards)

        def shard_of(at: tuple[int, ...], shards=shards, rows=rows, watch=watch) -> Any:
            return watch._global(at[0]), shards[at[1] // rows]

        watch.sound("weight_scale", scale.data, shard_of, weight.data)


def _padded(moe_config: Any) -> bool:
    """Whether a backend made experts larger than the checkpoint's."""
    pairs = (
        ("hidden_dim", "hidden_dim_unpadded"),
        (
            "intermediate_size_per_partition",
            "intermediate_size_per_partition_unpadded",
        ),
    )
    return any(
        getattr(moe_config, own, None) is not None
        and getattr(moe_config, own) != getattr(moe_config, padded)
        for padded, own in pairs
    )


def _unwatched(
    model: torch.nn.Module,
) -> Iterator[tuple[str, torch.nn.Parameter, bool]]:
    """Parameters of layers that are not quantized, and whether the checkpoint
    fills all of them."""
    for name, module in model.named_modules():
        is_experts = hasattr(module, "w13_weight")
        if is_experts or isinstance(module, (LinearBase, VocabParallelEmbedding)):
            whole = not (is_experts and _padded(module.moe_config))
            for kind, param in module.named_parameters(recurse=False):
                if kind.endswith(("weight", "bias")) and param.dtype in _SENTINELS:
                    yield f"{name}.{kind}", param, whole


def watched_weights(
    weights: Iterable[tuple[str, torch.Tensor]],
    model: torch.nn.Module,
    model_config: Any,
) -> tuple[Iterator[tuple[str, torch.Tensor]], Callable[[set[str] | None], None]]:
    """The checkpoint's tensors, looked at on their way into `model`, and a check
    to call with what model.load_weights returns.

    Raises ValueError, naming tensor or parameter, for: INT8 weights without a
    scale, in an excluded layer, or in a checkpoint whose config names no
    quantization; names that come twice; parameters outside INT8 layers that get
    no tensor or one of integers. Entries of the config that match nothing are
    warned about. Other checkpoints pass unchanged.
    """
    layers = None
    if model_config.quantization == "quark":
        layers = int8_layers(get_current_vllm_config().quant_config)
    if layers is None and model_config.quantization is not None:
        return iter(weights), lambda loaded: None
    names: set[str] = set()
    int8: set[str] = set()
    plain: dict[str, torch.nn.Parameter] = {}
    guarded: list[tuple[torch.nn.Parameter, Any]] = []

    def guard(name: str, param: torch.nn.Parameter) -> None:
        loader = getattr(param, "weight_loader", None)
        if loader is None:
            return

        @wraps(loader)
        def load(param: torch.nn.Parameter, loaded_weight: torch.Tensor, *args, **kw):
            if not loaded_weight.is_floating_point():
                raise ValueError(
                    f"{name}: the checkpoint has {_like(loaded_weight)} for a layer "
                    "that is not quantized: the export's tensors and its config "
                    "(`exclude`) disagree, export it again"
                )
            return loader(param, loaded_weight, *args, **kw)

        load.on_stacked = lambda tensor, proj: None  # of the parameter's dtype
        guarded.append((param, loader))
        param.weight_loader = load

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            if tensor.dtype == torch.int8 and name.endswith(".weight"):
                module = name.removesuffix(".weight")
                if layers is None:
                    raise ValueError(
                        f"{name} is int8, but config.json names no quantization: "
                        "restore its quantization_config from the export"
                    )
                if layers.excludes(module):
                    raise ValueError(
                        f"{name} is int8, but {module} is in `exclude`: restore "
                        "config.json from the export"
                    )
                int8.add(name)
            if layers is not None and name in names:
                raise ValueError(
                    f"{name} is in the checkpoint twice: keep the files of one export"
                )
            names.add(name)
            yield name, tensor

    def check(loaded: set[str] | None) -> None:
        for param, loader in guarded:
            param.weight_loader = loader
        if layers is None:
            return
        for name in int8:
            if f"{name}_scale" not in names:
                raise ValueError(
                    f"{name} is int8, but the checkpoint has no {name}_scale: the "
                    "checkpoint is incomplete, or no INT8 layer"
                )
        for name, param in plain.items():
            if _unfilled(param).any():
                raise ValueError(
                    f"{name} is not in the checkpoint, wholly or in part: the "
                    "checkpoint is incomplete"
                )
        if loaded is not None:
            for name, module in model.named_modules():
                if getattr(module, "quant_method", None) is not None:
                    continue
                for kind, _ in module.named_parameters(recurse=False):
                    full = f"{name}.{kind}" if name else kind
                    if full not in loaded and not kind.endswith("_scale"):
                        raise ValueError(
                            f"{full} is not in the checkpoint: the checkpoint is "
                            "incomplete"
                        )
        modules = {n.rpartition(".")[0] for n in names}
        for entry in layers.unmatched(modules):
            logger.warning(
                "%r in the Quark config matches no layer of the checkpoint: mistyped?",
                entry,
            )

    if layers is not None and _loads_tensors():
        known: set[int] = set()
        for name, param, whole in _unwatched(model):
            if id(param) in known:
                continue  # tied weights
            known.add(id(param))
            if whole:
                plain[name] = param
                _fill_sentinel(param)
            guard(name, param)
    return watched(), check
