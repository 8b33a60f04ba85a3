# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""vllm-quark: the tool, with the series inside its wheel, and the CPU operator where it can be built."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools_scm import ScmVersion

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

from vllm_quark import SERIES  # noqa: E402

OPERATOR = "vllm_quark._int8_moe_C"


def program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))


def torch_home() -> Path | None:
    """The folder of the installed torch, not imported; the operator needs its stable ABI of 2.10."""
    for folder in sys.path:
        header = Path(folder) / "torch/include/torch/csrc/stable/ops.h"
        if header.is_file() and "torch_parallel_for" in header.read_text():
            return header.parents[4]
    return None


def missing() -> str | None:
    """What keeps the operator from being built here."""
    if os.environ.get("VLLM_QUARK_OPERATOR") == "0":
        return "VLLM_QUARK_OPERATOR=0"
    if not program("cmake"):
        return "no cmake"
    if not (os.environ.get("CXX") or program("c++") or program("g++") or program("clang++")):
        return "no C++ compiler"
    return None if torch_home() else "no torch >= 2.10 (install with --no-build-isolation into vLLM's environment)"


class BuildWithSeries(build_py):
    """Put patches and the files they bring into vllm_quark/series/ of the wheel."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        home = Path(self.build_lib) / "vllm_quark/series"
        shutil.rmtree(home, ignore_errors=True)
        for name in (*SERIES, "docs"):
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))


class BuildOperator(build_ext):
    """csrc/cpu/int8_moe, by CMake. SANITIZE and CMAKE_ARGS are handed on."""

    def get_ext_filename(self, fullname: str) -> str:
        # PyTorch's stable ABI, and no Python in it
        return f"{fullname.replace('.', '/')}.abi3.so"

    def build_extension(self, ext: Extension) -> None:
        build, out = Path(self.build_temp).resolve(), Path(self.get_ext_fullpath(ext.name)).resolve()
        cmake = str(program("cmake"))
        words = [f"-DTORCH_HOME={torch_home()}", f"-DSANITIZE={os.environ.get('SANITIZE', '')}"]
        if ninja := program("ninja"):
            words += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        words += os.environ.get("CMAKE_ARGS", "").split()
        build.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run([cmake, "-S", ROOT, "-B", build, *words], check=True)
            subprocess.run([cmake, "--build", build, "-j", str(os.cpu_count() or 1)], check=True)
        except subprocess.CalledProcessError as error:
            command = " ".join(map(str, error.cmd[:2]))
            way_out = "VLLM_QUARK_OPERATOR=0 installs without the operator"
            sys.exit(f"csrc/cpu/int8_moe: {command} failed, see above; {way_out}")
        library = build / "csrc/cpu/int8_moe/_int8_moe_C.abi3.so"
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_name(f".{out.name}.{os.getpid()}")
        shutil.copy(library, part)
        part.replace(out)


class AnyPython(bdist_wheel):
    """The operator knows no Python: one wheel per platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return super().get_tag() if self.root_is_pure else ("py3", "none", super().get_tag()[2])


def next_version(version: ScmVersion) -> str:
    """The tag, or the newest version in CHANGELOG.md with the number of commits."""
    if version.exact:
        return str(version.tag)
    newest = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    return f"{newest[1] if newest else '0.0.0'}.dev{version.distance or 0}"


if reason := missing():
    print(f"vllm-quark: without the CPU operator ({reason}): INT8 experts on CPU run on oneDNN", file=sys.stderr)

setup(
    packages=["vllm_quark", "vllm_quark.checkpoint", "vllm_quark.convert", "vllm_quark.verify"],
    ext_modules=[] if reason else [Extension(OPERATOR, sources=[])],
    cmdclass={"build_py": BuildWithSeries, "build_ext": BuildOperator, "bdist_wheel": AnyPython},
    # Without git's history (an archive of the tree) there is no version to take.
    use_scm_version={"version_scheme": next_version, "fallback_version": os.environ.get("VLLM_QUARK_VERSION", "0.0.0")},
)
