# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""A wheel of vLLM with the series in it, for those who deploy wheels."""

import re
import tempfile
import zipfile
from pathlib import Path

from packaging.version import InvalidVersion, Version
from wheel.wheelfile import WheelError, WheelFile

from vllm_quark.patches import Patch, QuarkError
from vllm_quark.series import Series
from vllm_quark.tree import WHEEL_NOTE, Tree

LOCAL = "quark"


def _version(wheel: Path, text: str) -> str:
    """The local version of the patched wheel: 0.21.0 -> 0.21.0+quark, 0.21.0+cu129 -> 0.21.0+cu129.quark."""
    try:
        local = Version(text).local
    except InvalidVersion as e:
        raise QuarkError(f"{wheel}: '{text}' is no version: name a wheel as its index has it") from e
    if local and LOCAL in local.split("."):
        raise QuarkError(f"{wheel}: was patched already: name the release's own wheel")
    return f"{text}.{LOCAL}" if local else f"{text}+{LOCAL}"


def repack(wheel: Path, series: Series, only: list[str], until: str | None, out: Path) -> tuple[Path, list[Patch]]:
    """Write the vLLM wheel `wheel` with patches of `series` into `out`; the new file, and the patches in it.

    Its version gets the local label "quark", its RECORD is made anew, and what it lists in its dist-info tells
    `vllm-quark status` in an environment what came with it. Raises QuarkError where it is no vLLM wheel, is
    damaged or was patched before, or no patch applies.
    """
    if not wheel.is_file():
        raise QuarkError(f"{wheel}: no such file: name a wheel (pip download --no-deps vllm==…)")
    try:
        with WheelFile(wheel) as old, tempfile.TemporaryDirectory() as folder:
            version = _version(wheel, old.parsed_filename["ver"])
            names = old.namelist()
            for name in names:
                if name.endswith(".py") and not name.startswith(("/", "..")):
                    old.extract(name, folder)
            tree = Tree(Path(folder))
            series = series.in_package(tree.package)
            verdicts = tree.steps(series, series.select(only, until))
            if not verdicts:
                raise QuarkError(f"{wheel}: no patch applies to it: nothing to do")
            changed = {file: data for verdict in verdicts for file, data in verdict.changed.items()}
            stem = f"{old.parsed_filename['name']}-{version}"
            dist_info = f"{stem}.dist-info"
            out.mkdir(parents=True, exist_ok=True)
            target = out / wheel.name.replace(old.parsed_filename["namever"], stem, 1)
            with tempfile.TemporaryDirectory(dir=out) as aside, WheelFile(Path(aside) / target.name, "w") as new:
                for entry in old.infolist():
                    # The signatures are of the RECORD as it was.
                    record = re.escape(old.record_path)
                    if entry.is_dir() or re.fullmatch(rf"{record}(\.jws|\.p7s)?", entry.filename):
                        continue
                    data = changed.pop(entry.filename, None)
                    data = old.read(entry) if data is None else data
                    name = entry.filename
                    if name.startswith(f"{old.dist_info_path}/"):
                        name = f"{dist_info}/{name.removeprefix(f'{old.dist_info_path}/')}"
                        if name == f"{dist_info}/METADATA":
                            data = re.sub(rb"(?m)^Version: .*?(?=\r?$)", f"Version: {version}".encode(), data, count=1)
                    copied = zipfile.ZipInfo(name, entry.date_time)
                    copied.external_attr, copied.compress_type = entry.external_attr, entry.compress_type
                    new.writestr(copied, data)
                for name, data in changed.items():
                    new.writestr(name, data)
                new.writestr(f"{dist_info}/{WHEEL_NOTE}", "".join(f"{verdict.patch.name}\n" for verdict in verdicts))
                new.close()
                (Path(aside) / target.name).rename(target)
    except (WheelError, zipfile.BadZipFile, EOFError) as e:
        raise QuarkError(f"{wheel}: no usable wheel: {e}: fetch it again") from e
    return target, [verdict.patch for verdict in verdicts]
