# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The layer config of a module, found by the names that a Quark config may use.

Quark names modules as the checkpoint does, one projection and one expert at a
time, by exact names, globs and `re:` patterns. vLLM renames modules, so each is
looked up under every name that the checkpoint may have for it.
"""

import fnmatch
from collections import defaultdict
from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import Any

import regex as re

# What a WeightsMapper has that is no plain text.
_ONE_WAY = ("orig_to_new_regex", "orig_to_new_renaming")
_DOT = re.compile(r"\.")


@lru_cache(maxsize=4096)
def compile_pattern(entry: str) -> "re.Pattern | None":
    """The expression of a glob or `re:` pattern; None for an exact name.

    Raises ValueError for what is no regular expression.
    """
    if entry.startswith("re:"):
        try:
            return re.compile(entry[3:])
        except re.error as e:
            raise ValueError(f"{entry!r} is no regular expression: {e}") from e
    if any(c in entry for c in "*?["):
        return re.compile(fnmatch.translate(entry))
    return None


def matches(entry: str, names: Collection[str]) -> bool:
    """Whether an exact name, glob or `re:` pattern names any of `names`."""
    pattern = compile_pattern(entry)
    if pattern is None:
        return entry in names
    return any(pattern.match(name) for name in names)


def both_prefixes(names: Iterable[str]) -> tuple[str, ...]:
    """`names`, each with and without the leading "model."."""
    bare = {name.removeprefix("model.") for name in names}
    return (*names, *bare, *(f"model.{name}" for name in bare))


class Names:
    """The entries of a `quantization_config`, and what they name."""

    def __init__(self, quant_config: dict[str, Any]) -> None:
        self.exclude: list[str] = quant_config.get("exclude") or []
        self.configs: dict[str, Any] = quant_config.get("layer_quant_config") or {}
        by_type = quant_config.get("layer_type_quant_config") or {}
        default = quant_config.get("global_quant_config")
        self.default = next(iter(by_type.values()), default)
        # Models' WeightsMappers, from checkpoint names to vLLM's.
        self.mappers: list[Any] = []
        # Modules of the checkpoint's files, as far as they are known.
        self.in_files: set[str] = set()
        # By the number of a mapper, what `_mapped` has.
        self._by_vllm_name: dict[int, dict[str, set[str]]] = {}
        # Exact names are many, one for each expert at worst; patterns are few.
        self._exact = {e for e in self.exclude if compile_pattern(e) is None}
        self._patterns = [e for e in self.exclude if e not in self._exact]

    def of(self, vllm_name: str) -> tuple[str, ...]:
        """Names that the checkpoint or its config may have for a vLLM module."""
        spellings = {vllm_name, vllm_name.replace(".mtp_block.", ".")}
        for i, mapper in enumerate(self.mappers):
            if any(getattr(mapper, key, None) for key in _ONE_WAY):
                mapped = self._mapped(i)
                spellings |= {n for new in spellings for n in mapped.get(new, ())}
            # Backwards: a mapper renames by substr, then prefix, then suffix, and one
            # name may meet several of each.
            for old, to in reversed((mapper.orig_to_new_suffix or {}).items()):
                for new in list(spellings):
                    if to and new.endswith(to):
                        spellings.add(new[: -len(to)] + old)
            for old, to in reversed((mapper.orig_to_new_prefix or {}).items()):
                for new in list(spellings):
                    # Prefixes may end in a dot, of a module of that name, too.
                    if to is not None and f"{new}.".startswith(to):
                        spellings.add((old + f"{new}."[len(to) :]).removesuffix("."))
            for old, to in reversed((mapper.orig_to_new_substr or {}).items()):
                for new in list(spellings):
                    if to and to in new:
                        spellings.add(new.replace(to, old))
        return both_prefixes(spellings)

    def expect(self, modules: Collection[str]) -> None:
        """Take the modules of the checkpoint's files."""
        self.in_files = set(modules)
        self._by_vllm_name.clear()

    def _mapped(self, index: int) -> dict[str, set[str]]:
        """Names of the checkpoint by what a mapper makes of them: its expressions
        cannot be read backwards."""
        if index not in self._by_vllm_name:
            mapped = self._by_vllm_name[index] = defaultdict(set)
            names = {*self._exact, *self.configs, *self.in_files}
            # vLLM names the modules above them, too: all experts of a layer.
            above = {name[: m.start()] for name in names for m in _DOT.finditer(name)}
            for name in names | above:
                # An expression may be of weights.
                for new in self.mappers[index].apply_list([name, f"{name}.weight"]):
                    mapped[new.removesuffix(".weight")].add(name)
        return self._by_vllm_name[index]

    def touching(self, names: Collection[str]) -> list[str]:
        """The entries of both lists that name any of `names`."""
        return [e for e in (*self.exclude, *self.configs) if matches(e, names)]

    def lists(self, names: Collection[str]) -> bool:
        """Whether an exact entry of either list is one of `names`."""
        return any(n in self._exact or n in self.configs for n in names)

    def excludes(
        self, names: Collection[str], among: Collection[str] | None = None
    ) -> bool:
        """Whether `exclude` lists a module of these `names`.

        among: the entries that can match at all, where the caller knows them.
        """
        if not self._exact.isdisjoint(names):
            return True
        entries = self._patterns if among is None else among
        return any(matches(e, names) for e in self._patterns if e in entries)

    def config_of(
        self, names: Collection[str], among: Collection[str] | None = None
    ) -> dict[str, Any] | None:
        """The layer config of a module of these `names`; None: not quantized."""
        if self.excludes(names, among):
            return None
        entries = self.configs if among is None else among
        matching = [e for e in self.configs if e in entries and matches(e, names)]
        # As in Quark, a module's own name goes before any pattern.
        exact = (e for e in matching if compile_pattern(e) is None)
        entry = next(exact, next(iter(matching), None))
        config = self.default if entry is None else self.configs[entry]
        quantized = config and (config.get("weight") or config.get("input_tensors"))
        return config if quantized else None
