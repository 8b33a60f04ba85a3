# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""vllm-quark: the tool, with the series inside its wheel."""

import os
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SERIES = ("patches", "vllm", "csrc", "tests/quantization", "tests/entrypoints", "docs")


class BuildWithSeries(build_py):
    """Put patches and the files they bring into vllm_quark/series/ of the wheel."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        home = Path(self.build_lib) / "vllm_quark/series"
        shutil.rmtree(home, ignore_errors=True)
        for name in SERIES:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))


def requirements() -> list[str]:
    lines = (ROOT / "requirements/common.in").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


setup(
    name="vllm-quark",
    description="AMD Quark INT8 checkpoints in vLLM: right, or refused with a reason",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=["vllm_quark"],
    install_requires=requirements(),
    entry_points={"console_scripts": ["vllm-quark=vllm_quark.cli:main"]},
    cmdclass={"build_py": BuildWithSeries},
    # Without git's history (an archive of the tree) there is no version to take.
    use_scm_version={"fallback_version": os.environ.get("VLLM_QUARK_VERSION", "0.0.0")},
)
