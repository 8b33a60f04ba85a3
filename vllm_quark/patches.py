# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The contents of a patch file: commit message, upstream facts, rules, files that it adds."""

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator


class QuarkError(Exception):
    """Bad input or a bad tree: its text is the one line the user sees (exit code 2)."""


class PatchError(QuarkError):
    """A patch file that cannot be used; names the file and what is wrong in it."""


def _relative(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or pure.as_posix() != path:
        raise ValueError(f"'{path}' is not a plain path inside the tree")
    return path


TreePath = Annotated[str, AfterValidator(_relative)]
Rule = Annotated[dict[str, Any], Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def place_rule(place: str) -> dict[str, Any]:
    """The rule that matches the definition of a place: "Class", "Class.method" or "function"."""
    rule: dict[str, Any] = {}
    for name in place.split("."):
        kind = "class_definition" if name.lstrip("_")[:1].isupper() else "function_definition"
        around = {"inside": {"stopBy": "end", **rule}} if rule else {}
        rule = {"kind": kind, "has": {"field": "name", "regex": f"^{re.escape(name)}$"}, **around}
    return rule


def _expand_places(rule: Any) -> Any:
    """`rule` with the keys of the place for each `at: place` in it."""
    if isinstance(rule, list):
        return [_expand_places(r) for r in rule]
    if not isinstance(rule, dict):
        return rule
    expanded = {key: _expand_places(value) for key, value in rule.items() if key != "at"}
    if "at" in rule:
        place = place_rule(str(rule["at"]))
        if both := place.keys() & expanded.keys():
            raise ValueError(f"at: {rule['at']} leaves no room for '{min(both)}' beside it")
        expanded |= place
    return expanded


def _within(rule: dict[str, Any], around: dict[str, Any]) -> dict[str, Any]:
    """`rule` for matches inside of `around` only."""
    if "inside" not in rule:
        return {**rule, "inside": around}
    return {**rule, "all": [*rule.get("all", []), {"inside": around}]}


class Rewrite(_Strict):
    """One structural edit: an ast-grep `rule` that has to match once, and what comes of it.

    at: where the match is, "Class", "Class.method" or "function"; without a rule, that definition itself. what: of
    it, for people. directly: the match is a statement of that body, not of a block in it. They are short for rule and
    anchor, which is all that is kept of them.
    fix: text in place of the match.
    above, below: lines before the matched statement (and its comments and decorators), or after it.
    top: first lines of the matched function, below its docstring.
    where: structure of the releases that this is for; left out where the file does not have it.
    """

    anchor: str = Field(min_length=1, description="what the rule holds on to, for people")
    where: Rule | None = None
    rule: Rule
    fix: str | None = None
    above: str | None = None
    below: str | None = None
    top: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _say_place(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = data | {key: _expand_places(data[key]) for key in ("rule", "where") if key in data}
        at, description, directly = (data.pop(key, None) for key in ("at", "what", "directly"))
        if at is not None:
            place = place_rule(str(at))
            around = {"kind": "block", "inside": place} if directly else {"stopBy": "end", **place}
            data["rule"] = _within(data["rule"], around) if "rule" in data else place
            data["anchor"] = f"{at}, {description}" if description else at
        return data

    @model_validator(mode="after")
    def _one_way(self) -> "Rewrite":
        if sum(v is not None for v in (self.fix, self.above, self.below, self.top)) != 1:
            raise ValueError("a rewrite needs one of fix, above, below, top")
        return self


class FileEdit(_Strict):
    """Edits of one file. All `rewrite` rules see the same, unedited text.

    at: the place that it is about, short for `needs`, and `present` is looked for there.
    needs: structure without which this release lacks what the patch edits (`absent`); where it stands
        in another file of the same package, that file is the one.
    present: structure that means the edit, or upstream's equivalent, is already there.
    imports: import statements that the new text needs.
    """

    file: TreePath
    needs: Rule | None = None
    present: Rule
    imports: list[str] = []
    rewrite: list[Rewrite] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _say_place(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = data | {key: _expand_places(data[key]) for key in ("needs", "present") if key in data}
        if (at := data.pop("at", None)) is not None:
            data["needs"] = place_rule(str(at))
            if isinstance(data.get("present"), dict):
                data["present"] = _within(data["present"], {"stopBy": "end", **data["needs"]})
        return data

    @property
    def is_cmake(self) -> bool:
        """Its rules are those of vllm_quark.cmake, not ast-grep's."""
        return self.file.endswith((".cmake", "CMakeLists.txt"))

    @model_validator(mode="after")
    def _cmake_rules(self) -> "FileEdit":
        rules = [self.present, self.needs, *(x for r in self.rewrite for x in (r.rule, r.where))]
        for rule in rules if self.is_cmake else ():
            if rule and not {"command"} <= rule.keys() <= {"command", "argument"}:
                raise ValueError("a rule for CMake has a command and perhaps an argument")
        if self.is_cmake and (self.imports or any(r.above is None and r.below is None for r in self.rewrite)):
            raise ValueError("a CMake file takes lines above or below a command")
        return self

    def in_package(self, package: str) -> "FileEdit":
        """The same for a tree whose package is not called vllm."""
        return FileEdit(**_renamed(self.model_dump(), package))


def move_path(path: str, old: str, new: str) -> str:
    """`path` with its top folder `old` called `new`; others stay."""
    return new + path.removeprefix(old) if path.startswith(f"{old}/") else path


def rename_package(text: str, package: str) -> str:
    """`text`, of Python or of a rule, with the package `vllm` called `package`."""
    return _PACKAGE.sub(package, text)


_PACKAGE = re.compile(r"(?<![\w./-])vllm(?=\\?\.[a-zA-Z_])|(?<=\bimport )vllm\b(?![-.])|(?<=\bfrom )vllm\b(?= import)")


def _renamed(value: Any, package: str) -> Any:
    if isinstance(value, dict):
        return {k: move_path(v, "vllm", package) if k == "file" else _renamed(v, package) for k, v in value.items()}
    if isinstance(value, list):
        return [_renamed(v, package) for v in value]
    return rename_package(value, package) if isinstance(value, str) else value


class Upstream(_Strict):
    """Where upstream has the same fix: pull request number, first release with it."""

    pull: int | None = None
    since: str | None = None


class Absence(_Strict):
    """Releases that lack the code that a patch edits, and the consequence.

    before, since: up to, or from, which release. harmless: nothing is amiss without the patch there.
    """

    before: str | None = None
    since: str | None = None
    because: str = Field(min_length=1)
    harmless: bool = False

    @model_validator(mode="after")
    def _one_side(self) -> "Absence":
        if (self.before is None) == (self.since is None):
            raise ValueError("an absence is before or since a release")
        return self

    def holds(self, is_before: Callable[[str], bool]) -> bool:
        """Whether it is about the release that `is_before` knows the older ones of."""
        return is_before(self.before) if self.before is not None else not is_before(self.since or "0")

    @property
    def detail(self) -> str:
        """For people: whether that is fine, and since which release it is otherwise."""
        when = f"before {self.before}" if self.before else f"since {self.since}"
        if self.harmless:
            return f"fine {when}: {self.because}"
        return f"{when}, {self.because}: use {self.before} or newer" if self.before else f"{when}, {self.because}"


class Patch(_Strict):
    """One patch file. `name` is its file name without the suffix."""

    name: str
    subject: str = Field(min_length=1, pattern=r"^[^\n]+$")
    description: str = Field(min_length=1)
    upstream: Upstream | None = None
    absent: list[Absence] = []
    requires: list[str] = Field([], description="numbers of earlier patches that this one builds on")
    optional: bool = Field(False, description="left out unless it is asked for by name")
    edits: list[FileEdit] = []
    files: list[TreePath] = []

    @model_validator(mode="after")
    def _does_something(self) -> "Patch":
        if not self.edits and not self.files:
            raise ValueError("a patch needs edits or files")
        return self

    def in_package(self, package: str) -> "Patch":
        """The same for a tree whose package is not called vllm."""
        if package == "vllm":
            return self
        files = [move_path(f, "vllm", package) for f in self.files]
        return self.model_copy(update={"edits": [e.in_package(package) for e in self.edits], "files": files})

    @property
    def number(self) -> str:
        """The number by which other patches name it: NNNN."""
        return self.name.split("-")[0]

    def is_called(self, name: str) -> bool:
        """Whether `name` means this patch: its name or its number, 0001 or 1."""
        return name in (self.name, self.number) or (name.isdecimal() and name.zfill(4) == self.number)

    @property
    def message(self) -> str:
        """The commit message: subject, blank line, description."""
        return f"{self.subject}\n\n{self.description.strip()}\n"


def read_patch(path: Path) -> Patch:
    """Read one patch file. Raises PatchError naming the file and the first fault in it."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise PatchError(f"{path}: cannot be read: {e.strerror}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        reason = " ".join(str(getattr(e, "problem", None) or e).split())
        mark = getattr(e, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise PatchError(f"{where}: not valid YAML: {reason}: mend the patch file") from e
    if not isinstance(data, dict):
        raise PatchError(f"{path}: not a patch: expected keys such as subject, description, edits")
    try:
        return Patch(name=path.stem, **{k: v for k, v in data.items() if k != "name"})
    except (ValidationError, TypeError) as e:
        first = e.errors()[0] if isinstance(e, ValidationError) else {"loc": (), "msg": str(e)}
        at = ".".join(str(p) for p in first["loc"]) or "patch"
        raise PatchError(f"{path}: {at}: {first['msg']}: mend the patch file") from e
