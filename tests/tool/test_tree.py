# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""status, apply, revert on synthetic trees, through the command."""

import json
import os
import shutil
import subprocess

import pytest
from trees import ALPHA, BETA, BROUGHT, cli, make_tree, one_line, snapshot, visible, write

GOOD_ALPHA = ALPHA.replace("    )\n", '    )\n\n    packed = {"a": ["b"]}\n').replace("empty(n)", "empty((n, 1))")


def statuses(home, tree, *words) -> dict[str, str]:
    result = cli(home, "status", tree, "--json", *words)
    return {p["name"][:4]: p["status"] for p in json.loads(result.stdout)["patches"]}


BEFORE = {"0001": "applies", "0002": "applies", "0003": "applies", "0004": "absent", "0005": "upstream"}
AFTER = BEFORE | {"0001": "applied", "0002": "applied", "0003": "applied"}


def test_apply_and_revert(home, tree):
    before = snapshot(tree)
    assert statuses(home, tree) == BEFORE
    assert cli(home, "status", tree).returncode == 1
    assert snapshot(tree) == before

    result = cli(home, "apply", tree)
    assert result.returncode == 0, result.stderr
    assert statuses(home, tree) == AFTER
    assert cli(home, "status", tree).returncode == 0
    assert (tree / "vllm/alpha.py").read_text() == GOOD_ALPHA
    assert (tree / "vllm/alpha.py").stat().st_mode & 0o777 == 0o755
    assert (tree / "vllm/model_executor/beta.py").read_text() == BETA.replace("x > 1", "x > 2")
    for file, text in BROUGHT.items():
        assert (tree / file).read_text() == text

    once = snapshot(tree)
    assert cli(home, "apply", tree).returncode == 0
    assert snapshot(tree) == once, "apply is idempotent"

    result = cli(home, "revert", tree)
    assert result.returncode == 0 and "reverted 0002-scale" in result.stdout
    assert snapshot(tree) == before
    assert "nothing to revert" in cli(home, "revert", tree).stdout


def test_installed_package_takes_only_its_own_files(home, tmp_path):
    site = make_tree(tmp_path / "site", source=False)
    before = snapshot(site)
    assert cli(home, "apply", site).returncode == 0
    assert not (site / "tests").exists() and (site / "vllm/new/deep/gamma.py").exists()
    assert statuses(home, site) == AFTER
    assert cli(home, "revert", site).returncode == 0
    assert snapshot(site) == before


@pytest.mark.parametrize("order", [("0001", "0002"), ("0002", "0001")])
def test_patches_one_by_one_make_the_same_tree(home, tree, tmp_path, order):
    whole = make_tree(tmp_path / "whole")
    cli(home, "apply", whole, "--until", "0002")
    before = snapshot(tree)
    for name in order:
        assert cli(home, "apply", tree, "--only", name).returncode == 0
    assert visible(tree) == visible(whole)
    assert statuses(home, tree) == AFTER | {"0003": "applies"}

    assert cli(home, "revert", tree, "--only", order[0]).returncode == 0
    assert statuses(home, tree)[order[0]] == "applies"
    assert statuses(home, tree)[order[1]] == "applied"
    assert cli(home, "revert", tree).returncode == 0
    assert snapshot(tree) == before


def test_hard_links_and_links_stay_untouched(home, tree, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    os.link(tree / "vllm/alpha.py", cache / "alpha.py")
    shutil.move(tree / "vllm/model_executor/beta.py", cache / "beta.py")
    (tree / "vllm/model_executor/beta.py").symlink_to(cache / "beta.py")
    before, cached = snapshot(tree), snapshot(cache)
    assert cli(home, "apply", tree).returncode == 0
    assert snapshot(cache) == cached, "the cache that files are linked to never changes"
    assert not (tree / "vllm/model_executor/beta.py").is_symlink()
    assert cli(home, "revert", tree).returncode == 0
    assert snapshot(tree) == before


def test_windows_line_ends_stay(home, tree):
    for name in ("alpha.py", "model_executor/beta.py"):
        path = tree / "vllm" / name
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    before = snapshot(tree)
    assert cli(home, "apply", tree).returncode == 0
    assert (tree / "vllm/alpha.py").read_bytes() == GOOD_ALPHA.replace("\n", "\r\n").encode()
    assert cli(home, "revert", tree).returncode == 0
    assert snapshot(tree) == before


def test_other_edits_before_apply_stay(home, tree):
    path = tree / "vllm/alpha.py"
    path.write_text("# a fork's own line\n" + path.read_text())
    before = snapshot(tree)
    assert cli(home, "apply", tree).returncode == 0
    assert path.read_text() == "# a fork's own line\n" + GOOD_ALPHA
    assert cli(home, "revert", tree).returncode == 0
    assert snapshot(tree) == before


def test_reinstall_over_a_patched_tree(home, tree):
    assert cli(home, "apply", tree).returncode == 0
    newer = ALPHA.replace("class Alpha", "x = 1\n\n\nclass Alpha")
    (tree / "vllm/alpha.py").write_text(newer)
    (tree / "vllm/model_executor/beta.py").write_text(BETA)
    assert statuses(home, tree) == BEFORE | {"0003": "applied"}
    assert cli(home, "apply", tree).returncode == 0
    assert statuses(home, tree) == AFTER
    assert cli(home, "revert", tree).returncode == 0
    assert (tree / "vllm/alpha.py").read_text() == newer


def test_newer_version_of_the_series(home, tree):
    """What an older vllm-quark wrote is said to be old, renewed by apply, and reverted to the same original."""
    before = snapshot(tree)
    assert cli(home, "apply", tree).returncode == 0
    write(home, {"vllm/configs/c.json": "{2}\n"})
    patch = home / "patches/0001-mapping.yaml"
    patch.write_text(patch.read_text().replace('packed = {"a": ["b"]}', 'packed = {"a": ["c"]}'))
    assert statuses(home, tree) == AFTER | {"0001": "applies", "0002": "applies", "0003": "applies"}
    assert cli(home, "apply", tree).returncode == 0
    assert statuses(home, tree) == AFTER
    assert (tree / "vllm/configs/c.json").read_text() == "{2}\n"
    assert '"c"' in (tree / "vllm/alpha.py").read_text()
    (home / "patches/0003-only-files.yaml").unlink()
    assert cli(home, "apply", tree).returncode == 0
    assert not (tree / "vllm/configs").exists()
    assert cli(home, "revert", tree).returncode == 0
    assert snapshot(tree) == before


def test_deleted_file_comes_back(home, tree):
    assert cli(home, "apply", tree).returncode == 0
    (tree / "vllm/configs/c.json").unlink()
    assert statuses(home, tree)["0003"] == "applies"
    assert cli(home, "apply", tree).returncode == 0
    assert statuses(home, tree) == AFTER


def test_deleted_patched_file_comes_back(home, tree):
    assert cli(home, "apply", tree).returncode == 0
    (tree / "vllm/model_executor/beta.py").unlink()
    result = cli(home, "status", tree)
    assert result.returncode == 1 and "vllm/model_executor/beta.py is missing: apply brings it back" in result.stdout
    assert cli(home, "apply", tree).returncode == 0
    assert statuses(home, tree) == AFTER


def test_revert_of_a_patch_that_is_out(home, tree):
    assert cli(home, "apply", tree, "--only", "1").returncode == 0
    result = cli(home, "revert", tree, "--only", "3")
    assert (result.returncode, result.stdout) == (0, "nothing to revert: 0003-only-files: not applied by vllm-quark\n")


def test_folders_made_go_unless_used(home, tree):
    assert cli(home, "apply", tree).returncode == 0
    (tree / "vllm/new/deep/__pycache__").mkdir()
    (tree / "vllm/new/deep/__pycache__/gamma.cpython-311.pyc").write_bytes(b"x")
    (tree / "vllm/configs/mine.json").write_text("mine")
    assert cli(home, "revert", tree).returncode == 0
    assert not (tree / "vllm/new").exists()
    assert [p.name for p in (tree / "vllm/configs").iterdir()] == ["mine.json"]


def test_git_does_not_see_the_record(home, tree):
    subprocess.run(["git", "init", "-q", tree], check=True)
    assert cli(home, "apply", tree).returncode == 0
    seen = subprocess.run(["git", "-C", tree, "status", "--short", "-uall"], capture_output=True, text=True, check=True)
    assert ".vllm-quark" not in seen.stdout


def test_json(home, tree):
    data = json.loads(cli(home, "apply", tree, "--json").stdout)
    assert data["version"] == "9.9" and data["tree"] == str(tree)
    assert {p["name"][:4]: p["status"] for p in data["patches"]} == AFTER
    data = json.loads(cli(home, "revert", tree, "--json").stdout)
    assert data["reverted"] == ["0001-mapping", "0002-scale", "0003-only-files"]


def test_version_and_help(home):
    assert cli(home, "--version").stdout.startswith("vllm-quark")
    assert "format-patch" in cli(home, "--help").stdout


def test_a_class_that_moved_within_its_package(home, tree):
    (tree / "vllm/other.py").write_text("x = 1\n\n\n" + ALPHA)
    (tree / "vllm/alpha.py").write_text("from vllm.other import Alpha\n")
    before = snapshot(tree)
    assert statuses(home, tree, "--only", "0001") == {"0001": "applies"}
    assert cli(home, "apply", tree, "--only", "0001").returncode == 0
    assert "packed" in (tree / "vllm/other.py").read_text()
    assert (tree / "vllm/alpha.py").read_text() == "from vllm.other import Alpha\n"
    assert statuses(home, tree, "--only", "0001") == {"0001": "applied"}
    assert cli(home, "apply", tree, "--only", "0001").returncode == 0
    assert cli(home, "revert", tree).returncode == 0
    assert snapshot(tree) == before
    (tree / "vllm/other.py").rename(tree / "vllm/model_executor/other.py")
    result = cli(home, "apply", tree, "--only", "0001")
    assert result.returncode == 2 and "what it edits stands in vllm/model_executor/other.py" in result.stderr
    (tree / "vllm/model_executor/other.py").rename(tree / "vllm/other.py")
    (tree / "vllm/third.py").write_text(ALPHA)
    result = cli(home, "apply", tree, "--only", "0001")
    assert result.returncode == 2 and "vllm/other.py and vllm/third.py: each holds" in result.stderr


def test_a_package_with_another_name(home, tree):
    write(home, {"vllm/new/deep/gamma.py": "from vllm.other import x\nimport vllm\n\ny = vllm.z  # vllm-project\n"})
    shutil.move(tree / "vllm", tree / "acme_vllm")
    before = snapshot(tree)
    assert statuses(home, tree) == BEFORE
    assert cli(home, "apply", tree).returncode == 0
    assert statuses(home, tree) == AFTER
    assert (tree / "acme_vllm/alpha.py").read_text() == GOOD_ALPHA and not (tree / "vllm").exists()
    renamed = "from acme_vllm.other import x\nimport acme_vllm\n\ny = acme_vllm.z  # vllm-project\n"
    assert (tree / "acme_vllm/new/deep/gamma.py").read_text() == renamed
    assert cli(home, "revert", tree).returncode == 0
    assert snapshot(tree) == before
    shutil.copytree(tree / "acme_vllm", tree / "b_vllm")
    result = cli(home, "status", tree)
    assert result.returncode == 2 and "acme_vllm and b_vllm both look like vLLM" in result.stderr


def test_absent_where_a_patch_that_it_builds_on_is(home, tree):
    patch = home / "patches/0005-upstream.yaml"
    patch.write_text(patch.read_text() + 'requires: ["0004"]\n')
    result = cli(home, "status", tree, "--json", "--only", "0005")
    verdicts = {p["name"][:4]: (p["status"], p["detail"]) for p in json.loads(result.stdout)["patches"]}
    assert verdicts["0005"] == ("absent", "builds on 0004, which is absent: vllm/alpha.py lacks what it edits")


@pytest.mark.parametrize("version", ["0.34.1rc2.dev45+gabc1234.d20261123.cu130", "1.0.0", "0.0.0+unknown", "dev"])
def test_any_version_string(home, tree, version):
    (tree / "vllm/_version.py").write_text(f"__version__ = version = '{version}'\n")
    assert json.loads(cli(home, "apply", tree, "--json").stdout)["version"] == version
    (tree / "vllm/_version.py").unlink()
    assert json.loads(cli(home, "status", tree, "--json").stdout)["version"] == "unknown"


def test_linked_tree_and_submodule(home, tree, tmp_path):
    (tmp_path / "link").symlink_to(tree)
    (tmp_path / "super/.git/modules/vllm").mkdir(parents=True)
    (tree / ".git").write_text(f"gitdir: {tmp_path / 'super/.git/modules/vllm'}\n")
    before = snapshot(tree)
    assert cli(home, "apply", tmp_path / "link").returncode == 0
    assert statuses(home, tree) == AFTER
    assert cli(home, "revert", tmp_path / "link").returncode == 0
    assert snapshot(tree) == before


def test_partial_checkout(home, tree):
    shutil.rmtree(tree / "vllm/model_executor")
    (tree / "vllm/model_executor").mkdir()
    assert statuses(home, tree) == BEFORE | {"0002": "absent", "0005": "absent"}
    assert cli(home, "apply", tree).returncode == 0
    assert "packed" in (tree / "vllm/alpha.py").read_text()


@pytest.fixture
def dependent(home):
    """0003 builds on 0002."""
    patch = home / "patches/0003-only-files.yaml"
    patch.write_text(patch.read_text() + 'requires: ["0002"]\n')


def test_revert_takes_no_more_than_it_is_told(home, tree, dependent):
    assert cli(home, "apply", tree).returncode == 0
    result = cli(home, "revert", tree, "--only", "0003")
    assert result.stdout == "reverted 0003-only-files\n", "what it builds on stays"
    assert statuses(home, tree) == AFTER | {"0003": "applies"}


def test_revert_names_dependents(home, tree, dependent):
    before = snapshot(tree)
    assert cli(home, "apply", tree).returncode == 0
    applied = snapshot(tree)
    one_line(cli(home, "revert", tree, "--only", "2"), "0002-scale: 0003-only-files build on it", "--with-dependents")
    assert snapshot(tree) == applied
    result = cli(home, "revert", tree, "--only", "2", "--with-dependents")
    assert result.stdout == "reverted 0002-scale\nreverted 0003-only-files\n", result.stderr
    assert statuses(home, tree) == BEFORE | {"0001": "applied"}
    assert cli(home, "apply", tree).returncode == 0
    result = cli(home, "revert", tree, "--until", "2")
    assert result.returncode == 2 and "0003-only-files build on it" in result.stderr
    assert cli(home, "revert", tree).returncode == 0
    assert snapshot(tree) == before


@pytest.mark.parametrize("words", [["--only", "1"], ["--only", "1,2"], ["--only", "0001,2", "--only", "0002-scale"]])
def test_names_of_patches(home, tree, words):
    verdicts = statuses(home, tree, *words)
    assert set(verdicts) == ({"0001"} if words == ["--only", "1"] else {"0001", "0002"})


def test_a_package_that_only_depends_on_vllm(home, tree):
    """vllm-omni, vllm-ascend, vllm-mindspore: beside vLLM, or alone in their own checkout."""
    write(
        tree,
        {
            "vllm_omni/__init__.py": "",
            "vllm_omni/model_executor/__init__.py": "",
            "vllm_omni/model_executor/models/a.py": "import os\n\nif os:\n    from vllm.model_executor import b\n",
            "vllm_ascend/__init__.py": "import vllm\n",
            "vllm_ascend/model_executor/__init__.py": "",
        },
    )
    assert statuses(home, tree) == BEFORE
    shutil.move(tree / "vllm", tree / "acme_vllm")
    imports = "".join(f"from acme_vllm.a{i} import b\n" for i in range(30))
    write(tree, {"acme_vllm/more.py": f"{imports}from vllm.a import forgotten\n"})
    assert statuses(home, tree) == BEFORE, "the fork among them is found"
    shutil.rmtree(tree / "acme_vllm")
    before = snapshot(tree)
    for command in ("status", "apply", "revert"):
        one_line(cli(home, command, tree), "not a vLLM tree", "vllm_ascend only depends on vLLM", "name the one")
    assert snapshot(tree) == before


def test_older_than_the_series_knows(home, tree):
    (tree / "vllm/_version.py").write_text("__version__ = version = '0.16.1'\n")
    path = tree / "vllm/model_executor/beta.py"
    path.write_text(path.read_text().replace("x > 1", "x >= 1"))
    message = "vLLM 0.16.1 is older than 0.17.0, the first that this series knows"
    one_line(cli(home, "apply", tree), message)
    assert message in cli(home, "status", tree).stdout
    path.write_text(path.read_text().replace("x >= 1", "x > 1"))
    before = snapshot(tree)
    for command in ("apply", "diff"):
        one_line(cli(home, command, tree), message)
    assert statuses(home, tree)["0001"] == "conflict" and snapshot(tree) == before


@pytest.mark.parametrize("version", ["0.1.dev1+g1234567", "0.1.dev0", "0.0.0"])
def test_a_version_made_without_tags_is_unknown(home, tree, version):
    """setuptools-scm has no tag in a shallow clone: nothing is older for that."""
    (tree / "vllm/_version.py").write_text(f"__version__ = version = '{version}'\n")
    assert statuses(home, tree) == BEFORE


@pytest.mark.parametrize("harmless", [None, False, True])
def test_all_absent(home, tree, harmless):
    """status and apply agree: 2 where the release cannot be helped, 0 where nothing is amiss without the patch."""
    if harmless is not None:
        patch = home / "patches/0004-elsewhere.yaml"
        absent = f'absent: [{{before: "9.10", because: no Omega, harmless: {str(harmless).lower()}}}]\n'
        patch.write_text(patch.read_text() + absent)
    result = [cli(home, command, tree, "--only", "4") for command in ("status", "apply")]
    assert [d.returncode for d in result] == ([0, 0] if harmless else [2, 2])
    assert [d.stderr for d in result] == [result[0].stderr] * 2
    detail = {
        None: "vllm/alpha.py lacks what it edits",
        False: "before 9.10, no Omega: use 9.10 or newer",
        True: "fine before 9.10: no Omega",
    }[harmless]
    assert detail in result[0].stdout
    assert harmless or detail in result[0].stderr


def test_json_on_failure(home, tree, tmp_path):
    for words in (
        ["status", tmp_path / "none"],
        ["apply", tree, "--only", "4"],
        ["revert", tree, "--only", "99"],
        ["format-patch", tmp_path / "none", "-o", tmp_path / "out"],
    ):
        result = cli(home, *words, "--json")
        assert result.returncode == 2
        assert json.loads(result.stdout)["error"] == result.stderr.strip().removeprefix("vllm-quark: ")
    for words, mistyped in ((["status", "--onyl", "4"], "--onyl"), (["statsu"], "statsu"), (["check"], "CKPT")):
        result = cli(home, *words, "--json")
        assert result.returncode == 2 and result.stderr
        assert mistyped in json.loads(result.stdout)["error"]
    data = json.loads(cli(home, "status", tree, "--only", "4", "--json").stdout)
    assert data["patches"] and "lacks what" in data["error"]


def test_version_of_a_git_checkout(home, tree):
    def version() -> str:
        return json.loads(cli(home, "status", tree, "--json").stdout)["version"]

    def git(*words: str) -> None:
        who = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
        subprocess.run(["git", *who, *words], cwd=tree, check=True, capture_output=True)

    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "base")
    assert version() == "9.9", "without tags, what the tree says"
    (tree / "vllm/_version.py").unlink()
    assert version() == "unknown"
    git("tag", "unrelated")
    git("tag", "v0.21.0rc1")
    assert version() == "0.21.0rc1"
    git("commit", "-q", "--allow-empty", "-m", "more")
    assert version().startswith("0.21.0rc1+1.g")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a tree to someone else")
def test_version_of_a_checkout_that_git_was_told_to_trust(home, tree, tmp_path, monkeypatch):
    """A checkout of another user's, as in a container: git's safe.directory counts, nothing else of the settings."""
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "base"], ["tag", "v0.21.0"]):
        who = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
        subprocess.run(["git", *who, *words], cwd=tree, check=True, capture_output=True)
    for path in [tree, *tree.rglob("*")]:
        os.lchown(path, 1234, 2345)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.delenv("SUDO_UID", raising=False)
    verdicts = []
    for setting in ("", f"[safe]\n\tdirectory = {tree}\n", "[safe]\n\tdirectory = *\n"):
        (tmp_path / "gitconfig").write_text(setting)
        verdicts.append(json.loads(cli(home, "status", tree, "--json").stdout)["version"])
    assert verdicts == ["9.9", "0.21.0", "0.21.0"]


def test_stray_project_files_do_not_make_a_source_tree(home, tmp_path):
    site = make_tree(tmp_path / "site", source=False)
    write(site, {"setup.py": "", "pyproject.toml": "", "numpy-1.0.dist-info/METADATA": ""})
    before = snapshot(site)
    assert cli(home, "apply", site).returncode == 0
    assert not (site / "tests").exists()
    assert cli(home, "revert", site).returncode == 0
    assert snapshot(site) == before


def test_byte_order_mark_and_mixed_line_ends_stay(home, tree):
    path = tree / "vllm/alpha.py"
    lines = ALPHA.split("\n")
    mixed = "\ufeff" + "".join(f"{line}\r\n" if i % 2 else f"{line}\n" for i, line in enumerate(lines[:-1]))
    path.write_bytes(mixed.encode())
    before = snapshot(tree)
    result = cli(home, "apply", tree)
    assert result.returncode == 0, result.stderr
    raw = path.read_bytes().decode()
    assert raw.replace("\r\n", "\n") == "\ufeff" + GOOD_ALPHA
    ends = {line: line in raw.split("\r\n")[0] or f"{line}\r\n" in raw for line in lines[1:4]}
    assert ends == {line: bool(i % 2) for i, line in enumerate(lines[1:4], 1)}, "lines that stayed have their own ends"
    assert cli(home, "revert", tree).returncode == 0
    assert snapshot(tree) == before


def test_time_of_change_comes_back(home, tree):
    """What tools and .pyc files go by."""
    os.utime(tree / "vllm/alpha.py", ns=(10**18, 10**18 + 7))
    assert cli(home, "apply", tree).returncode == 0
    assert (tree / "vllm/alpha.py").stat().st_mtime_ns != 10**18 + 7, "or Python takes the old .pyc for its"
    assert cli(home, "revert", tree).returncode == 0
    assert (tree / "vllm/alpha.py").stat().st_mtime_ns == 10**18 + 7


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_root_on_a_users_tree(home, tree):
    paths = [tree, *tree.rglob("*")]
    for path in paths:
        os.chown(path, 1234, 2345)
    assert cli(home, "apply", tree).returncode == 0
    assert (tree / ".vllm-quark").exists()
    for path in [tree, *tree.rglob("*")]:
        assert (path.stat().st_uid, path.stat().st_gid) == (1234, 2345), path
    assert cli(home, "revert", tree).returncode == 0
    for path in paths:
        assert (path.stat().st_uid, path.stat().st_gid) == (1234, 2345), path


@pytest.mark.parametrize("words", [["--stock"], ["--only", "0001"], []])
def test_shadow_of_an_applied_tree_starts_from_its_originals(home, tmp_path, words):
    site = make_tree(tmp_path / "site", source=False)
    plain = cli(home, "shadow", site, "-o", tmp_path / "plain", *words)
    assert plain.returncode == 0, plain.stderr
    assert cli(home, "apply", site).returncode == 0
    write(site, {"vllm/new/deep/__pycache__/gamma.cpython-311.pyc": ""})
    before = snapshot(site)
    assert cli(home, "shadow", site, "-o", tmp_path / "applied", *words).returncode == 0
    assert snapshot(site) == before

    def contents(name: str) -> dict:
        root = tmp_path / name / "vllm"
        return {p.relative_to(root): p.read_bytes() if p.is_file() else None for p in root.rglob("*")}

    shadow = contents("applied")
    assert cli(home, "revert", site).returncode == 0
    assert contents("applied") == shadow == contents("plain")
    assert ("packed" in (tmp_path / "applied/vllm/alpha.py").read_text()) == (words != ["--stock"])
    assert (tmp_path / "applied/vllm/configs/c.json").exists() == (words == [])


@pytest.mark.parametrize("patched", [False, True])
def test_shadow_has_folders_that_are_links(home, tmp_path, patched):
    site, elsewhere = make_tree(tmp_path / "site", source=False), tmp_path / "elsewhere"
    shutil.move(site / "vllm/model_executor", elsewhere)
    write(elsewhere, {"deep/more.py": "MORE = 1\n"})
    (site / "vllm/model_executor").symlink_to(elsewhere)
    (elsewhere / "again").symlink_to(site / "vllm")
    before = snapshot(tmp_path)
    words = ["--only", "2"] if patched else ["--stock"]
    result = cli(home, "shadow", site, "-o", tmp_path / "shadow", *words)
    assert result.returncode == 0, result.stderr
    inside = tmp_path / "shadow/vllm/model_executor"
    assert {p.name for p in inside.iterdir()} == {"__init__.py", "beta.py", "deep", "again"}
    assert (inside / "deep/more.py").read_text() == "MORE = 1\n"
    assert ("x > 2" in (inside / "beta.py").read_text()) == patched
    assert snapshot(tmp_path).items() >= before.items()
