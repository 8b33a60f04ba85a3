# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The CPU operator without PyTorch: AMX tiles computed in plain C++, and NEON under qemu where that is installed.

For NEON: apt-get install g++-aarch64-linux-gnu qemu-user
"""

import platform
import re
import shutil
import struct
import subprocess
import sysconfig
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc/cpu/int8_moe"


def build(compiler: str, folder: Path, *settings: str) -> Path:
    cmake = shutil.which("cmake", path=sysconfig.get_path("scripts")) or shutil.which("cmake")
    if not cmake or not shutil.which(compiler):
        pytest.skip(f"no {compiler}" if cmake else "no cmake")
    chosen = [f"-DCMAKE_CXX_COMPILER={compiler}", *settings]
    for words in (["-S", HERE, "-B", folder, *chosen], ["--build", folder, "-j2"]):
        process = subprocess.run([cmake, *words], capture_output=True, text=True)
        assert process.returncode == 0, process.stdout + process.stderr
    return folder / "check"


def names(process: subprocess.CompletedProcess) -> list[str]:
    assert process.returncode == 0, process.stdout + process.stderr
    return [line.split()[0] for line in process.stdout.splitlines()]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
def test_amx_in_plain_cpp(tmp_path):
    binary = build("c++", tmp_path, "-DINT8_MOE_EMULATE_AMX=ON")
    listing = names(subprocess.run([binary], capture_output=True, text=True))
    assert listing[-1] == "portable"
    if "avx512_vnni" not in listing:
        pytest.skip("no AVX512-VNNI here, which AMX builds on")
    assert listing[0] == "amx"


# What ldtilecfg reads: palette 1, then of eight tiles the bytes of a row (16 bits each) and the rows.
TILES = struct.pack("<BB14x16H16B", 1, 0, *[64] * 8, *[0] * 8, *[16] * 8, *[0] * 8)
WIDTHS = {"zmm": 64, "ymm": 32, "xmm": 16, "movabs": 8, "movq": 8, "movl": 4, "movw": 2, "movb": 1}


def tile_configs(binary: Path) -> list[str]:
    """What is wrong with what each ldtilecfg of an object file reads; empty where it is all there.

    It is read-only data, or on the stack: there instructions before it, back to its function's start or a jump away,
    have to store the sizes.
    """
    words = ["objdump", "-dr", "--no-show-raw-insn", binary]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    listing = []
    for i, line in enumerate(lines):
        if not (operand := re.search(r"\tldtilecfg (.*)", line)):
            continue
        if "(%rip)" in operand[1]:
            section, offset = re.search(r"(\.rodata\S*?)\+(0x[0-9a-f]+)$", lines[i + 1]).groups()  # type: ignore
            out = binary.with_suffix(".bin")
            subprocess.run(["objcopy", "-O", "binary", "-j", section, binary, out], check=True)
            start = int(offset, 16) + 4  # relative to the end of the instruction
            listing.append("" if out.read_bytes()[start : start + 64] == TILES else f"not the tiles: {lines[i + 1]}")
            continue
        place, base = re.search(r"(-?0x[0-9a-f]+)?(\(.*\))", operand[1]).groups()  # type: ignore
        stored: set[int] = set()
        for before in reversed(lines[:i]):
            if re.search(r">:$|\t(jmp|ret)", before):
                break
            store = re.search(r"\tv?mov.* (?:\$[^,]*|%(\w+)),(-?0x[0-9a-f]+)?" + re.escape(base) + "$", before)
            # not of the zeros that the whole begins with
            if store and not (store[1] or "").startswith("zmm"):
                width = next((n for word, n in WIDTHS.items() if word in before), 8)
                at = int(store[2] or "0", 16) - int(place or "0", 16)
                stored |= set(range(at, at + width))
        lost = {0, *range(16, 32), *range(48, 56)} - stored
        listing.append(f"not stored: bytes {sorted(lost)}" if lost else "")
    return listing


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
@pytest.mark.parametrize("flags", ["-O2", "-O3", "-O3 -fno-inline-small-functions"])
def test_tiles_are_configured_from_all_64_bytes(tmp_path, flags):
    """GCC 12 drops stores of what _tile_loadconfig reads, depending on what it inlines."""
    if not (shutil.which("c++") and shutil.which("objdump")):
        pytest.skip("needs a C++ compiler and binutils")
    binary = tmp_path / "amx.o"
    sets = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mavx512vnni -mamx-tile -mamx-int8"
    words = ["c++", "-std=c++20", "-fPIC", *flags.split(), *sets.split(), "-c", SOURCES / "amx.cpp", "-o", binary]
    subprocess.run(words, check=True)
    listing = tile_configs(binary)
    assert listing and not any(listing)


def test_neon(tmp_path):
    qemu = [] if platform.machine() == "aarch64" else [shutil.which("qemu-aarch64")]
    if qemu == [None]:
        pytest.skip("no qemu-aarch64")
    compiler = "c++" if not qemu else "aarch64-linux-gnu-g++"
    arm = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_EXE_LINKER_FLAGS=-static"]
    binary = build(compiler, tmp_path, *arm)
    cpus = [["-cpu", "max"], ["-cpu", "cortex-a57"]] if qemu else [[]]
    listing = [names(subprocess.run([*qemu, *cpu, binary], capture_output=True, text=True)) for cpu in cpus]
    assert listing[0] == ["neon_i8mm", "neon_dotprod", "portable"]
    assert not qemu or listing[1] == ["portable"], "a processor without dot products"
