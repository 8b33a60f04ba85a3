# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""`vllm-quark verify`: right where vLLM is, and which layer is off where a fault is planted in it."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from test_check import Checkpoint as Small
from trees import ROOT, cli, one_line

from tests.processor import lacks_vnni
from tests.quantization.quark import quantization_config
from vllm_quark.checkpoint import read_checkpoint
from vllm_quark.locate import find_installed
from vllm_quark.series import load_series
from vllm_quark.shadow import make_shadow
from vllm_quark.verify.layers import choose_layers, find_layers
from vllm_quark.verify.measure import OFF, OTHER, RIGHT, STOPS, Row, deviate, make_inputs
from vllm_quark.verify.report import draw_errors, make_page

EXPERTS, K, WIDTH = 16, 128, 96


def write(
    folder: Path,
    activation: str = "token_sym",
    qscheme: str = "per_channel",
    layers: int = 1,
    width: int = WIDTH,
    columns: int = K,
    experts: int = EXPERTS,
) -> Path:
    """Decoder layers of attention, a shared expert and experts one by one; o_proj is in `exclude`."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}

    def add(module: str, rows: int, columns: int, is_static: bool) -> None:
        tensors[f"{module}.weight"] = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
        shape = (rows,) if qscheme == "per_channel" else ()
        tensors[f"{module}.weight_scale"] = 10 ** (torch.rand(shape, generator=generator) * 2 - 4)
        if is_static:
            tensors[f"{module}.input_scale"] = torch.tensor(0.02)
            tensors[f"{module}.input_zero_point"] = torch.tensor(-60 if activation == "static_asym" else 0)

    for i in range(layers):
        stem = f"model.layers.{i}"
        is_static = activation.startswith("static")
        for proj, rows in (("q", 128), ("k", 64), ("v", 64)):
            add(f"{stem}.self_attn.{proj}_proj", rows, columns, is_static)
        tensors[f"{stem}.self_attn.o_proj.weight"] = torch.randn(columns, columns, generator=generator).bfloat16()
        for proj in ("gate_proj", "up_proj", "down_proj"):
            shape = (columns, width) if proj == "down_proj" else (width, columns)
            add(f"{stem}.mlp.shared_expert.{proj}", *shape, is_static)
            for expert in range(experts):
                add(f"{stem}.mlp.experts.{expert}.{proj}", *shape, is_static)
    quant_config = quantization_config(qscheme, activation, exclude=["lm_head", "*.o_proj"])
    config = {"architectures": ["NoModelOfThisVLLM"], "quantization_config": quant_config}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def series(tmp_path_factory) -> Path:
    """The installed vLLM with the series."""
    complete = load_series(ROOT)
    return make_shadow(
        tmp_path_factory.mktemp("vllm") / "series", complete, [p.name for p in complete.patches], find_installed()
    )


def run(vllm: Path | None, *words: object, **env: str) -> subprocess.CompletedProcess:
    pythonpath = os.pathsep.join(map(str, filter(None, [vllm, ROOT])))
    command = [sys.executable, *map(str, words)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": pythonpath, "COLUMNS": "200", **env},
    )


def drive(vllm: Path, ckpt: Path, *faults: str) -> dict[str, list]:
    result = run(vllm, ROOT / "tests/tool/verify_driver.py", ckpt, *faults)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


QKV, OUT = "model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.o_proj"
SHARED = "model.layers.0.mlp.shared_expert"
ALL = {QKV, OUT, f"{SHARED}.gate_up_proj", f"{SHARED}.down_proj", "model.layers.0.mlp.experts"}


def assert_off(deviations: list, *layers: str, status: str = OFF) -> None:
    """Exit code 1, these layers have `status`, and no other layer is off."""
    code, rows = deviations[:2]
    assert code == 1 and rows.keys() == ALL, deviations
    assert {name for name, row in rows.items() if row[0] == status} == set(layers), rows
    assert all(rows[name][0] in (RIGHT, OTHER) for name in ALL.difference(layers)), rows


def test_faults_of_linear_layers(series, tmp_path):
    """Static asymmetric activations. Experts are served per token, and said to be."""
    faults = ("none", "kernel config, linear", "swapped scales, linear", "one row", "no kernel", "none")
    ckpt = write(tmp_path / "ckpt", "static_asym")
    deviations = drive(series, ckpt, *faults)
    code, rows = deviations["none"]
    assert code == 0 and rows.keys() == ALL, rows
    assert {name: row[0] for name, row in rows.items()} == dict.fromkeys(ALL, RIGHT) | {
        "model.layers.0.mlp.experts": OTHER
    }, rows
    linear = (QKV, f"{SHARED}.gate_up_proj", f"{SHARED}.down_proj")
    assert_off(deviations["kernel config, linear"], *linear, status=STOPS)
    assert_off(deviations["swapped scales, linear"], f"{SHARED}.gate_up_proj")
    assert_off(deviations["one row"], f"{SHARED}.gate_up_proj")
    assert_off(deviations["no kernel"], *linear, status=STOPS)
    assert "NotImplementedError: no kernel for this" in deviations["no kernel"][1][QKV][2]


def test_faults_of_experts(series, tmp_path):
    faults = ("none", "kernel config, experts", "swapped scales, experts", "stale weight")
    deviations = drive(series, write(tmp_path / "ckpt"), *faults)
    code, rows = deviations["none"]
    assert code == 0 and {row[0] for row in rows.values()} == {RIGHT} and rows.keys() == ALL, rows
    for fault in faults[1:]:
        assert_off(deviations[fault], "model.layers.0.mlp.experts")


def test_right(series, tmp_path):
    """What the series serves with other activations than the checkpoint's is said."""
    kinds = list(itertools.product(("token_sym", "tensor_dynamic", "static_sym"), ("per_channel", "per_tensor")))
    code = (
        "import sys; from vllm_quark.cli import app\n"
        "for ckpt in sys.argv[1:]:\n"
        "    try: app(['verify', ckpt, '--json'])\n"
        "    except SystemExit as end: print(f'exit {end.code}', flush=True)"
    )
    ckpts = [write(tmp_path / "-".join(kind), *kind) for kind in kinds]
    # vLLM's log lies beside the reports, not in them.
    result = run(series, "-c", code, *ckpts, VLLM_LOGGING_LEVEL="WARNING")
    assert result.returncode == 0, (result.stdout, result.stderr[-2000:])
    reports = result.stdout.split("exit 0\n")
    assert len(reports) == len(kinds) + 1 and not reports[-1].strip(), result.stdout
    for (activation, _), text in zip(kinds, reports, strict=False):
        report = json.loads(text)
        status = {row["layer"]: row["status"] for row in report["layers"]}
        assert report["right"] and status.keys() == ALL and "with vllm-quark's series" in report["machine"]["vLLM"]
        served = {"token_sym": (RIGHT, RIGHT), "tensor_dynamic": (OTHER, OTHER), "static_sym": (RIGHT, OTHER)}
        assert (status[QKV], status["model.layers.0.mlp.experts"]) == served[activation], report["layers"]


def test_a_method_in_capitals(series, tmp_path):
    """As vLLM takes it."""
    ckpt = write(tmp_path / "ckpt")
    path = ckpt / "config.json"
    path.write_text(path.read_text().replace('"quark"', '"QUARK"'))
    result = run(series, "-m", "vllm_quark", "verify", ckpt, "--layers", "1")
    assert result.returncode == 0 and "right: 1 of the" in result.stdout, (result.stdout, result.stderr)


def test_stock_runs_excluded_layers_as_int8(tmp_path):
    """0.21.0's Step3p5ForCausalLM has no packed_modules_mapping; the page says which layers are off."""
    folder = ROOT / "build/ckpts/quark"
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} is not there (make ckpts)")
    page = tmp_path / "r.html"
    result = run(None, "-m", "vllm_quark", "verify", folder, "--report", page, "--layers", "10")
    assert result.returncode == 1, result
    text = page.read_text()
    rows = re.findall(r"<tr><td>(model\.[^<]*)</td>.*?</tr>", text)
    off = {
        re.match(r"<tr><td>([^<]*)", row)[1] for row in re.findall(r"<tr><td>model\..*?</tr>", text) if ">off" in row
    }
    assert len(rows) == 10 and any(name.endswith(".qkv_proj") for name in off), off
    if not lacks_vnni():  # there stock is wrong for layers that are INT8, too
        assert all(name.endswith((".qkv_proj", ".gate_up_proj")) for name in off), off
        assert "model.layers.0.mlp.gate_up_proj" not in off
    assert "without vllm-quark" in text and "stops<br>NotImplementedError" in text


# What is built of a checkpoint, and which of it.


def test_layers(tmp_path):
    ckpt = read_checkpoint(str(write(tmp_path / "ckpt", "static_sym", layers=3)))
    layers = find_layers(ckpt)
    assert [layer.name for layer in layers[:5]] == [
        "model.layers.0.mlp.experts",
        f"{SHARED}.down_proj",
        f"{SHARED}.gate_up_proj",
        OUT,
        QKV,
    ]
    assert len(layers) == 15
    by_name = {layer.name: layer for layer in layers}
    assert by_name[QKV].shape == (256, K) and len(by_name[QKV].parts) == 3 and by_name[QKV].scheme.static
    assert by_name[OUT].scheme is None
    experts = by_name["model.layers.0.mlp.experts"]
    assert experts.shape == (EXPERTS, WIDTH, K)
    assert experts.parts[2][11] == "model.layers.0.mlp.experts.11.down_proj"
    chosen = choose_layers(layers, 5)
    assert len({layer.group_key for layer in chosen}) == 5 and choose_layers(layers, 99) == layers
    ten = choose_layers(layers, 10)
    assert {layer.name.split(".")[2] for layer in ten} == {"0", "2"} and len(ten) == 10


def test_stacked_experts_and_limits(tmp_path):
    small = Small(stacked=True)
    small.config["swiglu_limits"] = [0.0, 7.0]
    layers = {layer.name: layer for layer in find_layers(read_checkpoint(str(small.write(tmp_path / "ckpt"))))}
    experts = [layers[f"model.layers.{i}.mlp.experts"] for i in (0, 1)]
    assert [e.activation for e in experts] == ["silu", "swiglustep"]
    assert experts[0].parts == tuple((f"model.layers.0.mlp.{p}_proj",) for p in ("gate", "up", "down"))


def test_deviation():
    expected = torch.tensor([[100.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    error, worst = deviate(expected * 1.005, expected)
    assert error == pytest.approx(0.005) and worst == pytest.approx(0.005)
    # A small token that is wrong says little of the whole.
    error, worst = deviate(expected + torch.tensor([[0.0], [0.1]]), expected)
    assert error < 0.01 and worst > 0.1
    assert deviate(expected * math.nan, expected) == (math.inf, math.inf)


# The page.

ROWS = [
    Row("model.layers.0.a<b", "linear", "2 × 2", "s", RIGHT, 0.002, 0.004),
    Row("model.layers.1.b", "experts", "2 × 2", "s", OFF, 0.5, 0.9),
    Row("model.layers.2.c", "linear", "2 × 2", "s", STOPS, detail='ValueError: "<&>'),
    Row("model.layers.3.d", "linear", "2 × 2", "s", OFF, math.inf, math.inf),
]


def test_page_is_whole_and_takes_nothing_from_elsewhere():
    page = make_page("a <name>", {"device": "x & y"}, ["note"], ROWS)

    class Parser(HTMLParser):
        open: list[str] = []

        def handle_starttag(self, tag, attrs):
            assert not {"src", "href"} & dict(attrs).keys() and tag not in ("script", "link", "img")
            if tag not in ("meta", "br", "line", "circle", "path"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            if tag in ("line", "circle", "path"):
                return
            assert self.open.pop() == tag

    parser = Parser()
    parser.feed(page)
    assert parser.open == [] and "http" not in page.replace("http-equiv", "")
    assert "a&lt;b" in page and "a<b" not in page and "3 of 4 layers are off" in page
    assert "all 1 layers are right" in make_page("a", {}, [], ROWS[:1])


def test_plot():
    """A point a layer, in its place: lower is better, what is off has a red edge, what has no number is a cross."""
    points = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="5" fill="[^"]+" stroke="([^"]+)"', draw_errors(ROWS))
    assert len(points) == 2
    (x0, y0, edge0), (x1, y1, edge1) = points
    assert float(x0) < float(x1) and float(y0) > float(y1) and (edge0, edge1) == ("none", "#cf222e")
    limit = re.search(r'y1="([\d.]+)" y2="[\d.]+" stroke="#cf222e" stroke-dasharray', draw_errors(ROWS))
    assert float(y1) < float(limit[1]) < float(y0)
    assert draw_errors(ROWS).count("<path") == 2 and "<svg" in draw_errors([])


# Bad input, memory, help.


def test_bad_input(tmp_path):
    ckpt = write(tmp_path / "ckpt")
    one_line(cli(ROOT, "verify", tmp_path / "gone"), "gone: is no folder", "hf download")
    one_line(cli(ROOT, "verify", ckpt, "--layers", "some"), "--layers some", "nor all")
    one_line(cli(ROOT, "verify", ckpt, "--layers", "0"), "--layers 0")
    one_line(cli(ROOT, "verify", ckpt, "--report", tmp_path / "no/r.html"), "no: is no folder")
    one_line(cli(ROOT, "verify", ckpt, "--report", tmp_path), "is a folder: name a file")
    # It is said before a layer is measured.
    one_line(cli(ROOT, "verify", ckpt, "--report", "/proc/r.html"), "/proc/r.html: cannot be written", "elsewhere")
    (tmp_path / "empty").mkdir()
    one_line(cli(ROOT, "verify", tmp_path / "empty"), "config.json: does not exist")
    small = Small()
    small.tensors["model.layers.0.self_attn.o_proj.weight_scale"][1][0] = math.nan
    one_line(cli(ROOT, "verify", small.write(tmp_path / "nan")), "o_proj.weight_scale", "is nan")


def test_no_vllm(tmp_path):
    """One line, also where torch is missing."""
    ckpt = write(tmp_path / "ckpt")
    for missing in ("vllm", "torch"):
        code = (
            f"import sys; sys.modules[{missing!r}] = None; from vllm_quark.cli import main\n"
            f"sys.argv = ['vllm-quark', 'verify', {str(ckpt)!r}]; main()"
        )
        result = run(None, "-c", code)
        one_line(result, "this Python has no", missing, "run it in vLLM's environment")


def test_memory_for_one_layer(series, tmp_path):
    """Three layers of 36 MB take no more than one, but for what an allocator keeps."""
    code = (
        "import sys; from vllm_quark.cli import main\n"
        "try: main()\n"
        "finally: print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')), file=sys.stderr)"
    )
    peaks = []
    for layers in (1, 3):
        ckpt = write(tmp_path / f"ckpt{layers}", layers=layers, width=512, columns=1024, experts=24)
        result = run(series, "-c", code, "verify", ckpt, "--layers", "all")
        assert result.returncode == 0, result.stderr[-2000:]
        peaks.append(int(result.stderr.split("VmHWM:")[1].split()[0]) / 1024)
    size = 24 * 3 * 512 * 1024 / (1 << 20)
    assert peaks[1] - peaks[0] < 1.5 * size, peaks


def test_help_has_an_example():
    result = cli(ROOT, "verify", "--help")
    assert result.returncode == 0 and "vllm-quark verify Step-3.5-Flash-INT8" in result.stdout


def test_issue_template_asks_for_the_report():
    import yaml

    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/verify-report.yml").read_text())
    assert form["name"] and form["description"] and form["body"]
    text = json.dumps(form)
    assert "vllm-quark verify" in text and "MI300X" in text and "--report" in text
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(ids) == len(set(ids)) and all(part["attributes"] for part in form["body"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_of_static_layers_are_between_no_steps(dtype):
    """Kernels round such values before they add an odd zero point, or after."""
    step = 2.0**-6
    numbers = SimpleNamespace(get=lambda part, kind, expert: torch.tensor(step if kind == "input_scale" else 3))
    scheme = SimpleNamespace(static=True, symmetric=False)
    layer = SimpleNamespace(kind="linear", shape=(64, 512), scheme=scheme)
    quotients = make_inputs(layer, numbers, dtype).double() / step
    assert quotients.abs().max() > 100 and quotients.ne(0).float().mean() > 0.5
    assert quotients.frac().abs().ne(0.5).all()
