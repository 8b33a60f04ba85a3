# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The CPU operator without PyTorch: AMX tiles computed in plain C++, and NEON under qemu where that is installed.

For NEON: apt-get install g++-aarch64-linux-gnu qemu-user
"""

import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def build(compiler: str, folder: Path, *settings: str) -> Path:
    cmake = shutil.which("cmake", path=sysconfig.get_path("scripts")) or shutil.which("cmake")
    if not cmake or not shutil.which(compiler):
        pytest.skip(f"no {compiler}" if cmake else "no cmake")
    chosen = [f"-DCMAKE_CXX_COMPILER={compiler}", *settings]
    for words in (["-S", HERE, "-B", folder, *chosen], ["--build", folder, "-j2"]):
        done = subprocess.run([cmake, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "check"


def names(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split()[0] for line in done.stdout.splitlines()]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
def test_amx_in_plain_cpp(tmp_path):
    made = build("c++", tmp_path, "-DINT8_MOE_EMULATE_AMX=ON")
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
    arm = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_EXE_LINKER_FLAGS=-static"]
    made = build(compiler, tmp_path, *arm)
    cpus = [["-cpu", "max"], ["-cpu", "cortex-a57"]] if qemu else [[]]
    found = [names(subprocess.run([*qemu, *cpu, made], capture_output=True, text=True)) for cpu in cpus]
    assert found[0] == ["neon_dotprod", "portable"]
    assert not qemu or found[1] == ["portable"], "a processor without dot products"
