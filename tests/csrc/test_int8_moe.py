# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The CPU operator without PyTorch: with emulated AMX tiles, under sanitizers, and for NEON under qemu where that is
installed.

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
    configure = ["-S", HERE, "-B", folder, f"-DCMAKE_CXX_COMPILER={compiler}", *settings]
    for arguments in (configure, ["--build", folder, "-j2"]):
        process = subprocess.run([cmake, *arguments], capture_output=True, text=True)
        assert process.returncode == 0, process.stdout + process.stderr
    return folder / "check"


def list_isas(command: list) -> list[str]:
    """The instruction sets that the program checked."""
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return [line.split()[0] for line in process.stdout.splitlines()]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
def test_emulated_amx(tmp_path):
    isas = list_isas([build("c++", tmp_path, "-DINT8_MOE_EMULATE_AMX=ON")])
    assert isas[-1] == "portable"
    if "avx512_vnni" not in isas:
        pytest.skip("no AVX512-VNNI here, which emulates AMX")
    assert isas[0] == "amx"


@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_sanitizers_report_nothing(tmp_path, sanitizers):
    """Threads here are those of the C++ library: the thread sanitizer does not know OpenMP's."""
    binary = build("c++", tmp_path, "-DINT8_MOE_EMULATE_AMX=ON", f"-DSANITIZE={sanitizers}")
    assert list_isas([binary])[-1] == "portable"


# What ldtilecfg reads: palette 1, then of eight tiles the bytes of a row (16 bits each) and the rows.
TILES = struct.pack("<BB14x16H16B", 1, 0, *[64] * 8, *[0] * 8, *[16] * 8, *[0] * 8)
WIDTHS = {"zmm": 64, "ymm": 32, "xmm": 16, "movabs": 8, "movq": 8, "movl": 4, "movw": 2, "movb": 1}


def find_tile_config_faults(binary: Path) -> list[str]:
    """For each ldtilecfg of an object file what is wrong with its operand; empty where nothing is.

    The operand is read-only data, or on the stack. On the stack the instructions before it, back to the function's
    start or a jump away, have to store the sizes.
    """
    command = ["objdump", "-dr", "--no-show-raw-insn", binary]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    faults = []
    for i, line in enumerate(lines):
        if not (operand := re.search(r"\tldtilecfg (.*)", line)):
            continue
        if "(%rip)" in operand[1]:
            section, offset = re.search(r"(\.rodata\S*?)\+(0x[0-9a-f]+)$", lines[i + 1]).groups()  # type: ignore
            contents = binary.with_suffix(".bin")
            subprocess.run(["objcopy", "-O", "binary", "-j", section, binary, contents], check=True)
            start = int(offset, 16) + 4  # relative to the end of the instruction
            tiles = contents.read_bytes()[start : start + 64]
            faults.append("" if tiles == TILES else f"not the tiles: {lines[i + 1]}")
            continue
        displacement, base = re.search(r"(-?0x[0-9a-f]+)?(\(.*\))", operand[1]).groups()  # type: ignore
        stored: set[int] = set()
        for previous in reversed(lines[:i]):
            if re.search(r">:$|\t(jmp|ret)", previous):
                break
            store = re.search(r"\tv?mov.* (?:\$[^,]*|%(\w+)),(-?0x[0-9a-f]+)?" + re.escape(base) + "$", previous)
            # not the store that clears the whole struct
            if store and not (store[1] or "").startswith("zmm"):
                width = next((n for word, n in WIDTHS.items() if word in previous), 8)
                start = int(store[2] or "0", 16) - int(displacement or "0", 16)
                stored |= set(range(start, start + width))
        missing = {0, *range(16, 32), *range(48, 56)} - stored
        faults.append(f"not stored: bytes {sorted(missing)}" if missing else "")
    return faults


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
@pytest.mark.parametrize("flags", ["-O2", "-O3", "-O3 -fno-inline-small-functions"])
def test_tiles_are_configured_from_all_64_bytes(tmp_path, flags):
    """GCC 12 drops stores of what _tile_loadconfig reads, depending on what it inlines."""
    if not (shutil.which("c++") and shutil.which("objdump")):
        pytest.skip("needs a C++ compiler and binutils")
    binary = tmp_path / "amx.o"
    sets = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mavx512vnni -mamx-tile -mamx-int8"
    settings = ["-std=c++20", "-fPIC", *flags.split(), *sets.split()]
    subprocess.run(["c++", *settings, "-c", SOURCES / "amx.cpp", "-o", binary], check=True)
    faults = find_tile_config_faults(binary)
    assert faults and not any(faults)


def test_neon(tmp_path):
    qemu = [] if platform.machine() == "aarch64" else [shutil.which("qemu-aarch64")]
    if qemu == [None]:
        pytest.skip("no qemu-aarch64")
    compiler = "c++" if not qemu else "aarch64-linux-gnu-g++"
    arm = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_EXE_LINKER_FLAGS=-static"]
    binary = build(compiler, tmp_path, *arm)
    cpus = [["-cpu", "max"], ["-cpu", "cortex-a57"]] if qemu else [[]]
    isas = [list_isas([*qemu, *cpu, binary]) for cpu in cpus]
    assert isas[0] == ["neon_i8mm", "neon_dotprod", "portable"]
    assert not qemu or isas[1] == ["portable"], "a processor without dot products"
