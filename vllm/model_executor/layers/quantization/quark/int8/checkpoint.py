# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Comparison of the files of a Quark INT8 checkpoint with its config. It uses the
checkpoint's own names and the headers of its safetensors files. It reads no weight,
builds no layer and imports nothing of vLLM.
"""

import itertools
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import regex as re

from .names import Names, both_prefixes
from .scheme import is_int8

_INDEX = "model.safetensors.index.json"
# Where vLLM takes names of models for another hub's.
_MODELSCOPE = os.environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# As ShardedStateLoader names its files.
_SHARDED = re.compile(r"-(rank|tp)-\d+-part-\d+\.")
_UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    RecursionError,
)
_FLOATS = ("F64", "F32", "F16", "BF16")
# What may lie beside the INT8 weight of a layer. Scales of a KV cache and of
# attention among them; a router that is INT8 is refused as such, not for its bias.
_may_lie_beside = lru_cache(
    re.compile(
        r"weight|bias|e_score_correction_bias|(weight|input)_(scale|zero_point)|(k|v|q|kv|output)_(scale|zero_point)"
    ).fullmatch
)
_OF_QUANTIZATION = re.compile(r"(weight|input)_(scale|zero_point)")
_GPT_OSS = re.compile(r"(.*\.mlp)\.experts(?:\.\d+)?\.gate_up_proj")
_BLOCK = re.compile(r"((?:.*?\.)?layers)\.(\d+)\.(.*)")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.+)")
_NUMBER = re.compile(r"\.experts\.\d+\.")
_KEYS_AND_VALUES = re.compile(r"(^|\.)[kv]_(proj|norm)\.")
# What models call the number of experts of a layer.
_EXPERT_COUNTS = (
    "num_experts",
    "moe_num_experts",
    "n_routed_experts",
    "num_local_experts",
)
_RESTORE = "restore config.json from the export"
_WITHOUT = "export it without that (a rotation has to be merged into the weights)"
_FAKE = 'export it again with AMD Quark and weight_format="real_quantized"'
_RENAME = (
    "rename *_quantizer.scale to *_scale and *_quantizer.zero_point to *_zero_point "
    "in the files"
)
_NO_GROUPS = (
    "no kernel takes groups of INT8 weights: export it again with AMD Quark "
    "per_channel (ch_axis=0) or per_tensor"
)
_INCOMPLETE = "the checkpoint is incomplete: copy or export it again"


class CheckpointError(ValueError):
    """A file that cannot be read as part of a checkpoint."""


class Entry(NamedTuple):
    """A tensor by its header: dtype as safetensors spells it (I8, BF16, F32)."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Problem:
    """Why a checkpoint does not say what its layers are."""

    tensor: str
    file: str
    reason: str
    way_out: str

    @classmethod
    def of(cls, entry: Entry, reason: str, way_out: str) -> "Problem":
        return cls(entry.name, entry.file, reason, way_out)

    def __str__(self) -> str:
        return f"{self.tensor} {self.reason}: {self.way_out}"


def find_files(folder: str) -> list[str]:
    """The safetensors files that vLLM loads from `folder`, sorted: those that the
    index names, else all.

    Raises CheckpointError for an index that cannot be read, and for a sharded state.
    """
    names = {n for n in os.listdir(folder) if n.endswith(".safetensors")}
    index = os.path.join(folder, _INDEX)
    if os.path.isfile(index):
        try:
            with open(index, encoding="utf-8") as f:
                listed = set(json.load(f)["weight_map"].values())
            gone = sorted(listed - names)
        except _UNREADABLE as e:
            raise CheckpointError(f"{index}: is no index ({e}): {_INCOMPLETE}") from e
        if len(gone) == len(listed):
            return []  # a config and an index alone, for dummy weights
        if gone:
            path = os.path.join(folder, gone[0])
            raise CheckpointError(f"{path}: is missing, but in {_INDEX}: {_INCOMPLETE}")
        names = listed
    paths = sorted(os.path.join(folder, name) for name in names)
    if sharded := next(filter(_SHARDED.search, paths), None):
        raise CheckpointError(
            f"{sharded}: is a sharded state, which holds INT8 layers as kernels do and "
            "cannot be loaded back: load the checkpoint that it was saved from"
        )
    return paths


def read_header(path: str) -> Iterator[Entry]:
    """The tensors of a safetensors file.

    Raises CheckpointError, naming the file, where it is cut short or is none.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("no header")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        data = 8 + length
        for name, info in header.items():
            start, stop = info["data_offsets"]
            if data + stop > size:
                raise ValueError("it is cut short")
            yield Entry(name, path, info["dtype"], tuple(info["shape"]), data + start)
    except _UNREADABLE as e:
        why = f"is no whole safetensors file ({e}): {_INCOMPLETE}"
        raise CheckpointError(f"{path}: {why}") from e


class Contents:
    """The tensors of a checkpoint by module and kind: `weight`, `weight_scale`, …"""

    def __init__(
        self, entries: Iterable[Entry], config: Any = None, in_use: Any = None
    ) -> None:
        """config: of config.json. in_use: the config as vLLM uses it, with what the
        user overrides. None: not known."""
        config = config if isinstance(config, dict) else {}
        text_config = (in_use or config).get("text_config")
        of_text = text_config if isinstance(text_config, dict) else in_use or config
        # The model has an output layer of its own, by its config.
        is_tied = bool(in_use) and in_use.get("tie_word_embeddings") is True
        self.has_own_head = _has_own_head(config) and not is_tied
        # Decoder layers, and experts of one with the key that says so; None: not said.
        self.layer_count = _count_layers(of_text)
        self.expert_count = _count_experts(of_text)
        # Each layer has a config of its own: some may be empty.
        self.is_heterogeneous = bool(of_text.get("block_configs"))
        # The first of the layers that take the keys and values of others.
        shared = of_text.get("num_kv_shared_layers") or 0
        self.first_sharing = (self.layer_count or 0) - shared if shared else None
        self.modules: dict[str, dict[str, Entry]] = defaultdict(dict)
        self.twice: list[tuple[Entry, Entry]] = []
        for entry in entries:
            module, _, kind = entry.name.rpartition(".")
            first = self.modules[module].setdefault(kind, entry)
            if first is not entry:
                self.twice.append((entry, first))

    def lacks_head(self) -> bool:
        """Whether the embedding is the only matrix outside of the decoder layers, and
        not the output layer."""
        outer = [m for m, w in self.weights() if ".layers." not in m]
        matrices = [m for m in outer if len(self.modules[m]["weight"].shape) == 2]
        is_alone = len(matrices) == 1 and "embed" in matrices[0]
        return self.has_own_head and is_alone

    def weights(self) -> Iterator[tuple[str, Entry]]:
        """Each module that has a weight, and that."""
        weights = (
            (module, kinds.get("weight")) for module, kinds in self.modules.items()
        )
        return ((module, weight) for module, weight in weights if weight is not None)

    def with_kind(self, kind: str) -> list[str]:
        """Modules that have a tensor of this kind."""
        return [module for module, kinds in self.modules.items() if kind in kinds]

    def int8_modules(self) -> list[str]:
        """Modules whose weight is INT8."""
        return [module for module, weight in self.weights() if weight.dtype == "I8"]

    def tensors(self) -> Iterator[tuple[str, Entry]]:
        """Weights by their module, and experts' stacks of models that have them as
        parameters by their own name."""
        yield from self.weights()
        for kinds in self.modules.values():
            for kind, entry in kinds.items():
                if kind != "weight" and len(entry.shape) == 3:
                    yield entry.name, entry

    def stacks(self) -> list[str]:
        """Modules whose weight is one tensor [E, N, K] for all experts."""
        return [module for module, w in self.tensors() if len(w.shape) == 3]

    def unquantized(self) -> list[str]:
        """Modules whose weight is of floats, with no scale beside it."""
        return [
            module
            for module, w in self.tensors()
            if w.dtype in _FLOATS and "weight_scale" not in self.modules.get(module, ())
        ]


def find_problems(contents: Contents, names: Names) -> Iterator[Problem]:
    """Tensors that fit no INT8 layer, and tensors that vLLM would ignore.

    Layers that are not INT8 in the files are the model's business: a router may
    well be BF16 and not listed in `exclude`.
    """
    for entry, first in contents.twice:
        files = " and ".join(os.path.basename(e.file) for e in (first, entry))
        reason = f"is in the checkpoint twice, in {files}"
        yield Problem.of(entry, reason, "keep the files of one export")
    for module, kinds in contents.modules.items():
        weight, scale = kinds.get("weight"), kinds.get("weight_scale")
        if weight is None and scale is not None:
            yield Problem.of(scale, f"has no {module}.weight", _INCOMPLETE)
        if weight is None:
            continue
        is_float = weight.dtype in _FLOATS and scale is not None
        if is_float and is_int8(names.config_of(both_prefixes([module]))):
            reason = f"is {weight.dtype}, with a weight_scale beside it"
            yield Problem.of(weight, reason, _FAKE)
        if weight.dtype != "I8":
            continue
        if names.excludes(both_prefixes([module])):
            yield Problem.of(weight, f"is int8, but {module} is in `exclude`", _RESTORE)
        if scale is None and f"{module}.weight_quantizer" in contents.modules:
            reason = "is int8, its scale is weight_quantizer.scale (AMD/Quark issue 44)"
            yield Problem.of(weight, reason, _RENAME)
        elif scale is None:
            reason = f"is int8, but the checkpoint has no {module}.weight_scale"
            yield Problem.of(weight, reason, f"{_INCOMPLETE}, if it is an INT8 layer's")
        elif _is_of_groups(weight.shape, scale.shape):
            reason = f"is {scale}, one scale per group of inputs, for weight {weight}"
            yield Problem.of(scale, reason, _NO_GROUPS)
        elif scale.dtype not in _FLOATS or not _fits(weight.shape, scale.shape):
            reason = (
                f"is {scale}, expected one value or one per row for weight {weight}"
            )
            yield Problem.of(scale, reason, "export it again with AMD Quark")
        for part in ("weight", "input") if scale is not None else ():
            for entry in contents.modules.get(
                f"{module}.{part}_quantizer", {}
            ).values():
                yield Problem.of(entry, "has a name that no layer takes", _RENAME)
        for kind, entry in kinds.items():
            if not _may_lie_beside(kind):
                reason = f"lies beside an INT8 weight, and no layer takes a {kind}"
                yield Problem.of(entry, reason, _WITHOUT)
    yield from _find_gpt_oss(contents)
    yield from _find_gaps(contents)


def _find_gpt_oss(contents: Contents) -> Iterator[Problem]:
    """Experts of gpt-oss, told by its attention sinks and its router's name: its
    loader takes Quark's MXFP4 and FP8 ones only, and stops over others without a
    name."""
    if not contents.with_kind("sinks"):
        return
    for name, entry in contents.tensors():
        name_match = _GPT_OSS.fullmatch(name)
        if not name_match or f"{name_match[1]}.router" not in contents.modules:
            continue
        if entry.dtype in ("I8", *_FLOATS):
            reason = f"is {entry.dtype}, and gpt-oss takes experts of AMD Quark as "
            reason += "MXFP4 or FP8 only"
            way_out = "export its experts so, or serve the unquantized checkpoint"
            yield Problem.of(entry, reason, way_out)
            return


def _fits(weight: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    """Whether a scale is [N], [N, 1], [1, N] or one value of a weight [N, K], or
    those of each expert of a weight [E, N, K]."""
    if len(weight) == 3 and scale[:1] in ((1,), weight[:1]):
        weight, scale = weight[1:], scale[1:]
    return len(weight) == 2 and [n for n in scale if n != 1] in ([], [weight[0]])


def _is_of_groups(weight: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    """Whether a scale is [N, G] of a weight [N, K], G > 1 values a row."""
    return len(scale) > 1 and scale[:-1] == weight[:-1] and scale[-1] > 1


def _find_gaps(contents: Contents) -> Iterator[Problem]:
    """Decoder layers that are missing, and tensors that one lacks and all layers like
    it have. Those of a layer's quantization do not count: one may be kept in high
    precision alone."""
    layers: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    experts: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    quantized: set[str] = set()
    for module, kinds in contents.modules.items():
        if not (name_match := _BLOCK.match(f"{module}.")):
            continue
        stack, number, below = name_match.groups()
        if "weight" in kinds and kinds["weight"].dtype == "I8":
            quantized.add(stack)
        if expert := _EXPERT.fullmatch(module):
            # Experts are alike but for their number, and many.
            experts[expert[1]][expert[3]].add(int(expert[2]))
            below = _NUMBER.sub(".experts.*.", f".{below}", count=1)[1:]
        layers[stack][number] |= {
            below + kind for kind in kinds if not _OF_QUANTIZATION.fullmatch(kind)
        }
    # Layers for MTP beside the others may have other experts.
    is_uniform = len(layers) == 1 and not contents.is_heterogeneous
    for stack, by_number in layers.items() if not contents.is_heterogeneous else ():
        # Elsewhere functions without weights have numbers, too.
        is_decoder = all(any("." in n for n in own) for own in by_number.values())
        if stack in quantized and is_decoder:
            numbers = set(map(int, by_number))
            count = contents.layer_count if is_uniform else None
            yield from _find_missing_layers(stack, numbers, count)
        yield from _find_short_layers(stack, by_number, contents)
    yield from _find_missing_experts(
        experts, contents.expert_count if is_uniform else None
    )
    if len(layers) == 1 and len(next(iter(layers.values()))) > 3:
        yield from _find_missing_ends(contents)


def _find_missing_layers(
    stack: str, numbers: set[int], count: int | None
) -> Iterator[Problem]:
    """The first decoder layer without a tensor. count: by the config. A draft has a
    few layers, or some from the middle on: nothing is known of its numbers."""
    if 0 not in numbers or len(numbers) <= 3:
        return
    missing = next(i for i in itertools.count() if i not in numbers)
    if missing < max(numbers):
        reason = "is not in the checkpoint, but layers with higher numbers are"
        yield Problem(f"{stack}.{missing}", "", reason, _INCOMPLETE)
    elif count and missing < count:
        reason = "is not in the checkpoint, and its config says that there are "
        reason += f"{count} layers (num_hidden_layers)"
        yield Problem(f"{stack}.{missing}", "", reason, _INCOMPLETE)


def _find_short_layers(
    stack: str, by_number: dict[str, set[str]], contents: Contents
) -> Iterator[Problem]:
    """Layers that lack a module, or modules below one name, such as `self_attn`.

    by_number: names of the tensors of each layer, below it.
    """
    count = Counter(map(frozenset, by_number.values()))
    first = min(by_number, key=int)  # often without a norm before it
    for number, own in by_number.items():
        if count[frozenset(own)] > 1 or number == first:
            continue
        all_lacks = [k - own for k, times in count.items() if times > 1 and own < k]
        lacks = set(all_lacks[0]) if len(all_lacks) == 1 else set()
        if contents.first_sharing is not None and int(number) >= contents.first_sharing:
            lacks = {name for name in lacks if not _KEYS_AND_VALUES.search(name)}
        modules = {name.rpartition(".")[0] for name in lacks}
        places = {module.partition(".")[0] for module in modules}
        if all(name.endswith("_scale") for name in lacks):
            # Scales of a KV cache: modules in high precision have none.
            names = (f"{stack}.{number}.{module}" for module in modules)
            kinds = (contents.modules.get(name, {}) for name in names)
            weights = [k["weight"] for k in kinds if "weight" in k]
            places = modules if any(w.dtype == "I8" for w in weights) else set()
        if len(places) == 1:
            reason = "is not in the checkpoint, and all other layers like it have it"
            name = f"{stack}.{number}.{min(lacks)}"
            yield Problem(name, "", reason, _INCOMPLETE)


def _find_missing_experts(
    experts: dict[str, dict[str, set[int]]], expert_count: tuple[str, int] | None
) -> Iterator[Problem]:
    """The first expert that a layer lacks of each projection. experts: numbers by
    layer and projection. expert_count: by the config, and its key."""
    key, count = expert_count or ("", 0)
    for layer, by_projection in experts.items():
        last = max(max(numbers) for numbers in by_projection.values())
        for projection, numbers in by_projection.items():
            missing = next(i for i in itertools.count() if i not in numbers)
            reason = "is not in the checkpoint, and "
            if missing <= last:
                reason += "those of other experts are"
            elif missing < count:
                reason += f"its config says that there are {count} experts ({key})"
            else:
                continue
            name = f"{layer}.{missing}.{projection}.weight"
            yield Problem(name, "", reason, _INCOMPLETE)


def _find_missing_ends(contents: Contents) -> Iterator[Problem]:
    """The embedding of a model, or the norm at its end, where all norms of its
    layers are RMSNorms: other models may have none, or one without a weight."""
    inside: dict[bool, set[int]] = {True: set(), False: set()}
    has_bias = False
    for module, kinds in contents.modules.items():
        rank = len(kinds["weight"].shape) if "weight" in kinds else 0
        inside[".layers." in module].add(rank)
        has_bias |= rank == 1 and "bias" in kinds
    if 2 not in inside[False]:
        yield Problem("the embedding", "", "is not in the checkpoint", _INCOMPLETE)
    if 1 in inside[True] and 1 not in inside[False] and not has_bias:
        yield Problem("the last norm", "", "is not in the checkpoint", _INCOMPLETE)


def _has_own_head(config: dict[str, Any]) -> bool:
    """Whether a model's config.json says that its output layer is not the embedding."""
    if config.get("tie_word_embeddings") is not False:
        return False
    names = config.get("architectures")
    return isinstance(names, list) and str(*names[:1]).endswith("ForCausalLM")


def _count_layers(config: dict[str, Any]) -> int | None:
    """Decoder layers by a language model's config, where one key alone counts them."""
    count = config.get("num_hidden_layers")
    is_sure = type(count) is int and config.get("num_layers", count) == count
    return count if is_sure else None


def _count_experts(config: dict[str, Any]) -> tuple[str, int] | None:
    """The key of a language model's config that counts a layer's experts, and how many
    there are."""
    counts = {k: config[k] for k in _EXPERT_COUNTS if type(config.get(k)) is int}
    return next(iter(counts.items())) if len(set(counts.values())) == 1 else None


def read_contents(folder: str, in_use: dict[str, Any] | None = None) -> Contents:
    """The contents of a local checkpoint. in_use: its config as vLLM has it. Raises
    CheckpointError."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            config = json.load(f)
    except _UNREADABLE:  # vLLM says why
        config = None
    entries = (e for path in find_files(folder) for e in read_header(path))
    return Contents(entries, config, in_use)


def contents_of_hub(
    model: str, revision: str | None, in_use: dict[str, Any] | None = None
) -> Contents | None:
    """The same of a model on the Hugging Face hub, by its headers alone; None
    where the hub or its files cannot be read: loading says why."""
    from huggingface_hub import get_safetensors_metadata

    try:
        files = get_safetensors_metadata(model, revision=revision).files_metadata
    except Exception:  # of the hub, its client's and its transport's
        return None
    entries = (
        Entry(name, file, info.dtype, tuple(info.shape))
        for file, metadata in files.items()
        for name, info in metadata.tensors.items()
    )
    return Contents(entries, in_use=in_use)


def judge(model: str, names: Names, **known) -> Contents | None:
    """What `model`, a folder or a name on the hub, holds; None where there are no
    files, as with dummy weights.

    known: may have the `hf_config` and the `revision`. Releases that do not say the
    revision may load another one than the hub's newest, which is then not looked at.
    Raises ValueError with the first problem and the number of others.
    """
    contents: Contents | None = None
    hf_config = known.get("hf_config")
    in_use = hf_config.to_dict() if hasattr(hf_config, "to_dict") else None
    if os.path.isdir(model):
        contents = read_contents(model, in_use)
    elif "revision" in known and _HUB_NAME.fullmatch(model) and not _MODELSCOPE:
        contents = contents_of_hub(model, known["revision"], in_use)
    if not contents or not contents.modules:
        return None
    problems = list(find_problems(contents, names))
    if problems:
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        raise ValueError(f"{problems[0]}{more}")
    return contents
