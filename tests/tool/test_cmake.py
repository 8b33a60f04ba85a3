# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Edits of CMake files, and the native operator's own build in a tree."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from trees import RELEASE, ROOT, cli

from vllm_quark.cmake import read_commands
from vllm_quark.edit import Outcome, edit
from vllm_quark.patches import FileEdit, PatchError

SOURCE = """# message(one) is a comment
set(NAMES "a;b (c" [=[ ) ]] ]=]
    $<TARGET_OBJECTS:x>)  # message(two
#[[ message(three)
]]
if (A AND (B OR C))
    message(STATUS "é: four")
endif()
"""
RULES = {
    "file": "cmake/a.cmake",
    "present": {"command": "add_subdirectory", "argument": "^here$"},
    "rewrite": [{"anchor": "message", "rule": {"command": "message"}, "above": "add_subdirectory(here)\n"}],
}


def test_commands():
    calls = read_commands(SOURCE)
    assert [c.name for c in calls] == ["set", "if", "message", "endif"]
    assert calls[0].arguments == ("NAMES", "a;b (c", "[=[ ) ]] ]=]", "$<TARGET_OBJECTS:x>")
    assert SOURCE.encode()[calls[2].start : calls[2].end].decode() == 'message(STATUS "é: four")'


def test_edit():
    rules = FileEdit(**RULES)
    result = edit(SOURCE, rules)
    assert result.outcome is Outcome.APPLIES
    assert result.text == SOURCE.replace("    message(STATUS", "    add_subdirectory(here)\n    message(STATUS")
    assert edit(result.text, rules).outcome is Outcome.PRESENT
    assert "found 2 times" in edit(SOURCE + "message(five)\n", rules).detail
    assert "not found" in edit("# message(one)\n", rules).detail
    assert edit(SOURCE, FileEdit(**RULES, needs={"command": "project"})).outcome is Outcome.ABSENT


def test_broken_file_is_a_conflict():
    result = edit("set(A\n", FileEdit(**RULES))
    assert result.outcome is Outcome.CONFLICT and "cmake/a.cmake:1: not valid CMake" in result.detail
    below = [{"anchor": "m", "rule": {"command": "message"}, "below": "add_subdirectory(here\n"}]
    with pytest.raises(PatchError, match="no valid CMake"):
        edit(SOURCE, FileEdit(**RULES | {"rewrite": below}))


@pytest.mark.parametrize(
    "change",
    [
        {"present": {"kind": "string"}},
        {"imports": ["import os"]},
        {"rewrite": [{"anchor": "m", "rule": {"command": "message"}, "fix": "x"}]},
    ],
)
def test_rules_of_another_language_are_refused(change):
    with pytest.raises(ValueError, match="CMake"):
        FileEdit(**RULES | change)


def test_a_source_tree_builds_and_installs_the_operator(unpacked, tmp_path):
    """As vLLM's setup.py does: configured with Torch found, one target built, one component installed.

    The tree's own CMakeLists.txt fetches oneDNN; one with its lines about installing and those that the patch adds
    stands for it.
    """
    cmake = shutil.which("cmake", path=sysconfig.get_path("scripts"))
    if not cmake or not shutil.which("c++"):
        pytest.skip("needs cmake and a C++ compiler")
    stock = (unpacked / "setup.py").read_text()
    before = (unpacked / "cmake/cpu_extension.cmake").read_text().splitlines()
    assert cli(ROOT, "apply", unpacked, "--only", "0015").returncode == 0
    added = (unpacked / "setup.py").read_text().replace(stock.partition("if _is_cpu():")[0], "")
    assert 'CMakeExtension(name="vllm._int8_moe_C")' in added
    module = (unpacked / "cmake/cpu_extension.cmake").read_text()
    lines = [x for x in module.splitlines() if x not in before]
    rules = re.findall(r"^install\(.*\)$", (unpacked / "CMakeLists.txt").read_text(), re.M)
    assert any("CMAKE_INSTALL_LOCAL_ONLY" in x for x in rules), "folders below may install here: their case is untested"
    torch = Path(
        subprocess.run(
            [sys.executable, "-c", "import importlib.util as u; print(u.find_spec('torch').origin)"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    ).parent
    (unpacked / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.26)\nproject(stand_in LANGUAGES CXX)\n"
        f"set(TORCH_INSTALL_PREFIX {torch})\n" + "\n".join([*rules, *lines, ""])
    )
    build = tmp_path / "build"
    for words in (
        ["-S", unpacked, "-B", build, "-DCMAKE_BUILD_TYPE=RelWithDebInfo"],
        ["--build", build, "--target=_int8_moe_C", "-j2"],
        ["--install", build, "--prefix", tmp_path / "site", "--component", "_int8_moe_C"],
    ):
        result = subprocess.run([cmake, *words], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    library = tmp_path / "site/vllm/_int8_moe_C.abi3.so"
    code = f"import torch; torch.ops.load_library({str(library)!r}); print(torch.ops._int8_moe_C.isas()[-1])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "portable", result.stderr
    assert RELEASE in (unpacked / "PKG-INFO").read_text()


@pytest.mark.parametrize("operator", ["0", "1"])
def test_the_wheel_has_the_operator_where_it_can_be_built(tmp_path, operator):
    """Without it the wheel is for any machine; with it, for any Python of this one."""
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", ".gpu", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    words = ["build", "-q", "--wheel", "--no-build-isolation", "--python", sys.executable, "-o", tmp_path / "out", copy]
    env = {**os.environ, "VLLM_QUARK_OPERATOR": operator}
    result = subprocess.run([Path(sys.executable).with_name("uv"), *words], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert ("vllm_quark/_int8_moe_C.abi3.so" in names) == (operator == "1")
    assert "vllm_quark/series/csrc/cpu/int8_moe/experts.h" in names
    assert wheel.name.endswith("-py3-none-any.whl") == (operator == "0") and "-py3-none-" in wheel.name
