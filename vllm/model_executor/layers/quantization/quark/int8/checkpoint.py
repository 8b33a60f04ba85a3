# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the files of a Quark INT8 checkpoint hold against what its config says.

By the checkpoint's own names, from the headers of its safetensors files: no
weight is read, no layer built, nothing of vLLM imported.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import regex as re

from .names import Names, both_prefixes

_INDEX = "model.safetensors.index.json"
# As ShardedStateLoader names its files.
_SHARDED = re.compile(r"-(rank|tp)-\d+-part-\d+\.")
_FLOATS = ("F64", "F32", "F16", "BF16")
# What may lie beside the INT8 weight of a layer. Scales of a KV cache and of
# attention among them.
_KINDS = re.compile(
    r"weight|bias|(weight|input)_(scale|zero_point)|(k|v|q|kv|output)_(scale|zero_point)"
)
_BLOCK = re.compile(r"(.*?\.layers)\.(\d+)\.(.*)")
_RESTORE = "restore config.json from the export"
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
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
            raise CheckpointError(f"{index}: is no index ({e}): {_INCOMPLETE}") from e
        if gone := sorted(listed - names):
            raise CheckpointError(
                f"{os.path.join(folder, str(gone[0]))}: is missing, but {_INDEX} "
                f"names it: {_INCOMPLETE}"
            )
        names = listed
    for name in sorted(names):
        if _SHARDED.search(name):
            raise CheckpointError(
                f"{os.path.join(folder, name)}: is a sharded state of vLLM's, which "
                "holds INT8 layers as its kernels do and cannot be loaded back: load "
                "the checkpoint that it was saved from"
            )
    return sorted(os.path.join(folder, name) for name in names)


def read_header(path: str) -> Iterator[Entry]:
    """The tensors of a safetensors file.

    Raises CheckpointError, naming the file, where it is cut short or is none.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= min(size - 8, 1 << 30):
                raise ValueError("no header")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        end = 8 + length
        for name, info in header.items():
            start, stop = info["data_offsets"]
            if 8 + length + stop > size:
                raise ValueError("it is cut short")
            end = max(end, 8 + length + stop)
            yield Entry(
                name, path, info["dtype"], tuple(info["shape"]), 8 + length + start
            )
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise CheckpointError(
            f"{path}: is no whole safetensors file ({e}): {_INCOMPLETE}"
        ) from e


class Contents:
    """The tensors of a checkpoint by module and kind: `weight`, `weight_scale`, …"""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.modules: dict[str, dict[str, Entry]] = defaultdict(dict)
        self.twice: list[tuple[Entry, Entry]] = []
        for entry in entries:
            module, _, kind = entry.name.rpartition(".")
            first = self.modules[module].setdefault(kind, entry)
            if first is not entry:
                self.twice.append((entry, first))

    def int8_modules(self) -> list[str]:
        """Modules whose weight is INT8."""
        return [
            module
            for module, kinds in self.modules.items()
            if "weight" in kinds and kinds["weight"].dtype == "I8"
        ]


def find_problems(contents: Contents, names: Names) -> Iterator[Problem]:
    """What of `contents` no INT8 layer can be made of, or nobody would look at.

    Layers that are not INT8 in the files are the model's business: a router may
    well be BF16 and not listed in `exclude`.
    """
    for entry, first in contents.twice:
        yield Problem(
            entry.name,
            entry.file,
            f"is in the checkpoint twice, in {os.path.basename(first.file)} and "
            f"{os.path.basename(entry.file)}",
            "keep the files of one export",
        )
    for module, kinds in contents.modules.items():
        weight = kinds.get("weight")
        if weight is None and "weight_scale" in kinds:
            scale = kinds["weight_scale"]
            yield Problem(
                scale.name, scale.file, f"has no {module}.weight", _INCOMPLETE
            )
        elif weight is not None and weight.dtype == "I8":
            yield from _problems_of(module, kinds, names)
    yield from _gaps(contents)


def _problems_of(
    module: str, kinds: dict[str, Entry], names: Names
) -> Iterator[Problem]:
    weight, scale = kinds["weight"], kinds.get("weight_scale")
    if names.excludes(both_prefixes([module])):
        yield Problem(
            weight.name, weight.file, f"is int8, but {module} is in `exclude`", _RESTORE
        )
    if scale is None:
        yield Problem(
            weight.name,
            weight.file,
            f"is int8, but the checkpoint has no {module}.weight_scale",
            "the checkpoint is incomplete, or this is no INT8 layer",
        )
    elif scale.dtype not in _FLOATS or not _fits(weight.shape, scale.shape):
        yield Problem(
            scale.name,
            scale.file,
            f"is {scale}, expected one value or one a row for weight {weight}",
            "export it again with AMD Quark",
        )
    for kind, entry in kinds.items():
        if not _KINDS.fullmatch(kind):
            yield Problem(
                entry.name,
                entry.file,
                f"lies beside an INT8 weight, and vLLM has no parameter for a {kind}",
                "export it without that (rotation, for one, has to be merged into "
                "the weights)",
            )


def _fits(weight: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    """Whether a scale is [N], [N, 1], [1, N] or one value of a weight [N, K], or
    those of each expert of a weight [E, N, K]."""
    if len(weight) not in (2, 3):
        return False
    if len(weight) == 3:
        if not scale or scale[0] not in (1, weight[0]):
            return False
        scale = scale[1:]
    sizes = [n for n in scale if n != 1]
    return sizes in ([], [weight[-2]])


def _gaps(contents: Contents) -> Iterator[Problem]:
    """Tensors that one decoder layer lacks and all layers like it have, and what a
    model with one stack of decoder layers cannot be without."""
    layers: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for module, kinds in contents.modules.items():
        if found := _BLOCK.match(f"{module}."):
            stack, number, rest = found[1], found[2], found[3]
            # Experts are alike by their number, and many.
            if ".experts." not in f".{rest}":
                layers[stack][number] |= {f"{rest}{kind}" for kind in kinds}
    for stack, by_number in layers.items():
        count = Counter(map(frozenset, by_number.values()))
        common = [kinds for kinds, times in count.items() if times >= 2]
        for number, kinds in by_number.items():
            if count[frozenset(kinds)] > 1:
                continue
            lacks = [other - kinds for other in common if kinds < other]
            if (
                len(lacks) == 1
                and len({name.rpartition(".")[0] for name in lacks[0]}) == 1
            ):
                name = f"{stack}.{number}.{min(lacks[0])}"
                yield Problem(
                    name,
                    "",
                    "is not in the checkpoint, and all layers like its own have it",
                    _INCOMPLETE,
                )
    if len(layers) == 1 and len(next(iter(layers.values()))) >= 4:
        root = next(iter(layers)).removesuffix(".layers")
        ranks = {
            len(entry.shape)
            for module, kinds in contents.modules.items()
            if module.rpartition(".")[0] == root
            for kind, entry in kinds.items()
            if kind == "weight"
        }
        for rank, what in ((2, "embedding"), (1, "norm")):
            if rank not in ranks:
                yield Problem(
                    f"the {what} of {root}", "", "is not in the checkpoint", _INCOMPLETE
                )


def read_contents(folder: str) -> Contents:
    """The contents of a local checkpoint. Raises CheckpointError."""
    return Contents(e for path in find_files(folder) for e in read_header(path))


def contents_of_hub(model: str, revision: str | None) -> Contents | None:
    """The same of a model on the Hugging Face hub, by its headers alone; None
    where the hub or its files cannot be read: loading says why."""
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError

    try:
        files = get_safetensors_metadata(model, revision=revision).files_metadata
    except (OSError, ValueError, HfHubHTTPError, NotASafetensorsRepoError):
        return None
    return Contents(
        Entry(name, file, info.dtype, tuple(info.shape))
        for file, metadata in files.items()
        for name, info in metadata.tensors.items()
    )


def judge(model: str, revision: str | None, names: Names) -> Iterable[str]:
    """The modules of `model`, a folder or a name on the hub, whose weights are INT8
    in its files; none where there are no files, as with dummy weights.

    Raises ValueError with the first problem and the number of others.
    """
    contents: Contents | None
    if os.path.isdir(model):
        contents = read_contents(model)
    elif os.path.exists(model) or "://" in model:
        return ()
    else:
        contents = contents_of_hub(model, revision)
    if not contents or not contents.modules:
        return ()
    problems = list(find_problems(contents, names))
    if problems:
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        raise ValueError(f"{problems[0]}{more}")
    return contents.int8_modules()
