# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The CPU operator without PyTorch: AMX tiles computed in plain C++, and NEON under qemu where that is installed.

For NEON: apt-get install g++-aarch64-linux-gnu qemu-user
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc/cpu/int8_moe"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"]
X86 = {
    "dispatch": [],
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_vnni": [*AVX512, "-mavx512vnni"],
    "amx": [*AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-int8"],
}
ARM = {"dispatch": [], "portable": [], "neon": ["-march=armv8.2-a+dotprod"]}


def build(compiler: str, units: dict[str, list[str]], folder: Path, *flags: str) -> Path:
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    common = [compiler, "-std=c++20", "-O2", *flags]
    objects = []
    for name, own in units.items():
        objects.append(folder / f"{name}.o")
        subprocess.run([*common, *own, "-c", SOURCES / f"{name}.cpp", "-o", objects[-1]], check=True)
    made = folder / "check"
    source = ROOT / "tests/csrc/int8_moe_check.cpp"
    subprocess.run([*common, "-static-libstdc++", source, *objects, "-o", made], check=True)
    return made


def names(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split()[0] for line in done.stdout.splitlines()]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
def test_amx_in_plain_cpp(tmp_path):
    made = build("c++", X86, tmp_path, "-DINT8_MOE_X86", "-DINT8_MOE_EMULATE_AMX")
    found = names(subprocess.run([made], capture_output=True, text=True))
    assert found[-1] == "portable"
    if "avx512_vnni" not in found:
        pytest.skip("no AVX512-VNNI here, which AMX builds on")
    assert found[0] == "amx"


def test_neon(tmp_path):
    qemu = [] if platform.machine() == "aarch64" else [shutil.which("qemu-aarch64")]
    if qemu == [None]:
        pytest.skip("no qemu-aarch64")
    compiler = "c++" if not qemu else "aarch64-linux-gnu-g++"
    made = build(compiler, ARM, tmp_path, "-DINT8_MOE_NEON", "-static")
    cpus = [["-cpu", "max"], ["-cpu", "cortex-a57"]] if qemu else [[]]
    found = [names(subprocess.run([*qemu, *cpu, made], capture_output=True, text=True)) for cpu in cpus]
    assert found[0] == ["neon_dotprod", "portable"]
    assert not qemu or found[1] == ["portable"], "a processor without dot products"
