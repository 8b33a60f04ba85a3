# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Two revisions of the CPU operator in one process, in turn: for machines whose figures differ from run to run.

    python -m benchmarks.speed.cpu_pairs OLD [NEW] [--threads 1]

OLD, NEW: git revisions; without NEW the working tree. Needs git, CMake and a C++ compiler, no vLLM. Prints for each
shape and number of tokens both medians, the median of the pairs' ratios, old over new, its quartiles, and whether the
results are other bits. VLLM_INT8_MOE_ISA caps the instruction set.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = "csrc/cpu/int8_moe"
PROJECT = """\
cmake_minimum_required(VERSION 3.18)
project(cpu_pairs LANGUAGES CXX)
set(CMAKE_BUILD_TYPE Release)
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(INT8_MOE_KERNELS_ONLY ON)
find_package(Threads REQUIRED)
add_subdirectory({kernels} int8_moe)
add_library(side SHARED {source} $<TARGET_OBJECTS:int8_moe_kernels>)
target_include_directories(side PRIVATE {kernels})
target_compile_definitions(side PRIVATE CPU_PAIRS_LIBRARY)
target_link_libraries(side Threads::Threads)
add_executable(pairs {source})
target_link_libraries(pairs Threads::Threads ${{CMAKE_DL_LIBS}})
"""


def build(revision: str | None, folder: Path) -> Path:
    """A build folder with libside.so of `revision`'s kernels, and the program `pairs`."""
    kernels = ROOT / KERNELS
    if revision is not None:
        command = ["git", "-C", str(ROOT), "archive", revision, KERNELS]
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
    parser.add_argument("old")
    parser.add_argument("new", nargs="?")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cpu-pairs-") as temp:
        sides = []
        for name, revision in (("old", args.old), ("new", args.new)):
            folder = Path(temp) / name
            folder.mkdir()
            try:
                sides.append(build(revision, folder))
            except (OSError, subprocess.CalledProcessError) as e:
                print(f"cpu_pairs: {revision or 'the working tree'}: {e}", file=sys.stderr)
                return 2
        libraries = [str(side / "libside.so") for side in sides]
        return subprocess.run([str(sides[1] / "pairs"), *libraries, str(args.threads)]).returncode


if __name__ == "__main__":
    sys.exit(main())
