# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""The command `vllm-quark`. Exit codes: 0 nothing left to do, 1 something is, 2 bad tree or bad use.

Of `check`: 0 sound, 1 problems, 2 not a checkpoint.
"""

import collections
import contextlib
import functools
import importlib.metadata
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from vllm_quark import CACHE
from vllm_quark.arguments import read_folder
from vllm_quark.commits import format_patch as write_mails
from vllm_quark.configs import write_configs
from vllm_quark.convert.command import convert
from vllm_quark.diff import format_diff
from vllm_quark.judge import Status, Verdict
from vllm_quark.locate import find_installed
from vllm_quark.patches import Patch, QuarkError
from vllm_quark.release import make_tree
from vllm_quark.run import find_shadow, run_command
from vllm_quark.series import Series, load_chosen, load_series
from vllm_quark.shadow import make_shadow
from vllm_quark.topics import find_topic
from vllm_quark.tree import Tree
from vllm_quark.verify.command import verify

if TYPE_CHECKING:
    from vllm_quark.checkpoint import Report

# typer has a copy of click; older ones import it.
UsageError: type[Any] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")


class Commands(TyperGroup):
    """The commands; with --json a mistyped one is told as JSON, too."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _usage_errors_as_json():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _usage_errors_as_json():
            return super().invoke(ctx)


@contextlib.contextmanager
def _usage_errors_as_json() -> Iterator[None]:
    try:
        yield
    except UsageError as e:
        if "--json" in sys.argv[1:]:
            print(json.dumps({"error": e.format_message()}))
        raise


app = typer.Typer(
    cls=Commands,
    help="Make AMD Quark INT8 checkpoints run right: apply the patch series to a vLLM tree.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
STYLE = {
    Status.APPLIED: "green",
    Status.UPSTREAM: "green",
    Status.APPLIES: "yellow",
    Status.ABSENT: "dim",
    Status.CONFLICT: "red",
}
DIFF_STYLE = {"diff ": "bold", "--- ": "bold", "+++ ": "bold", "@@ ": "cyan", "+": "green", "-": "red"}


TreeArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[TREE]",
        parser=read_folder,
        help="site-packages, source checkout or unpacked sdist; default: installed vLLM",
    ),
]
Only = Annotated[
    list[str] | None, typer.Option("--only", metavar="NAME", help="this patch only: 1, 0001 or its name; 1,2 for two")
]
Until = Annotated[str | None, typer.Option("--until", metavar="NAME", help="the patches up to and with this one")]
With = Annotated[
    list[str] | None,
    typer.Option("--with", metavar="NAME", help="add an optional patch, such as 0016 (int32 sums of INT8 experts)"),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
# Problems with the same way out are many at times; JSON has them all.
FEW = 10
OutFolder = Annotated[Path, typer.Option("-o", "--out", metavar="DIR", parser=read_folder, help="folder to write")]


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        try:
            print(f"vllm-quark {importlib.metadata.version('vllm-quark')}")
        except importlib.metadata.PackageNotFoundError:
            print("vllm-quark, not installed")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    pass


def _guard(command: Callable[..., int | None]) -> Callable[..., None]:
    """Turn bad input into one line on stderr, with --json also {"error": that line}, and exit code 2."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            raise typer.Exit(command(*args, **kwargs) or 0)
        except BrokenPipeError:
            # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except QuarkError as e:
            reason = str(e)
        except OSError as e:
            message = ": ".join(map(str, filter(None, (e.filename, e.strerror)))) or str(e) or type(e).__name__
            reason = f"{message}: mend that and run again"
        if kwargs.get("as_json"):
            print(json.dumps({"error": reason}))
        _print_error(reason)
        raise typer.Exit(2)

    return run


def _print_error(line: str) -> None:
    print(f"vllm-quark: {line}", file=sys.stderr)


def _open_tree(
    tree: Path | None,
    only: list[str] | None,
    until: str | None,
    optional: list[str] | None = None,
    alone: bool = False,
) -> tuple[Tree, Series, list[Patch]]:
    target = Tree(tree or find_installed())
    return target, *target.choose(only, until, optional, alone)


def _exit_code(verdicts: list[Verdict]) -> int:
    return int(any(v.status in (Status.APPLIES, Status.CONFLICT) for v in verdicts))


def _show(tree: Tree, verdicts: list[Verdict], note: str, as_json: bool, error: str = "") -> None:
    if as_json:
        rows = [{"name": v.patch.name, "status": v.status, "detail": v.detail} for v in verdicts]
        data = {"tree": str(tree.root), "version": tree.version, "note": note, "patches": rows}
        print(json.dumps(data | ({"error": error} if error else {}), indent=1))
        return
    if note:
        _print_error(note)
    table = Table()
    for name in ("patch", "status", "detail"):
        table.add_column(name, overflow="fold")
    for v in verdicts:
        table.add_row(v.patch.name, f"[{STYLE[v.status]}]{v.status}[/]", escape(v.detail))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(f"vLLM {escape(tree.version)} in {escape(str(tree.root))}", soft_wrap=True, highlight=False)
    console.print(table)


@app.command()
@_guard
def status(
    tree: TreeArgument = None, only: Only = None, until: Until = None, optional: With = None, as_json: AsJson = False
) -> int:
    """Show the status of each patch in TREE: applied, applies, upstream, absent or conflict.

    Example: vllm-quark status ~/my-vllm
    """
    target, series, patches = _open_tree(tree, only, until, optional)
    verdicts = [v for v in target.status(series) if v.patch in patches]
    reason = target.nothing_here(verdicts)
    _show(target, verdicts, target.note(), as_json, reason)
    if reason:
        _print_error(reason)
    return 2 if reason else _exit_code(verdicts)


@app.command()
@_guard
def apply(
    tree: TreeArgument = None, only: Only = None, until: Until = None, optional: With = None, as_json: AsJson = False
) -> int:
    """Apply the patches to TREE, all or nothing.

    Example: vllm-quark apply --only 0001
    """
    target, series, patches = _open_tree(tree, only, until, optional)
    note = target.note()
    verdicts = target.apply(series, patches)
    _show(target, verdicts, note, as_json)
    return _exit_code(verdicts)


@app.command()
@_guard
def revert(
    tree: TreeArgument = None,
    only: Only = None,
    until: Until = None,
    with_dependents: Annotated[
        bool, typer.Option("--with-dependents", help="also revert the patches that build on these")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Take the patches out of TREE; files come back byte for byte.

    Example: vllm-quark revert --only 0014
    """
    target, series, patches = _open_tree(tree, only, until, alone=True)
    note = target.note()
    reverted = target.revert(series, patches, with_dependents)
    not_on_record = target.not_on_record(series, patches)
    if not_on_record and not reverted:
        raise QuarkError(not_on_record)
    if as_json:
        data = {"tree": str(target.root), "version": target.version, "note": note, "reverted": reverted}
        print(json.dumps(data | ({"error": not_on_record} if not_on_record else {}), indent=1))
        return int(bool(not_on_record))
    if note:
        _print_error(note)
    nothing = "no patch was applied by vllm-quark"
    if only or until:
        nothing = f"{', '.join(p.name for p in patches)}: not applied by vllm-quark"
    print("\n".join(f"reverted {name}" for name in reverted) or f"nothing to revert: {nothing}")
    if not_on_record:
        _print_error(not_on_record)
    return int(bool(not_on_record))


@app.command("run", context_settings={"allow_interspersed_args": False})
@_guard
def run_on_shadow(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="a program and its arguments")],
    only: Only = None,
    until: Until = None,
    optional: With = None,
) -> int:
    """Run COMMAND on the installed vLLM with the patches; nothing that is installed changes.

    Processes that COMMAND starts use the patched vLLM as well: workers, scripts, python -m. Start a Ray cluster in the
    same way on each node: vllm-quark run -- ray start ...

    Example: vllm-quark run -- vllm serve CKPT
    """
    started = time.monotonic()
    shadow, is_new = find_shadow(only or [], until, optional or [])
    if is_new:
        _print_error(f"the patched vLLM is in {shadow}, made in {time.monotonic() - started:.1f} s")
    run_command(command, shadow)
    return 0


@app.command("diff")
@_guard
def diff_command(tree: TreeArgument = None, only: Only = None, until: Until = None, optional: With = None) -> int:
    """Show the changes that apply would make in TREE, as a diff.

    Example: vllm-quark diff ~/my-vllm | less -R

    Exit codes: 0 nothing, 1 something, 2 bad tree or bad use.
    """
    target, series, patches = _open_tree(tree, only, until, optional)
    changes = target.preview(series, patches)
    console = Console(highlight=False, soft_wrap=True)
    for line in format_diff(changes):
        if console.is_terminal:
            style = next((style for start, style in DIFF_STYLE.items() if line.startswith(start)), "")
            console.print(Text(line.encode("utf-8", "surrogateescape").decode("utf-8", "replace"), style), end="")
        else:
            sys.stdout.buffer.write(line.encode("utf-8", "surrogateescape"))
    sys.stdout.flush()
    return int(bool(changes))


@app.command("format-patch")
@_guard
def format_patch(
    tree: Annotated[
        Path,
        typer.Argument(metavar="TREE", parser=read_folder, help="the source tree of vLLM that will receive the series"),
    ],
    out: OutFolder,
    only: Only = None,
    until: Until = None,
    optional: With = None,
    topic: Annotated[
        str | None,
        typer.Option(
            "--topic", metavar="NAME", help="only one pull request's: seed, mtp, configs, cpu, schemes or sums"
        ),
    ] = None,
    cover: Annotated[bool, typer.Option("--cover", help="a cover letter and the text of a pull request, too")] = False,
    as_json: AsJson = False,
) -> int:
    """Write the patches that apply to TREE as a series for `git am`.

    Example: vllm-quark format-patch ~/my-vllm -o /tmp/series
    """
    if topic and (only or until or optional):
        raise QuarkError("--topic excludes --only, --until and --with")
    target, series, patches = _open_tree(tree, only, until, optional)
    chosen = find_topic(series, topic) if topic else None
    if chosen:
        series = series.with_optional(chosen.numbers)
        patches = chosen.select_patches(series)
    files = write_mails(target, series, patches, out, cover, chosen)
    if as_json:
        print(json.dumps({"tree": str(target.root), "version": target.version, "files": [str(f) for f in files]}))
    elif files:
        print("\n".join(map(str, files)))
        mails = f"{shlex.quote(str(out.absolute()))}/*.patch"
        print(f"In {target.root}: git am --keep-non-patch{' --empty=drop' if cover else ''} {mails}")
    else:
        print("nothing to write: no patch applies to this tree")
    return 0


@app.command("make-tree")
@_guard
def make_tree_command(
    version: Annotated[str, typer.Argument(metavar="VERSION", help="vLLM release, e.g. 0.21.0")],
    out: OutFolder,
    only: Only = None,
    until: Until = None,
    optional: With = None,
    cache: Annotated[Path, typer.Option(help="where downloads are kept")] = CACHE,
) -> int:
    """Make the full source tree of a release with the series as git commits.

    Example: vllm-quark make-tree 0.21.0 -o vllm-0.21.0
    """
    series, only = load_chosen(only, until, optional)
    for patch in make_tree(version, series, series.select(only, until), out, cache):
        print(patch.subject)
    print(f"{out}: vLLM {version}, tagged v{version}, with these commits on top")
    return 0


@app.command("wheel")
@_guard
def wheel_command(
    wheel: Annotated[Path, typer.Argument(metavar="WHEEL", help="vLLM's wheel (pip download --no-deps vllm==…)")],
    out: OutFolder,
    only: Only = None,
    until: Until = None,
    optional: With = None,
) -> int:
    """Make a copy of a wheel with the patches in it and +quark in its version.

    Example: vllm-quark wheel vllm-0.21.0-*.whl -o dist
    """
    from vllm_quark.repack import repack

    wheel_path, patches = repack(wheel, *load_chosen(only, until, optional), until, out)
    for patch in patches:
        print(patch.subject)
    print(wheel_path)
    return 0


@app.command("shadow")
@_guard
def shadow_command(
    out: OutFolder,
    tree: TreeArgument = None,
    only: Only = None,
    optional: With = None,
    stock: Annotated[bool, typer.Option("--stock", help="no patch at all")] = False,
) -> int:
    """Make a patched view of the installed vLLM, as a folder for PYTHONPATH.

    Example: vllm-quark shadow -o DIR --only 0002
    """
    if stock and (only or optional):
        raise QuarkError("--stock excludes --only and --with")
    if out.exists():
        raise QuarkError(f"{out}: exists already: delete it to make it anew")
    target, series, patches = _open_tree(tree, only, None, optional)
    print(make_shadow(out.absolute(), series, [] if stock else [p.name for p in patches], target.root))
    return 0


@app.command("configs")
@_guard
def configs_command(
    out: OutFolder,
    stock: Annotated[bool, typer.Option("--stock", help="for a vLLM without patch 0013")] = False,
    as_json: AsJson = False,
) -> int:
    """Write the launch configs of INT8 experts for VLLM_TUNED_CONFIG_FOLDER.

    vLLM looks for names with int8_w8a8 since patch 0013. Without it vLLM looks for names of no dtype, for BF16 experts
    of the same sizes, too: use --stock where only INT8 experts are served. Configs of such a folder go before those
    that come with patch 0016.

    Example: vllm-quark configs -o tuned && VLLM_TUNED_CONFIG_FOLDER=$PWD/tuned vllm serve CKPT
    """
    files = write_configs(load_series(), out, stock)
    if as_json:
        print(json.dumps({"files": [str(f) for f in files]}))
    else:
        print("\n".join(map(str, files)))
        folder = shlex.quote(str(out.absolute()))
        print(f"VLLM_TUNED_CONFIG_FOLDER={folder}, for a vLLM with{'out' if stock else ''} patch 0013")
    return 0


@app.command("check")
@_guard
def check_command(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="a checkpoint's folder, or a model's name on the Hugging Face hub")
    ],
    as_json: AsJson = False,
) -> int:
    """Show what is wrong with an INT8 checkpoint of AMD Quark, without vLLM or a GPU.

    The command compares the files with config.json, as vLLM does with the series. It also reads the values of scales
    and zero points. For a model on the hub it reads the headers only.

    Example: vllm-quark check ~/models/Step-3.5-Flash-INT8

    Exit codes: 0 sound, 1 problems, 2 not a checkpoint.
    """
    from vllm_quark.checkpoint import Finding, NoCheckpointError, Report, check_checkpoint

    try:
        report = check_checkpoint(checkpoint)
    except NoCheckpointError as e:
        if as_json:
            report = Report(checkpoint, problems=[Finding("", "", e.file, e.reason, e.way_out)])
            print(json.dumps(report.to_json(), indent=1))
            _print_error(str(e))
            return 2
        raise
    if as_json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        _show_report(report)
    return int(not report.sound)


def _show_report(report: "Report") -> None:
    def say(text: str) -> None:
        print(text if text.isprintable() else text.encode("unicode_escape").decode())

    say(f"{report.checkpoint}: {report.tensors} tensors in {report.files} file{'s'[: report.files != 1]}")
    for scheme, count in report.schemes.items():
        say(f"  {count} modules: {scheme}")
    if report.excluded:
        say(f"  {report.excluded} modules in `exclude`")
    if report.unmatched:
        listed = ", ".join(report.unmatched[:FEW]) + (", …" if report.unmatched[FEW:] else "")
        say(f"  nothing matches {len(report.unmatched)} of `exclude` and `layer_quant_config`: {listed}")
    totals = collections.Counter(problem.way_out for problem in report.problems)
    counts: collections.Counter[str] = collections.Counter()
    for problem in report.problems:
        counts[problem.way_out] += 1
        if counts[problem.way_out] <= FEW:
            say(str(problem))
        elif counts[problem.way_out] == totals[problem.way_out]:
            say(f"… and {totals[problem.way_out] - FEW} more (--json has them all): {problem.way_out}")
    for note in report.notes:
        say(f"note: {note}")
    say("sound" if report.sound else f"problems: {len(report.problems)}")


app.command("convert")(_guard(convert))
app.command("verify")(_guard(verify))


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Whatever the locale: names may have any letter.
        sys.stdout.reconfigure(errors="backslashreplace")
    app()


if __name__ == "__main__":
    main()
