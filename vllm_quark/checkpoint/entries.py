# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""What `exclude` and `layer_quant_config` say of a checkpoint's modules, and which of their entries say nothing."""

import fnmatch
import re
from collections.abc import Collection, Iterable
from typing import Any

from vllm_quark.checkpoint.int8 import names

# Projections that vLLM runs as one layer, whose input it quantizes once.
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
# A language model inside another, as transformers has it in memory and in files.
_NESTED = ("model.language_model.", "language_model.model.")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
# More are no stack of experts.
MOST_EXPERTS = 10_000


def is_expert(module: str) -> bool:
    """Whether a module of the checkpoint is one expert's."""
    return ".experts." in module


def experts_of(module: str) -> str:
    """The layer that vLLM makes of all experts, by a module that is one's or holds all of them."""
    if is_expert(module):
        module = module.partition(".experts.")[0]
    else:
        module = module.rpartition(".")[0].removesuffix(".experts")
    return f"{module}.experts"


def spell_names(module: str) -> tuple[str, ...]:
    """What a config may call a module of the checkpoint.

    transformers renames a language model's modules when it saves them; vLLM looks for both names.
    """
    spelled = [module]
    for prefix, other_prefix in (_NESTED, _NESTED[::-1]):
        if module.startswith(prefix):
            spelled.append(other_prefix + module[len(prefix) :])
    return names.both_prefixes(spelled)


def _tells_experts_apart(pattern: str) -> bool:
    """Whether a glob or `re:` pattern may match one expert of a layer and not another whose number is as long."""
    text = re.sub(r"\[0-9\]|\\d|\{\d+(,\d*)?\}", "", pattern)
    if "[" not in text:
        # A number behind another word than `experts` is no expert's: layers.1, block1.
        text = re.sub(r"(?<![\\A-Za-z_])([A-Za-z_]+)((?:\\?\.)?)\d+", _drop_number, text)
    return bool(re.search(r"\d|\(\?P?<|\(\?P=|\\[gkxuUNL]", text))


def _drop_number(match: re.Match[str]) -> str:
    return match[0] if match[2] and "experts".endswith(match[1]) else ""


def _fold(text: str) -> str:
    """`text` with experts' numbers as zeros."""
    return _EXPERT.sub(lambda m: "0" * len(m[0]), text)


def _unify_spellings(name: str) -> str:
    """One name for all that `spell_names` gives."""
    name = name.removeprefix("model.")
    return "language_model." + name.removeprefix("language_model.model.") if name.startswith(_NESTED[1]) else name


def _drop_cache_outputs(quant_config: dict[str, Any]) -> dict[str, Any]:
    """A `quantization_config` without the output_tensors that stand for an FP8 KV cache: vLLM takes them out."""
    groups = quant_config.get("export", {}).get("kv_cache_group")
    configs = {
        name: {**(config or {}), "output_tensors": None}
        if groups and (name == "*q_proj" or any(fnmatch.fnmatchcase(name, group) for group in groups))
        else config
        for name, config in quant_config.get("layer_quant_config", {}).items()
    }
    return {**quant_config, "layer_quant_config": configs}


class Entries(names.Names):
    """The entries of a completed INT8 `quantization_config`.

    Experts are many and mostly alike, so one stands for all of its layer that no entry tells from it.
    """

    def __init__(self, quant_config: dict[str, Any]) -> None:
        super().__init__(_drop_cache_outputs(quant_config))
        self.entries = list(dict.fromkeys((*self.exclude, *self.configs)))
        self.patterns = {e for e in self.entries if names.compile_pattern(e)}
        self.expert_patterns = [e for e in self.patterns if _tells_experts_apart(e)]
        self.other_patterns = self.patterns.difference(self.expert_patterns)
        self.listed = {_unify_spellings(e) for e in self.entries if e not in self.patterns}
        self._excluded: dict[str, bool] = {}
        self._looked_up: dict[tuple[bool, str, str], tuple[bool, dict[str, Any] | None]] = {}

    def excludes(self, names: Collection[str], among: Collection[str] | None = None) -> bool:
        """As of Names, with patterns tried once for all experts that they do not tell apart."""
        if among is not None or self.lists(names):
            return super().excludes(names, among)
        key = _fold("\n".join(names))
        if key not in self._excluded:
            self._excluded[key] = super().excludes(names, self.other_patterns)
        return self._excluded[key] or bool(self.expert_patterns and super().excludes(names, self.expert_patterns))

    def look_up(self, module: str, is_stacked: bool = False, stack: str = "") -> tuple[bool, dict[str, Any] | None]:
        """Whether `exclude` lists a module of the checkpoint, and its layer config (None: not quantized).

        is_stacked: it holds all experts of a layer; then what is said of the first one. stack: the module that holds
        this expert with all others, whose name counts, too.
        """
        stem, _, last = module.rpartition(".")
        # vLLM asks for experts by their layer's name, too.
        layer = experts_of(module) if is_stacked or is_expert(module) else ""
        fused = f"{stem}.{FUSED[last]}" if last in FUSED and stem and not layer else ""
        is_alone = is_stacked or any(name and _unify_spellings(name) in self.listed for name in (module, layer, fused))
        if not is_alone and self.expert_patterns:
            is_alone = any(names.matches(e, spell_names(module)) for e in self.expert_patterns)
        key = is_alone, module if is_alone else _fold(module), stack
        if key not in self._looked_up:
            spellings = spell_names(module)
            if is_stacked:
                # Beside its layer, below it, or by an expert's name.
                spellings += spell_names(f"{layer}.{last}") + spell_names(f"{layer}.0.{last}")
            if stack:
                spellings += spell_names(stack) + spell_names(f"{layer}.{last}")
            if layer:
                spellings += spell_names(layer)
            elif fused and self.lists(spell_names(fused)):
                spellings = spell_names(fused)
            self._looked_up[key] = self.excludes(spellings), self.config_of(spellings)
        return self._looked_up[key]

    def find_unmatched(self, contents: Any) -> list[str]:
        """The entries that name no module of `contents`, nor a layer that vLLM makes of some."""
        # The head, tied to the embedding, is in no file, and rightly listed.
        modules = {"lm_head", "language_model.lm_head", *map(_fold, contents.modules)}
        for module in tuple(modules):
            stem, _, last = module.rpartition(".")
            if last in FUSED:
                modules.add(f"{stem}.{FUSED[last]}")
            if is_expert(module):
                modules.add(experts_of(module))
        for module, kinds in contents.modules.items():
            for kind, entry in kinds.items():
                if len(entry.shape) == 3 and entry.shape[0] < MOST_EXPERTS:
                    # Some models keep experts in parameters of their own: `experts.gate_up_proj`.
                    name = module if kind == "weight" else entry.name
                    modules |= {name, *_stacked_names(name, entry.shape[0])}
        spellings = {name for module in modules for name in spell_names(module)}
        unified = {_unify_spellings(name) for name in (*modules, *contents.modules)}

        def is_matched(entry: str) -> bool:
            if entry not in self.patterns:
                return _unify_spellings(entry) in unified
            return names.matches(entry, spellings) or (
                entry in self.expert_patterns
                and any(names.matches(entry, spell_names(module)) for module in contents.modules)
            )

        return [entry for entry in self.entries if not is_matched(entry)]


def _stacked_names(module: str, count: int) -> Iterable[str]:
    """What a config may call the modules that one tensor of `count` experts stands for."""
    layer, last = experts_of(module), module.rpartition(".")[2]
    yield from (layer, f"{layer}.{last}")
    yield from (f"{layer}.{e}.{last}" for e in range(count))
