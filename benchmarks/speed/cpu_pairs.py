# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Versions of the CPU operator in one process, in turn: for machines whose figures differ from run to run.

    python -m benchmarks.speed.cpu_pairs FIRST [OTHER ...] [--threads 1] [--tokens 8,512] [--shapes "32,1280,4096,8"]
    python -m benchmarks.speed.cpu_pairs FIRST [OTHER ...] --build FOLDER

FIRST, OTHER: git revisions, or folders with the files of csrc/cpu/int8_moe; without OTHER the working tree. Needs git,
CMake and a C++ compiler with OpenMP, no vLLM. Prints for each shape and number of tokens the medians, the median of
each round's ratio, the first version's time over the other's, its quartiles, and whether the results are other bits.
VLLM_INT8_MOE_ISA caps the instruction set. --build leaves the program and the libraries in a folder, and prints the
command that runs them, for another machine.
"""

import argparse
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = "csrc/cpu/int8_moe"
SHAPES = "16,64,128,4;32,1280,4096,8;128,768,2048,8"
TOKENS = "1,8,64,128,256,512,2048"
PROJECT = """\
cmake_minimum_required(VERSION 3.18)
project(cpu_pairs LANGUAGES CXX)
set(CMAKE_BUILD_TYPE Release)
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(INT8_MOE_KERNELS_ONLY ON)
find_package(OpenMP REQUIRED COMPONENTS CXX)
add_subdirectory({kernels} int8_moe)
add_library(version SHARED {source} $<TARGET_OBJECTS:int8_moe_kernels>)
target_include_directories(version PRIVATE {kernels})
target_compile_definitions(version PRIVATE CPU_PAIRS_LIBRARY)
add_executable(pairs {source})
target_link_libraries(pairs OpenMP::OpenMP_CXX ${{CMAKE_DL_LIBS}})
"""


def build(version: str | None, folder: Path) -> Path:
    """A build folder with libversion.so of a version's kernels, and the program `pairs`. None: the working tree."""
    kernels = ROOT / KERNELS
    if version is not None and Path(version).is_dir():
        kernels = Path(version).resolve()
    elif version is not None:
        command = ["git", "-C", str(ROOT), "archive", version, KERNELS]
        archive = subprocess.run(command, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        kernels = folder / KERNELS
    source = Path(__file__).with_suffix(".cpp")
    (folder / "CMakeLists.txt").write_text(PROJECT.format(kernels=kernels, source=source))
    for command in (["cmake", "-S", folder, "-B", folder / "build"], ["cmake", "--build", folder / "build", "-j2"]):
        subprocess.run([str(c) for c in command], check=True, stdout=subprocess.DEVNULL)
    return folder / "build"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first")
    parser.add_argument("others", nargs="*", metavar="other")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", default=TOKENS, help=f"default {TOKENS}")
    parser.add_argument("--shapes", default=SHAPES, help=f"experts, N, K and top-k of each (default {SHAPES})")
    parser.add_argument("--build", type=Path, metavar="FOLDER", help="a new folder for the program and the libraries")
    args = parser.parse_args()
    versions = [args.first, *(args.others or [None])]
    names = [Path(v).name if v else "working-tree" for v in versions]
    if len(set(names)) < len(names):
        parser.error(f"two versions have the same name: {', '.join(names)}")
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", args.tokens):
        parser.error(f"--tokens: {args.tokens} is no list as 8,512")
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){3}(;[1-9]\d*(,[1-9]\d*){3})*", args.shapes):
        parser.error(f"--shapes: {args.shapes} is no list as 16,64,128,4;32,1280,4096,8")
    if args.build and (args.build.exists() or not args.build.parent.is_dir()):
        parser.error(f"--build: {args.build} has to be a new folder in one that exists")
    # Beside --build's folder, so that a rename brings it there whole.
    with tempfile.TemporaryDirectory(prefix="cpu-pairs-", dir=args.build.parent if args.build else None) as temp:
        folder = Path(temp) / "built"
        folder.mkdir()
        for name, version in zip(names, versions, strict=True):
            place = Path(temp) / name
            place.mkdir()
            try:
                built = build(version, place)
            except (OSError, subprocess.CalledProcessError) as e:
                print(f"cpu_pairs: {version or 'the working tree'}: {e}", file=sys.stderr)
                return 2
            (built / "libversion.so").rename(folder / f"lib{name}.so")
            (built / "pairs").replace(folder / "pairs")
        home = args.build or folder
        words = [str(home / "pairs"), str(args.threads), args.tokens, args.shapes]
        words += [f"{name}={home / f'lib{name}.so'}" for name in names]
        if not args.build:
            return subprocess.run(words).returncode
        folder.rename(args.build)
        print(shlex.join(words))
    return 0


if __name__ == "__main__":
    sys.exit(main())
