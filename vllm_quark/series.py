# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The series: the patches in order, and the files they bring."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_quark.patches import Patch, PatchError, QuarkError, move_path, read_patch, rename_package

OLDEST = "0.17.0"
"""The first release of vLLM that the series knows."""


@dataclass(frozen=True)
class Series:
    """Patches in name order and the folder whose files they bring (same paths as in the tree).

    optional: patches that the series leaves out unless they are asked for (`with_optional`).
    """

    home: Path
    patches: tuple[Patch, ...]
    package: str = "vllm"
    optional: tuple[Patch, ...] = ()

    def content(self, file: str) -> bytes:
        """Bytes of a file that a patch brings."""
        data = (self.home / move_path(file, self.package, "vllm")).read_bytes()
        if self.package == "vllm" or not file.endswith(".py"):
            return data
        return rename_package(data.decode(), self.package).encode()

    def edited_files(self) -> set[str]:
        """The files that edits of the patches name."""
        return {rules.file for patch in self.patches for rules in patch.edits}

    def in_package(self, package: str) -> "Series":
        """The same for a tree whose package is not called vllm."""
        patches, optional = (tuple(p.in_package(package) for p in group) for group in (self.patches, self.optional))
        return replace(self, patches=patches, optional=optional, package=package)

    def with_optional(self, names: Iterable[str]) -> "Series":
        """The same with those of the optional patches that `names` name, as `select` does; others are left to it."""
        taken = [p for p in self.optional if any(map(p.is_called, split_names(names)))]
        patches = sorted([*self.patches, *taken], key=lambda p: p.name)
        return replace(self, patches=tuple(patches), optional=tuple(p for p in self.optional if p not in taken))

    def select(self, only: Iterable[str] = (), until: str | None = None, alone: bool = False) -> list[Patch]:
        """The patches named in `only` with those they require, or those up to and with `until`, or all.

        A name is a file name without suffix or its number, 0001 or 1; commas part several. alone: without those they
        require. Raises QuarkError for an unknown one.
        """
        only = list(only)
        # An empty variable of a script must not stand for all of them.
        for option, words in [*(("--only", words) for words in only), ("--until", until)]:
            if words is not None and not words.strip(", "):
                raise QuarkError(f"{option} '{words}': names no patch: leave {option} out for all of them")
        names = split_names(only)
        if names and until:
            raise QuarkError("--only and --until exclude each other")
        if names:
            wanted: set[str] = set()
            while names:
                patch = self._find(names.pop())
                if patch.name not in wanted:
                    wanted.add(patch.name)
                    names += () if alone else patch.requires
            return [p for p in self.patches if p.name in wanted]
        if until:
            last = self._find(until).name
            return [p for p in self.patches if p.name <= last]
        return list(self.patches)

    def dependents(self, patches: Iterable[Patch]) -> list[Patch]:
        """The patches that build on `patches`, directly or not, in series order, without these themselves."""
        numbers = {p.number for p in patches}
        dependents = []
        for patch in self.patches:
            if patch.number not in numbers and numbers.intersection(patch.requires):
                numbers.add(patch.number)
                dependents.append(patch)
        return dependents

    def _find(self, name: str) -> Patch:
        for p in self.patches:
            if p.is_called(name):
                return p
        if any(p.is_called(name) for p in self.optional):
            raise QuarkError(f"'{name}' is an optional patch: name it with --with")
        raise QuarkError(f"no patch '{name}': the series has {', '.join(p.name for p in self.patches)}")


def split_names(words: Iterable[str]) -> list[str]:
    """The names in `words`, of which commas part several."""
    return [name for word in words for name in map(str.strip, word.split(",")) if name]


def home() -> Path:
    """Where the series lies: inside the installed package, or the checkout around it."""
    packaged = Path(__file__).parent / "series"
    return packaged if (packaged / "patches").is_dir() else Path(__file__).parents[1]


def load_series(folder: Path | None = None) -> Series:
    """Read patches/NNNN-name.yaml below `folder`.

    Raises PatchError for a broken patch file and for a file that a patch lists and that does not exist.
    """
    folder = folder or home()
    paths = sorted((folder / "patches").glob("[0-9]*-*.yaml"))
    if not paths:
        raise PatchError(f"{folder / 'patches'}: no patch files (NNNN-name.yaml)")
    patches = [read_patch(p) for p in paths]
    series = Series(
        folder,
        tuple(p for p in patches if not p.optional),
        optional=tuple(p for p in patches if p.optional),
    )
    for path, patch in zip(paths, patches, strict=True):
        for name in patch.requires:
            # An optional patch may be missing where this one is.
            if not any(p.name < patch.name and p.number == name for p in series.patches):
                raise PatchError(f"{path}: requires '{name}', which is no earlier patch: mend the patch file")
        for file in patch.files:
            if not (folder / file).is_file():
                raise PatchError(f"{path}: brings '{file}', which is not in {folder}: mend the patch file")
    return series


def load_chosen(
    only: Iterable[str] | None,
    until: str | None = None,
    optional: Iterable[str] | None = None,
) -> tuple[Series, list[str]]:
    """The series with the optional patches of `--with` and of `--only`, and the names to select from it.

    Raises QuarkError for a name in `optional` that is no optional patch's, and for `optional` beside `until`.
    """
    only, optional = list(only or ()), list(optional or ())
    if optional and until:
        raise QuarkError("--with and --until exclude each other")
    series = load_series()
    for words in optional:
        for name in split_names([words]) or [words]:
            if not any(p.is_called(name) for p in series.optional):
                have = ", ".join(p.name for p in series.optional) or "none"
                raise QuarkError(f"--with '{name}': no optional patch: the series has {have}")
    return series.with_optional([*only, *optional]), [*only, *optional] if only else []
