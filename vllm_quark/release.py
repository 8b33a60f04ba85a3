# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""vLLM's source distributions from the package index, and the full tree with the series as commits."""

import os
import shutil
import tarfile
import tempfile
from pathlib import Path

from vllm_quark.commits import commit, git, identity
from vllm_quark.patches import Patch, QuarkError
from vllm_quark.series import Series
from vllm_quark.tree import Tree

_INDEX_VARIABLES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")


def fetch(version: str, cache: Path) -> Path:
    """The source distribution of vLLM `version`, in `cache` (from there where it was fetched before).

    Uses the index that uv or pip are told to use, and checks the index's digest. Raises QuarkError
    for an unknown version or where the index cannot be reached.
    """
    import requests
    from pypi_simple import PYPI_SIMPLE_ENDPOINT, DigestMismatchError, PyPISimple

    target = cache / f"vllm-{version}.tar.gz"
    if target.is_file():
        return target
    endpoint = next((os.environ[v] for v in _INDEX_VARIABLES if os.environ.get(v)), PYPI_SIMPLE_ENDPOINT)
    try:
        with PyPISimple(endpoint) as index:
            packages = index.get_project_page("vllm").packages
            found = [p for p in packages if p.version == version and p.package_type == "sdist"]
            if not found:
                known = [p.version for p in packages if p.package_type == "sdist" and p.version]
                raise QuarkError(f"no source distribution of vLLM {version} on the index: the newest is {known[-1]}")
            cache.mkdir(parents=True, exist_ok=True)
            new = cache / f".{target.name}.new"
            index.download_package(found[0], path=new)
            new.rename(target)
    except (requests.RequestException, DigestMismatchError, OSError) as e:
        raise QuarkError(f"vLLM {version} cannot be fetched: {' '.join(str(e).split())[:200]}: run again") from e
    return target


def make_tree(version: str, series: Series, patches: list[Patch], out: Path, cache: Path) -> list[Patch]:
    """Unpack vLLM `version` into `out` as a git repository: a base commit, then one commit a patch.

    The base is tagged v`version`, which is where vLLM's own build takes its version from. Returns
    the patches committed. Raises QuarkError where `out` exists.
    """
    if out.exists():
        raise QuarkError(f"{out}: exists already: delete it to make it anew")
    name, mail = identity(Path.cwd())
    archive = fetch(version, cache)
    out.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(new, filter="data")
        root = new / f"vllm-{version}"
        git(root, "init", "-q", "-b", "main")
        git(root, "config", "user.name", name)
        git(root, "config", "user.email", mail)
        git(root, "add", "-A", "-f")
        git(root, "commit", "-q", "--no-verify", "-m", f"vLLM {version}\n\nThe release's source distribution.")
        git(root, "tag", "-a", f"v{version}", "-m", f"vLLM {version}")
        done = []
        for patch, changed in Tree(root).steps(series, patches, {}):
            for file, data in changed.items():
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                (root / file).write_bytes(data)
            commit(root, patch)
            done.append(patch)
        root.rename(out)
        return done
    finally:
        shutil.rmtree(new, ignore_errors=True)
