# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The modules of a checkpoint, sorted by what its config says of them and what its files hold."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm_quark.checkpoint.entries import FUSED, Entries, experts_of, is_expert
from vllm_quark.checkpoint.int8 import headers, scheme
from vllm_quark.checkpoint.report import AGAIN, ALIKE, INCOMPLETE, RESTORE, Finding
from vllm_quark.checkpoint.values import FLOATS

EXCLUDE = "add its layer to `exclude` in config.json, or export it again"
# Layers that vLLM builds unquantized whatever the config says.
VOCABULARY = ("lm_head", "embed_tokens")
# Projections of experts, which may come as one tensor [experts, rows, columns].
PROJECTIONS = ("gate_proj", "up_proj", "gate_up_proj", "down_proj", "w1", "w2", "w3")
# A convolution's kernel [channels, channels of a group, width] has fewer.
FEWEST_COLUMNS = 16


@dataclass(frozen=True)
class Refusal:
    """Why no kernel runs a layer config."""

    reason: str
    way_out: str


INPUT_ONLY = Refusal("its input is quantized, its weight is not", f"{AGAIN} as W8A8")


def _parse(config: dict[str, Any]) -> Any:
    """The Int8Scheme of an INT8 layer config, or its Refusal."""
    try:
        return scheme.Int8Scheme.parse(config, "")
    except ValueError as e:
        reason, _, way_out = str(e).removeprefix(": ").rpartition(": ")
        return Refusal(reason, way_out)


class Modules:
    """The modules that have a weight [rows, columns] or, of all experts, [experts, rows, columns].

    int8: they are INT8, with their Int8Scheme or Refusal. floats: they are not, and ought to be, with their weights.
    others: they are not, and why. judged: tensors that something is wrong with.
    """

    def __init__(self, entries: Entries, contents: Any) -> None:
        self.entries = entries
        self.contents = contents
        self.int8: dict[str, Any] = {}
        self.floats: dict[str, Any] = {}
        self.others: dict[str, str] = {}
        self.judged: set[str] = set()
        self.schemes: Counter[str] = Counter()
        self.excluded = 0
        self._refused: dict[Refusal, list[str]] = defaultdict(list)
        self._with_scale: list[str] = []  # in `exclude`, of floats
        self._layers: dict[str, str | None] = {}

    def weight(self, module: str) -> Any:
        return self.contents.modules[module]["weight"]

    def is_stacked(self, module: str) -> bool:
        return len(self.weight(module).shape) == 3

    def is_linear(self, module: str) -> bool:
        return not (is_expert(module) or self.is_stacked(module))

    def layer_of(self, module: str) -> str | None:
        """The layer that vLLM makes of `module` and others; None: it stands alone."""
        if module not in self._layers:
            stem, _, last = module.rpartition(".")
            layer = f"{stem}.{FUSED[last]}" if last in FUSED else None
            if is_expert(module) or self.is_stacked(module):
                layer = experts_of(module) if last in PROJECTIONS else None
            self._layers[module] = layer
        return self._layers[module]

    def sort(self, notes: list[str]) -> Iterator[Finding]:
        """Sort all modules. What vLLM finds wrong in headers, and schemes that no kernel runs.

        What some models stop over goes into `notes`.
        """
        for p in headers.find_problems(self.contents, self.entries):
            self.judged.add(p.tensor)
            yield Finding.of_tensor(p.tensor, p.file, p.reason, p.way_out)
        if self.contents.lacks_head():
            notes.append(
                "lm_head.weight is not in the checkpoint, but config.json says that it is not the embedding "
                "(tie_word_embeddings): it can be served for pooling only"
            )
        parsed: dict[int, Any] = {}
        for module, kinds in self.contents.modules.items():
            weight = kinds.get("weight")
            if weight is None or len(weight.shape) not in (2, 3):
                continue
            is_excluded, config = self.entries.look_up(module, len(weight.shape) == 3)
            if not is_excluded and config is not None and scheme.is_int8(config) and weight.dtype == "I8":
                if id(config) not in parsed:
                    parsed[id(config)] = _parse(config)
                parsed_scheme = self.int8[module] = parsed[id(config)]
                if isinstance(parsed_scheme, Refusal):
                    self._refused[parsed_scheme].append(module)
                else:
                    self.schemes[str(parsed_scheme)] += 1
                wrong: tuple[str, str] | tuple[()] = ()
                if module.rpartition(".")[2] in VOCABULARY:
                    way_out = "add it to `exclude` and export it unquantized"
                    wrong = "is int8, but vLLM builds this layer unquantized", way_out
            else:
                wrong = self._sort_other(module, weight, is_excluded, config)
            if wrong and weight.name not in self.judged:
                yield Finding.of_tensor(weight.name, weight.file, *wrong)
        for refusal, (first, *more) in self._refused.items():
            few = ", ".join(more[:3]) + (", …" if more[3:] else "")
            also = f", and so have {len(more)} more ({few})" if more else ""
            yield Finding.of_layer(first, f"has a scheme that no kernel runs{also}: {refusal.reason}", refusal.way_out)
        if self._with_scale:
            first, count = self._with_scale[0], len(self._with_scale)
            also = f" (and {count - 1} more)" if count > 1 else ""
            notes.append(
                f"{first}.weight_scale{also} lies beside an unquantized weight in `exclude`, and not every model skips "
                "it: if vLLM stops with a KeyError, take it out of the files"
            )

    def _sort_other(self, module: str, weight: Any, is_excluded: bool, config: Any) -> tuple[()] | tuple[str, str]:
        """Sort a module that is not INT8 in both config and files; reason and way out where that is wrong."""
        if is_excluded:
            self.excluded += 1
            self.others[module] = "in `exclude`"
            if weight.dtype in FLOATS and "weight_scale" in self.contents.modules[module]:
                self._with_scale.append(module)
            return ("is int8, but its layer is in `exclude`", RESTORE) if weight.dtype == "I8" else ()
        if scheme.is_int8(config):
            if weight.dtype not in FLOATS:
                return f"is {weight.dtype}, but config.json says int8", RESTORE
            if len(weight.shape) == 2 or min(weight.shape[1:]) >= FEWEST_COLUMNS:
                self.floats[module] = weight
            return ()
        of_weight = (config or {}).get("weight")
        dtype = of_weight.get("dtype") if isinstance(of_weight, dict) else None
        self.others[module] = f"quantized to {dtype or 'another format'}" if config else "not quantized"
        if config and not of_weight:
            self._refused[INPUT_ONLY].append(module)
        elif weight.dtype == "I8":
            instead = f"quantizes it to {dtype or 'another format'}" if config else "does not quantize it"
            return f"is int8, but config.json {instead}", RESTORE
        elif config and weight.dtype not in FLOATS:
            self.schemes[f"{dtype or weight.dtype} weights, which are not judged"] += 1
        return ()

    def judge_floats(self, notes: list[str]) -> Iterator[Finding]:
        """Float weights where the config says INT8: wrong of experts, of parts of layers, and where others are INT8.

        Others go into `notes`.
        """
        int8_projections = {module.rpartition(".")[2] for module in self.int8}
        layers = {self.layer_of(module) for module in self.int8} - {None}
        excluded = {self.layer_of(module) for module in self.others} - {None}
        noted: Counter[str] = Counter()
        noted_stacks: list[str] = []
        for module, weight in self.floats.items():
            layer, last = self.layer_of(module), module.rpartition(".")[2]
            reason = f"is {weight.dtype}, but config.json says int8, and"
            if layer in layers:
                yield Finding.of_tensor(weight.name, weight.file, f"{reason} other parts of its layer are", ALIKE)
            elif is_expert(module) or (layer and self.is_stacked(module)):
                yield Finding.of_tensor(weight.name, weight.file, f"{reason} experts are what it says", EXCLUDE)
            elif layer in excluded:
                yield Finding.of_tensor(weight.name, weight.file, f"{reason} not of other parts of its layer", EXCLUDE)
            elif last in int8_projections:
                yield Finding.of_tensor(weight.name, weight.file, f"{reason} other {last} are", EXCLUDE)
            elif last not in VOCABULARY and "embed" not in last:
                noted[f"{weight.dtype} {last}"] += 1
        for module, kinds in self.contents.modules.items():
            # Parameters of all experts, without modules of their own.
            for kind, entry in kinds.items() if module.endswith(".experts") else ():
                if len(entry.shape) == 3 and entry.dtype in FLOATS:
                    is_excluded, config = self.entries.look_up(entry.name, is_stacked=True)
                    if not is_excluded and scheme.is_int8(config) and "scale" not in kind:
                        reason = f"is {entry.dtype}, but config.json says int8, and experts are what it says"
                        yield Finding.of_tensor(entry.name, entry.file, reason, EXCLUDE)
                elif len(entry.shape) == 3 and entry.dtype == "I8" and kind != "weight":
                    if any(other.startswith(kind) and other.endswith("scale") for other in kinds):
                        noted_stacks.append(entry.name)
                    else:
                        yield Finding.of_tensor(
                            entry.name, entry.file, "is int8, but has no scale beside it", INCOMPLETE
                        )
        if noted_stacks:
            notes.append(f"{noted_stacks[0]} is no module's weight, as AMD Quark writes one: it was not judged")
        if noted:
            summary = ", ".join(f"{kind} ({count})" for kind, count in noted.most_common())
            notes.append(
                f"not in `exclude`, and nowhere INT8: {summary}. This is right of what vLLM builds unquantized, as it "
                "does routers; if it refuses one of them, add that to `exclude`"
            )
