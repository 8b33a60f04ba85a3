# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The scheme of each layer of vLLM in an INT8 checkpoint of AMD Quark.

vLLM fuses projections and experts. A layer's parts are looked up one by one, by
their names in the checkpoint; a layer whose parts cannot be served as one, or
whose scheme has no kernel, is refused by name.
"""

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import regex as re
import torch

from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import (
    LinearBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from .names import Names, both_prefixes
from .scheme import Int8Scheme, has_int8, is_int8

logger = init_logger(__name__)

# The projections of an expert, gate, up and down, by the names models use.
_EXPERT_PROJECTIONS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("gate_up_proj", "gate_up_proj", "down_proj"),
    ("input_linear", "input_linear", "output_linear"),
)
_PARALLEL = ("Column", "MergedColumn", "QKV", "Row")
_LINEAR = [getattr(linear, f"{kind}ParallelLinear") for kind in _PARALLEL]
_LINEAR.append(linear.ReplicatedLinear)
# The shards of fused layers, for models that do not say them.
_SHARDS = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
_BLOCK = re.compile(r"(.*?\.layers\.(\d+))\.")
_TOWER = re.compile("vision|visual|audio")
# A list of layers, by the first number in a name.
_STACK = re.compile(r"(.*?)\.\d+\.")
_ROUTER = re.compile(
    r"(.*?\.layers\.\d+)\.(?:.*\.)?(gate|router|router\.layer|wg|shared_expert_gate)"
)
_UNQUANTIZED = (
    "{}.weight is int8, but vLLM builds this layer unquantized: add it to `exclude` "
    "and export it unquantized"
)
Parts = dict[str, "Int8Scheme | dict[str, Any] | None"]


def _describe(scheme: Any) -> str:
    if scheme is None:
        return "not quantized"
    if isinstance(scheme, Int8Scheme):
        return f"INT8 with {scheme}"
    return f"quantized with {scheme.get('weight')}"


def loads_as_vllm(layer: torch.nn.Module) -> bool:
    """Whether a linear layer has the loaders of vLLM's own ones. A model's own fused
    layers have shards of other names, on all ranks, or as padding: what they take is
    for them to say."""
    names, kind = ("weight_loader", "weight_loader_v2"), type(layer)
    return any(
        all(getattr(kind, n, None) is getattr(own, n, None) for n in names)
        for own in _LINEAR
    )


def shares_kv_cache(layer_name: str) -> bool:
    """Whether a layer is one of those that take the keys and values of an earlier
    one, as Gemma 3n's and Gemma 4's last layers do: their own k_proj and v_proj, which
    vLLM builds and never uses, may be in no file."""
    model_config = get_current_vllm_config().model_config
    hf_config = getattr(model_config, "hf_text_config", None)
    count = getattr(hf_config, "num_hidden_layers", None) or 0
    shared = getattr(hf_config, "num_kv_shared_layers", None) or 0
    name_match = _BLOCK.match(layer_name)
    if not name_match or _TOWER.search(layer_name):
        return False
    return count - shared <= int(name_match[2]) < count


def count_experts(moe_config: Any) -> int:
    """Experts of the checkpoint, over all ranks: load balancing has copies of some."""
    return getattr(moe_config, "num_logical_experts", moe_config.num_experts)


def make_unquantized_method() -> UnquantizedLinearMethod:
    """The method of a linear layer that a checkpoint holds unquantized among INT8 ones,
    which sees that tensors come for it: vLLM does not look in quantized models. Its
    class is vLLM's own, since some models ask for that."""
    method = UnquantizedLinearMethod()
    create, process = method.create_weights, method.process_weights_after_loading
    rows: list[int] = []

    def create_weights(
        layer, input_size_per_partition, output_partition_sizes, *args, **kwargs
    ) -> None:
        sizes = output_partition_sizes
        create(layer, input_size_per_partition, sizes, *args, **kwargs)
        # The first rows of its shards, as far as they are used.
        ends = itertools.accumulate(sizes)
        rows.extend(end - n for end, n in zip(ends, sizes) if n)
        if isinstance(layer, QKVParallelLinear) and shares_kv_cache(layer.prefix):
            del rows[1:]
        if not layer.weight.is_meta:
            layer.weight.data[rows, :1] = torch.nan

    def process_weights_after_loading(layer) -> None:
        """Raises ValueError naming the layer where no loader wrote a shard of it."""
        # On CPU the kernel's own form has one axis.
        is_loaded = loads_as_vllm(layer) and layer.weight.dim() == 2
        if is_loaded and layer.weight.data[rows, :1].isnan().any():
            raise ValueError(
                f"{layer.prefix}: weight is not in the checkpoint, or is NaN: the "
                "checkpoint is incomplete: copy or export it again"
            )
        process(layer)

    method.create_weights = create_weights
    method.process_weights_after_loading = process_weights_after_loading
    return method


class Int8Layers:
    """The layers of one checkpoint with INT8 weights, by its `quantization_config`."""

    def __init__(self, quant_config: dict[str, Any]) -> None:
        self.names = Names(quant_config)
        # By vLLM's name, what `served_config` answers.
        self._served: dict[str, dict[str, Any]] = {}
        # Names of lists of layers that hold INT8 ones.
        self._int8_stacks: set[str] = set()
        self._unclaimed: set[str] = set()
        self._stacks: set[str] | None = None
        self._unquantized: set[str] = set()
        # Modules by the name of a router, and their decoder layers.
        self._routers: dict[str, str] = {}
        self._lacks_head = False
        self._cache_scales: set[str] = set()
        # Layers beside whose weight the files have scales of a KV cache.
        self.with_cache_scales: set[str] = set()
        # Scales and zero points of inputs by the module that has them in the files, and
        # by vLLM's layer.
        self._input_kinds: dict[str, set[str]] = defaultdict(set)
        self.input_kinds: dict[str, set[str]] = defaultdict(set)
        self._unlisted: list[str] = []
        # Decoder layers that vLLM built, by the checkpoint's names, those of them whose
        # linear layers it built since the last look, and the last one.
        self._built: set[str] = set()
        self._blocks: set[str] = set()
        self._block = ""
        self._warned: set[str] = set()
        # The first layer of experts that load balancing moves, and whether it is INT8.
        self._balanced: tuple[str, bool] | None = None

    def expect(self, contents: Any) -> None:
        """Take what the checkpoint's files hold (`checkpoint.Contents`, or None)."""
        if contents is not None:
            self.names.expect(contents.modules)
            self._unclaimed = set(contents.int8_modules())
            self._int8_stacks = {
                m[1] for name in self._unclaimed if (m := _STACK.match(name))
            }
            matches = {m: _ROUTER.fullmatch(m) for m in self._unclaimed}
            self._routers = {
                module: match[1] for module, match in matches.items() if match
            }
            self._lacks_head = contents.lacks_head()
            self._stacks = set(contents.stacks())
            self._unquantized = set(contents.unquantized())
            self._cache_scales = set(contents.with_kind("output_scale"))
            self._input_kinds.clear()
            for kind in ("input_scale", "input_zero_point"):
                for module in contents.with_kind(kind):
                    self._input_kinds[module].add(kind)
            self._unlisted.clear()
            self._built.clear()
            self._blocks.clear()
            self._balanced = None
            # Not every model hands its lm_head a config, which would say it there.
            for module in self._unclaimed:
                if module.rpartition(".")[2] == "lm_head":
                    raise ValueError(_UNQUANTIZED.format(module))

    def _scheme_of(
        self, module: str, names: Collection[str], among: Collection[str] | None = None
    ) -> Int8Scheme | dict[str, Any] | None:
        """The scheme of one module: INT8, another layer config, or none.

        None, too, for what the config calls INT8 and the files hold unquantized:
        Quark does not list what it cannot quantize. Raises ValueError, naming the
        module, where no kernel runs it.
        """
        config = self.names.config_of(names, among)
        if is_int8(config) and not self._unquantized.isdisjoint(names):
            self._unlisted.append(module)
            return None
        if config is not None and not config.get("weight"):
            raise ValueError(
                f"{module}: its input is quantized, its weight is not: export it "
                "again with AMD Quark as W8A8"
            )
        return Int8Scheme.parse(config, module) if is_int8(config) else config

    def _as_one(self, layer_name: str, parts: Parts, experts: bool) -> Any:
        """The scheme that serves all `parts` (by name) of a layer."""
        (first, exported), *_ = parts.items()
        serve = Int8Scheme.for_experts if experts else Int8Scheme.for_linear
        schemes = [serve(s) if isinstance(s, Int8Scheme) else s for s in parts.values()]
        if all(isinstance(s, Int8Scheme) for s in schemes):
            # One scale per matrix can be spread over its rows.
            per_channel = any(s.per_channel for s in schemes)
            schemes = [replace(s, per_channel=per_channel) for s in schemes]
        for name, scheme in zip(parts, schemes):
            if scheme != schemes[0]:
                raise ValueError(
                    f"{layer_name}: {first} is {_describe(exported)}, but "
                    f"{name} is {_describe(parts[name])}: vLLM runs them as one layer. "
                    "Export them alike (`exclude`, `layer_quant_config`)"
                )
        served = schemes[0]
        if isinstance(served, Int8Scheme) and served.inputs() != exported.inputs():
            layers = "experts" if experts else "linear layers"
            message = (
                f"INT8 {layers} exported with {exported.inputs()} activations are "
            )
            message += f"served with {served.inputs()} ones"
            if message not in self._warned:
                self._warned.add(message)
                logger.warning(message)
        return served

    def linear(self, layer_name: str, shards: list[str] | None) -> Any:
        """The scheme of a linear layer made of `shards`; None: not quantized."""
        own = self.names.of(layer_name)
        stem = layer_name.rpartition(".")[0]
        shards = [f"{stem}.{s}" if stem else s for s in shards or ()]
        parts = {s: self.names.of(s) for s in shards} or {layer_name: own}
        taken = (own, *parts.values())
        in_files = (self._unclaimed, self._unquantized)
        if self.names.lists(own) or any(not n.isdisjoint(own) for n in in_files):
            parts = {layer_name: own}
        schemes = {p: self._scheme_of(p, names) for p, names in parts.items()}
        scheme = self._as_one(layer_name, schemes, experts=False)
        # Experts do not count: the Transformers backend builds all of them first.
        self._blocks |= self._claim(layer_name, taken, scheme)
        if any(not self._cache_scales.isdisjoint(names) for names in taken):
            self.with_cache_scales.add(layer_name)
        for name in {n for names in taken for n in names} & self._input_kinds.keys():
            self.input_kinds[layer_name] |= self._input_kinds[name]
        return scheme

    def _is_among_int8(self, layer_name: str) -> bool:
        """Whether the files have INT8 layers of the same stack: those of a tower that
        is not used may be in no file."""
        matches = map(_STACK.match, self.names.of(layer_name))
        return any(m and m[1] in self._int8_stacks for m in matches)

    def _find_present(
        self, layer_name: str, shards: list[str] | None
    ) -> list[str] | None:
        """Those of `shards` that the files have; all of them where none is known."""
        stem = layer_name.rpartition(".")[0]
        present = [
            s
            for s in shards or ()
            if not self.names.in_files.isdisjoint(self.names.of(f"{stem}.{s}"))
        ]
        return present or shards

    def experts(
        self, layer_name: str, count: int, projections: tuple[str, ...] | None
    ) -> Any:
        """The scheme that all experts of a layer share; None: not quantized.

        count: number of experts, over all ranks. projections: the checkpoint's
        names of gate, up and down, as many as there are, where known.
        """
        own = self.names.of(layer_name)
        best = (-1, -1)
        touched: list[str] = []
        parts: dict[str, tuple[str, ...]] = {}
        for family in dict.fromkeys(filter(None, (projections, *_EXPERT_PROJECTIONS))):
            # One tensor for all experts is named beside or below the layer.
            stacks = {
                proj: {f"{at}.{proj}" for n in own for at in (n, n.rpartition(".")[0])}
                for proj in family
            }
            if self._stacks is not None:
                stacks = {
                    proj: {*both_prefixes(s & self._stacks)}
                    for proj, s in stacks.items()
                }
            names = {
                f"{layer_name}.{e}.{proj}": (
                    *own,
                    *stacks[proj],
                    *(f"{n}.{e}.{proj}" for n in own),
                )
                for e in range(count)
                for proj in stacks
            }
            every = {n for each in names.values() for n in each}
            mentioned = self.names.touching(every)
            in_files = sum(len(every & n) for n in (self._unclaimed, self._unquantized))
            if (in_files, len(mentioned)) > best:
                best, touched, parts = (in_files, len(mentioned)), mentioned, names
        schemes = {p: self._scheme_of(p, n, touched) for p, n in parts.items()}
        scheme = self._as_one(layer_name, schemes, experts=True)
        self._claim(layer_name, parts.values(), scheme)
        return scheme

    def _claim(
        self, layer_name: str, parts: Iterable[Collection[str]], scheme: Any
    ) -> set[str]:
        """Note that a layer of vLLM takes these modules of the checkpoint, and return
        the decoder layers that they are of.

        Raises ValueError where it is not quantized and they are, in the files.
        """
        names = {name for part in parts for name in part}
        blocks = {m[1] for name in names if (m := _BLOCK.match(name))}
        self._built |= blocks
        taken = self._unclaimed & names
        self._unclaimed -= taken
        if scheme is None and taken:
            raise ValueError(
                f"{min(taken)}.weight is int8, but {layer_name} is in `exclude`: "
                "restore config.json from the export"
            )
        return blocks

    def _check_routers(self, blocks: Collection[str]) -> None:
        """Raise ValueError for a router that is INT8 in the files, in one of these
        decoder layers, where no quantized layer of vLLM takes it: models build
        routers without asking the config."""
        for module, block in self._routers.items():
            if block in blocks and module in self._unclaimed:
                raise ValueError(_UNQUANTIZED.format(module))
        self._blocks.clear()

    def check_claims(self) -> None:
        """Raise ValueError for what the files have and the model did not take. Call
        it when the model stands."""
        self._check_routers(self._built)
        self._built.clear()
        if self._unlisted:
            logger.warning(
                "%d modules are not quantized in the checkpoint's files, and not in "
                "`exclude`: served unquantized (the first is %s)",
                len(self._unlisted),
                self._unlisted[0],
            )
            self._unlisted.clear()

    def _check_balanced(self, layer_name: str, scheme: Any) -> None:
        """Raise ValueError where experts that load balancing (EPLB) moves are INT8 in
        some layers only: it copies each layer's by way of the first one's buffers."""
        model_config = get_current_vllm_config().model_config
        hf_config = getattr(model_config, "hf_text_config", None)
        count = getattr(hf_config, "num_hidden_layers", None)
        name_match = _BLOCK.match(layer_name)
        if count and name_match and int(name_match[2]) >= count:
            return  # of a draft, which is balanced by itself
        is_ours = isinstance(scheme, Int8Scheme)
        first, is_first_ours = self._balanced = self._balanced or (layer_name, is_ours)
        if is_ours != is_first_ours:
            names = (first, layer_name) if is_first_ours else (layer_name, first)
            raise ValueError(
                "{} is INT8 and {} is not, and EPLB moves the experts of all layers "
                "alike: start vLLM without --enable-eplb, or export them alike "
                "(`exclude`, `layer_quant_config`)".format(*names)
            )

    def select_method(
        self, config: Any, layer: torch.nn.Module, layer_name: str
    ) -> QuantizeMethodBase | None:
        """The method of a layer that the checkpoint keeps in high precision.

        None: the layer is quantized (`served_config` has how), or has no weights
        that Quark quantizes. Raises ValueError naming the layer where its parts
        disagree or no kernel runs its scheme.
        """
        block = name_match[1] if (name_match := _BLOCK.match(layer_name)) else ""
        if block != self._block:
            # Before its tensors come: loaders stop at a router's scale.
            self._check_routers(self._blocks)
            self._block = block
        if isinstance(layer, VocabParallelEmbedding):
            for module in self._unclaimed.intersection(self.names.of(layer_name)):
                raise ValueError(_UNQUANTIZED.format(module))
            if not isinstance(layer, ParallelLMHead):
                # Older releases take one in `exclude` for a linear layer.
                return UnquantizedEmbeddingMethod()
            model_config = get_current_vllm_config().model_config
            # vLLM drops the output layer of models that are served for pooling.
            is_pooling = getattr(model_config, "runner_type", None) == "pooling"
            if self._lacks_head and not is_pooling:
                raise ValueError(
                    f"{layer_name} is not in the checkpoint, and config.json says that "
                    "it is not the embedding (tie_word_embeddings): the checkpoint is "
                    "incomplete: copy or export it again"
                )
        if moe_config := getattr(layer, "moe_config", None):
            kinds = ("gate", "up", "down")
            names = (getattr(layer, f"ckpt_{k}_proj_name", None) for k in kinds)
            # Experts without gates have two, in releases without these names, too.
            projections = tuple(filter(None, names)) or None
            if not projections and not getattr(moe_config, "is_act_and_mul", True):
                projections = ("up_proj", "down_proj")
            scheme = self.experts(layer_name, count_experts(moe_config), projections)
            if moe_config.moe_parallel_config.enable_eplb:
                self._check_balanced(layer_name, scheme)
        elif isinstance(layer, LinearBase):
            name = layer_name.rpartition(".")[2]
            shards = config.packed_modules_mapping.get(name)
            usual = _SHARDS.get(name, [])
            if shards is None and len(getattr(layer, "output_sizes", [])) == len(usual):
                shards = usual
            if isinstance(layer, QKVParallelLinear) and shares_kv_cache(layer_name):
                shards = self._find_present(layer_name, shards)
            scheme = self.linear(layer_name, shards)
        else:
            return None
        if scheme is None and moe_config:
            return UnquantizedFusedMoEMethod(moe_config)
        if scheme is None and self._is_among_int8(layer_name):
            return make_unquantized_method()
        if scheme is None:
            return UnquantizedLinearMethod()
        is_ours = isinstance(scheme, Int8Scheme)
        self._served[layer_name] = scheme.to_config() if is_ours else scheme
        return None

    def served_config(self, layer_name: str) -> dict[str, Any] | None:
        """The layer config of a layer that `select_method` looked up; of another
        name (asked for before the layer is made) what the config says."""
        if layer_name in self._served:
            return self._served[layer_name]
        return self.names.config_of(self.names.of(layer_name))


def int8_layers(quant_config: Any) -> Int8Layers | None:
    """The layers of a `quantization_config`; None where it has no INT8 weights."""
    return Int8Layers(quant_config) if has_int8(quant_config) else None
