# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""`vllm-quark convert`: the same numbers in another layout, or nothing at all. Engines: tests/e2e/test_convert.py."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from test_check import ACTIVATIONS, EXPERTS, Checkpoint, K, N, check, f32
from trees import ROOT, cli, one_line

from tests.quantization.quark import layer_config
from vllm_quark.convert.conversion import convert_checkpoint
from vllm_quark.convert.plan import ConvertError


def convert(folder: Path, out: Path, layout: str, per_token: bool = False) -> Path:
    convert_checkpoint(folder, out, layout, per_token, lambda *_: None)
    assert not out.with_name(f"{out.name}.part").exists()
    assert len(list(out.glob("*.safetensors"))) == 1 or (out / "model.safetensors.index.json").is_file()
    return out


def read(folder: Path) -> dict[str, torch.Tensor]:
    """By the safetensors library; the index names every tensor and its file."""
    entries, files = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                entries[name], files[name] = file.get_tensor(name), path.name
    index = folder / "model.safetensors.index.json"
    if index.exists():
        assert json.loads(index.read_text())["weight_map"] == files
    return entries


def assert_same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype and tensor.shape == expected[name].shape, name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), expected[name].reshape(-1).view(torch.uint8)), name


def quant(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def as_step(checkpoint: Checkpoint) -> Checkpoint:
    """Experts below `moe`, as Step-3.5's are: the stacked ones that vLLM reads."""
    checkpoint.files = {
        file: {n.replace(".mlp.", ".moe."): t for n, t in tensors.items()} for file, tensors in checkpoint.files.items()
    }
    checkpoint.quant["exclude"] = ["lm_head", "*.moe.gate"]
    return checkpoint


def spread_over_files(checkpoint: Checkpoint, count: int = 3) -> Checkpoint:
    """Experts of one layer in several files."""
    tensors = list(checkpoint.tensors.items())
    checkpoint.files = {f"model-{i + 1:05}-of-{count:05}.safetensors": dict(tensors[i::count]) for i in range(count)}
    return checkpoint


def nano(name: str) -> Path:
    folder = ROOT / "build/ckpts" / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} is not there (make ckpts)")
    return folder


@pytest.mark.parametrize("name", ["quark", "quark-all", "quark-mtp"])
def test_stacked_and_back(name, tmp_path):
    stacked = convert(nano(name), tmp_path / "stacked", "stacked")
    again = convert(stacked, tmp_path / "again", "per-expert")
    assert_same(read(again), read(nano(name)))
    assert check(stacked)[0] == check(again)[0] == 0
    if nano(name).with_name(name.replace("quark", "stacked")).is_dir():
        assert_same(read(stacked), read(nano(name.replace("quark", "stacked"))))


@pytest.mark.parametrize("name", ["quark", "stacked", "quark-all", "stacked-all"])
def test_compressed_tensors_is_the_twin(name, tmp_path):
    out = convert(nano(name), tmp_path / "out", "compressed-tensors")
    kind = name.replace("quark", "compressed-tensors").replace("stacked", "compressed-tensors")
    assert_same(read(out), read(nano(kind)))
    config, twin = quant(out), quant(nano(kind))
    assert config["config_groups"] == twin["config_groups"] and set(config["ignore"]) >= set(twin["ignore"])
    assert (out / "tokenizer.json").read_bytes() == (nano(name) / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("qscheme", ["per_channel", "per_tensor"])
def test_every_scheme_stacked_and_back(activation, qscheme, tmp_path):
    folder = as_step(spread_over_files(Checkpoint(activation, qscheme))).write(tmp_path / "ckpt")
    stacked = convert(folder, tmp_path / "stacked", "stacked")
    again = convert(stacked, tmp_path / "again", "per-expert")
    before, after = read(folder), read(again)
    # One value an expert is written without a shape.
    after = {name: t.reshape(before[name].shape) if t.numel() == 1 else t for name, t in after.items()}
    assert_same(after, before)
    for checkpoint in (stacked, again):
        code, lines = check(checkpoint)
        assert code == 0, lines
    names = read(stacked)
    weight, scale = names["model.layers.0.moe.up_proj.weight"], names["model.layers.0.moe.up_proj.weight_scale"]
    assert weight.shape == (EXPERTS, N, K) and scale.shape[:1] == (EXPERTS,)
    assert not [name for name in names if ".experts." in name]


def test_experts_with_one_scale_and_with_one_a_row_are_stacked(tmp_path):
    checkpoint = as_step(Checkpoint())
    checkpoint.tensors["model.layers.0.moe.experts.1.up_proj.weight_scale"] = f32(0.5)
    stacked = read(convert(checkpoint.write(tmp_path / "ckpt"), tmp_path / "out", "stacked"))
    scale = stacked["model.layers.0.moe.up_proj.weight_scale"]
    assert torch.equal(scale, torch.tensor([0.01, 0.5, 0.01]).unsqueeze(1).expand(EXPERTS, N))


@pytest.mark.parametrize("qscheme", ["per_channel", "per_tensor"])
@pytest.mark.parametrize(
    ("activation", "strategy", "symmetric"),
    [("token_sym", "token", True), ("static_sym", "tensor", True), ("static_asym", "tensor", False)],
)
def test_compressed_tensors_says_every_scheme(qscheme, activation, strategy, symmetric, tmp_path):
    """Experts per token where they are not; scales [N, 1]; static ones [1]; no zero points of weights."""
    checkpoint = spread_over_files(Checkpoint(activation, qscheme, stacked=True))
    proj = "model.layers.1.self_attn.o_proj"
    next(iter(checkpoint.files.values()))[f"{proj}.weight_zero_point"] = "I32", np.zeros(1)
    folder = checkpoint.write(tmp_path / "ckpt")
    before, out = read(folder), convert(folder, tmp_path / "out", "compressed-tensors", per_token=True)
    after, config = read(out), quant(out)
    assert torch.equal(after[f"{proj}.weight"], before[f"{proj}.weight"])
    scale = before[f"{proj}.weight_scale"].reshape(-1, 1).expand(N, 1)
    assert torch.equal(after[f"{proj}.weight_scale"], scale)
    static = {"token": set(), "tensor": {"input_scale"} if symmetric else {"input_scale", "input_zero_point"}}[strategy]
    kinds = {name.rpartition(".")[2] for name in after if name.startswith(f"{proj}.")}
    assert kinds == {"weight", "weight_scale"} | static
    assert all(after[f"{proj}.{kind}"].shape == (1,) for kind in static)
    expert = "model.layers.1.mlp.experts.2.down_proj"
    assert torch.equal(after[f"{expert}.weight"], before["model.layers.1.mlp.down_proj.weight"][2])
    assert after[f"{expert}.weight_scale"].shape == (K, 1)
    assert {name.rpartition(".")[2] for name in after if ".experts." in name} == {"weight", "weight_scale"}
    main, *others = config["config_groups"].values()
    assert main["targets"] == ["Linear"]
    assert {k: main["input_activations"][k] for k in ("strategy", "symmetric", "dynamic")} == {
        "strategy": "token",
        "symmetric": True,
        "dynamic": True,
    }
    assert len(others) == (strategy == "tensor")
    for other in others:
        assert {k: other["input_activations"][k] for k in ("strategy", "symmetric", "dynamic")} == {
            "strategy": strategy,
            "symmetric": symmetric,
            "dynamic": False,
        }
        assert {proj, "model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.v_proj"} <= set(other["targets"])
        assert not [target for target in other["targets"] if ".experts" in target]
    assert config["ignore"][0] == "lm_head" and "model.layers.0.mlp.gate" in config["ignore"]


def test_ignored_layers_have_every_name_that_a_vllm_looks_for(tmp_path):
    ignored = set(quant(convert(nano("quark"), tmp_path / "out", "compressed-tensors"))["ignore"])
    for name in ("self_attn.q_proj", "self_attn.qkv_proj", "share_expert.gate_up_proj", "share_expert.up_proj"):
        assert f"model.layers.3.{name}" in ignored
    assert {"model.layers.8.self_attn.qkv_proj", "model.layers.8.mtp_block.self_attn.qkv_proj"} <= ignored
    assert "model.layers.0.mlp.gate_up_proj" not in ignored and "model.layers.3.mtp_block.moe.gate" not in ignored


def test_floats_of_experts_are_ignored_by_their_names(tmp_path):
    checkpoint = as_step(Checkpoint(stacked=True))
    for proj in ("gate_proj", "up_proj", "down_proj"):
        name = f"model.layers.1.moe.{proj}"
        shape = checkpoint.tensors[f"{name}.weight"][1].shape
        checkpoint.tensors[f"{name}.weight"] = "BF16", np.zeros(shape, np.uint16)
        del checkpoint.tensors[f"{name}.weight_scale"]
        checkpoint.quant["exclude"].append(name)
    out = convert(checkpoint.write(tmp_path / "ckpt"), tmp_path / "out", "compressed-tensors")
    assert "model.layers.1.moe.experts.0.gate_proj" in quant(out)["ignore"]
    assert read(out)["model.layers.1.moe.up_proj.weight"].shape == (EXPERTS, N, K)
    assert "model.layers.0.moe.experts.0.gate_proj" not in quant(out)["ignore"]


# What is refused, by layer; nothing is written, and the way out works.


def refused(folder: Path, layout: str, *parts: str) -> str:
    out = folder.with_name("out")
    with pytest.raises(ConvertError) as e:
        convert(folder, out, layout)
    assert not out.exists() and not out.with_name("out.part").exists()
    for part in parts:
        assert part in str(e.value), e.value
    return str(e.value)


@pytest.mark.parametrize("activation", ["static_sym", "static_asym", "tensor_dynamic"])
def test_activations_of_experts_that_vllm_does_not_run(activation, tmp_path):
    folder = Checkpoint(activation).write(tmp_path / "ckpt")
    refusal = refused(folder, "compressed-tensors", "model.layers.0.mlp.experts, ", "--per-token", "vllm-quark apply")
    assert ("shared_expert" in refusal) == (activation == "tensor_dynamic")
    convert(folder, tmp_path / "out", "compressed-tensors", per_token=True)


def test_other_formats_and_kv_caches(tmp_path):
    checkpoint = as_step(Checkpoint())
    proj = "model.layers.1.self_attn.o_proj"
    weight = {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}
    checkpoint.quant["layer_quant_config"][proj] = {"weight": weight, "input_tensors": weight}
    checkpoint.tensors[f"{proj}.weight"] = "U8", checkpoint.tensors[f"{proj}.weight"][1]
    checkpoint.tensors["model.layers.0.self_attn.k_proj.output_scale"] = f32(0.1)
    folder = checkpoint.write(tmp_path / "ckpt")
    refusal = refused(folder, "compressed-tensors", f"{proj}: is quantized to fp8_e4m3", "quantized KV cache")
    assert len(refusal.splitlines()) == 2 and all("--to per-expert" in line for line in refusal.splitlines())
    stacked = convert(folder, tmp_path / "stacked", "stacked")
    assert_same(read(convert(stacked, tmp_path / "out", "per-expert")), read(folder))


def test_stacks_that_vllm_does_not_read(tmp_path):
    folder = Checkpoint().write(tmp_path / "ckpt")
    refused(folder, "stacked", "model.layers.0.mlp.gate_proj", "Step-3.5", "--to compressed-tensors")
    convert(folder, tmp_path / "out", "compressed-tensors")


def test_unsound_checkpoints(tmp_path):
    checkpoint = Checkpoint()
    checkpoint.tensors["model.layers.0.self_attn.o_proj.weight_scale"] = f32(*[float("nan")] * N)
    refused(checkpoint.write(tmp_path / "ckpt"), "compressed-tensors", "o_proj.weight_scale", "is nan")


def test_nothing_to_convert(tmp_path):
    folder = Checkpoint().write(tmp_path / "ckpt")
    refused(folder, "per-expert", "serve it as it is")


# config.json goes on saying what it said.


def test_entries_that_name_stacks_name_experts_afterwards(tmp_path):
    checkpoint = as_step(Checkpoint("static_sym", stacked=True))
    for proj in ("gate_proj", "up_proj", "down_proj"):
        checkpoint.quant["layer_quant_config"][f"model.layers.1.moe.{proj}"] = layer_config()
    folder = checkpoint.write(tmp_path / "ckpt")
    out = convert(folder, tmp_path / "out", "per-expert")
    code, lines = check(out)
    assert code == 0 and f"  {3 * EXPERTS} modules: per-channel weights, dynamic per-token" in "\n".join(lines), lines


def test_exclude_that_would_catch_experts_afterwards(tmp_path):
    checkpoint = as_step(Checkpoint(stacked=True))
    checkpoint.quant["exclude"].append("*.moe.experts.*")
    folder = checkpoint.write(tmp_path / "ckpt")
    if check(folder)[0] == 0:
        refused(folder, "per-expert", "would be in `exclude`")


# Kills, memory, bad input.


def make_sparse(folder: Path, files: int, experts: int, rows: int, columns: int) -> Path:
    """Stacked experts of Step-3.5 in files that are holes but for their headers and scales."""
    checkpoint = as_step(Checkpoint(stacked=True))
    checkpoint.files = {f"model-{i:05}-of-{files:05}.safetensors": {} for i in range(files)}
    folder = checkpoint.write(folder)
    for i, name in enumerate(checkpoint.files):
        end = 16 * columns
        header, start = (
            {f"model.embed.{i}.weight": {"dtype": "BF16", "shape": [8, columns], "data_offsets": [0, end]}},
            end,
        )
        for proj in ("gate_proj", "up_proj", "down_proj"):
            shape = [experts, *((columns, rows) if proj == "down_proj" else (rows, columns))]
            for kind, dtype, dims, width in (("weight_scale", "F32", shape[:2], 4), ("weight", "I8", shape, 1)):
                end = start + width * int(np.prod(dims))
                header[f"model.layers.{i}.moe.{proj}.{kind}"] = {
                    "dtype": dtype,
                    "shape": dims,
                    "data_offsets": [start, end],
                }
                start = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + start)
            for info in header.values():
                if info["dtype"] == "F32":
                    file.seek(8 + len(text) + info["data_offsets"][0])
                    file.write(np.full(info["shape"], 0.5, np.float32).tobytes())
    return folder


def start(folder: Path, out: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "vllm_quark", "convert", folder, "-o", out, "--to", "per-expert", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_and_run_again(tmp_path):
    """What was whole stays, what was not is made anew, and the result is that of a run that nobody killed."""
    folder = make_sparse(tmp_path / "ckpt", files=3, experts=8, rows=1024, columns=4096)
    part = tmp_path / "out.part"
    run = start(folder, tmp_path / "out")
    second = part / "model-00001-of-00003.safetensors.new"
    while run.poll() is None and not (second.exists() and second.stat().st_size > 1 << 20):
        time.sleep(0.001)
    assert run.poll() is None, run.communicate()
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "out").exists()
    first = (part / "model-00000-of-00003.safetensors").stat()
    assert not (part / "model-00002-of-00003.safetensors").exists()

    result = cli(ROOT, "convert", folder, "-o", tmp_path / "out", "--to", "compressed-tensors")
    one_line(result, "out.part", "another conversion", "delete it")
    run = start(folder, tmp_path / "out")
    _, progress = run.communicate()
    assert run.returncode == 0, progress
    after = (tmp_path / "out/model-00000-of-00003.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    assert "100% of" in progress and "model-00002" in progress
    whole = convert(folder, tmp_path / "whole", "per-expert")
    assert {p.name for p in whole.iterdir()} == {p.name for p in (tmp_path / "out").iterdir()}
    for path in whole.iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_memory_does_not_grow_with_size(tmp_path):
    """Tensors of 600 MB each, and the process stays below 200 MB."""
    folder = make_sparse(tmp_path / "ckpt", files=1, experts=144, rows=1024, columns=4096)
    code = (
        "from vllm_quark.cli import main\n"
        "try: main()\n"
        "finally: print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    words = ["convert", folder, "-o", tmp_path / "out", "--to", "per-expert"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-2]) * 1024 < 200e6, result.stdout
    assert sum(p.stat().st_size for p in (tmp_path / "out").iterdir()) > 1.8e9
    shutil.rmtree(tmp_path / "out")


def test_no_room(tmp_path, monkeypatch):
    folder = as_step(Checkpoint()).write(tmp_path / "ckpt")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 100))
    with pytest.raises(ConvertError, match="0.0 GB are free: make room"):
        convert(folder, tmp_path / "out", "stacked")
    monkeypatch.undo()
    convert(folder, tmp_path / "out", "stacked")


def test_disk_fills_up(tmp_path):
    """A limit on the size of files stands for it: one line, and the next run goes on."""
    folder = make_sparse(tmp_path / "ckpt", files=2, experts=8, rows=256, columns=1024)
    words = ("convert", folder, "-o", tmp_path / "out", "--to", "per-expert")
    result = cli(ROOT, *words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)))
    assert result.returncode == 2 and "File too large" in result.stderr.splitlines()[-1], result
    assert f"{tmp_path}/out.part/model-00000-of-00002.safetensors.new: File too large" in result.stderr, result
    assert not (tmp_path / "out").exists()
    assert cli(ROOT, *words).returncode == 0


def test_two_at_a_time(tmp_path):
    folder = make_sparse(tmp_path / "ckpt", files=2, experts=8, rows=1024, columns=4096)
    run = start(folder, tmp_path / "out")
    while run.poll() is None and not list(tmp_path.glob("out.part/*.new")):
        time.sleep(0.001)
    run.send_signal(signal.SIGSTOP)
    result = cli(ROOT, "convert", folder, "-o", tmp_path / "out", "--to", "per-expert")
    run.send_signal(signal.SIGCONT)
    assert run.communicate() and run.returncode == 0
    one_line(result, "another process")


def test_bad_input(tmp_path):
    folder = as_step(Checkpoint()).write(tmp_path / "ckpt")
    to = ("--to", "stacked")
    one_line(cli(ROOT, "convert", tmp_path / "gone", "-o", tmp_path / "out", *to), "gone: is no folder", "hf download")
    one_line(cli(ROOT, "convert", folder, "-o", folder, *to), "exists already", "delete it")
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part/mine.txt").write_text("mine")
    one_line(cli(ROOT, "convert", folder, "-o", tmp_path / "out", *to), "is no part of a conversion")
    assert (tmp_path / "out.part/mine.txt").read_text() == "mine"
    one_line(cli(ROOT, "convert", tmp_path / "out.part", "-o", tmp_path / "o", *to), "config.json", "does not exist")


def test_the_command_that_serves_it(tmp_path):
    folder = as_step(Checkpoint()).write(tmp_path / "ckpt")
    result = cli(ROOT, "convert", folder, "-o", tmp_path / "my models/out", "--to", "stacked")
    assert result.stdout.endswith(f": vllm serve '{tmp_path}/my models/out'\n"), result


def test_killed_before_its_record_went(tmp_path):
    """All is there: the next run says so; another conversion does not take it for its own."""
    folder = as_step(Checkpoint()).write(tmp_path / "ckpt")
    out = convert(folder, tmp_path / "out", "stacked")
    write_record = (
        "import sys; from pathlib import Path; import vllm_quark.convert.write as w\n"
        "Path.unlink = lambda *_: sys.exit(9)\n"
        "from vllm_quark.cli import main; main()"
    )
    shutil.rmtree(out)
    words = ["convert", folder, "-o", out, "--to", "stacked"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", write_record, *words], capture_output=True, text=True, env=env)
    assert result.returncode == 9 and (out / "config.json").exists(), result
    one_line(cli(ROOT, "convert", folder, "-o", out, "--to", "compressed-tensors"), "out: exists already")
    result = cli(ROOT, *words)
    assert result.returncode == 0 and "stacked: vllm serve" in result.stdout, result
    whole = convert(folder, tmp_path / "whole", "stacked")
    assert {p.name for p in whole.iterdir()} == {p.name for p in out.iterdir()}


def test_folders_beside_the_weights(tmp_path):
    """Chat templates and code travel; other weights, what is hidden and the result itself do not."""
    folder = as_step(Checkpoint()).write(tmp_path / "ckpt")
    texts = {"additional_chat_templates/tool.jinja": "{{ x }}", "code/deep/model.py": "x = 1\n"}
    left_out = {".git/config": "x", "original/consolidated.pth": "x", "original/params.json": "{}"}
    for name, text in (texts | left_out).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for out in (tmp_path / "out", folder / "out"):
        convert(folder, out, "stacked")
        entries = {
            p.relative_to(out).as_posix(): p.read_text() for p in out.rglob("*") if p.parent != out and p.is_file()
        }
        assert entries == texts


def test_links_to_folders_above_are_not_followed(tmp_path):
    folder = as_step(Checkpoint()).write(tmp_path / "ckpt")
    (folder / "code").mkdir()
    (folder / "code/model.py").write_text("x = 1\n")
    for name, target in {"a": ".", "b": ".", "up": ".."}.items():
        (folder / "code" / name).symlink_to(target)
    (folder / "linked").symlink_to("code")
    out = convert(folder, tmp_path / "out", "stacked")
    assert {p.relative_to(out).as_posix() for p in out.rglob("*.py")} == {"code/model.py", "linked/model.py"}
    assert not (out / "code/a").exists()


def test_help_has_an_example():
    result = cli(ROOT, "convert", "--help")
    assert result.returncode == 0 and "vllm-quark convert Step-3.5-Flash-INT8 -o" in result.stdout


def test_neither_torch_nor_vllm_is_imported(tmp_path):
    folder = as_step(Checkpoint()).write(tmp_path / "ckpt")
    code = (
        "import sys; from vllm_quark.cli import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'vllm'} & sys.modules.keys()"
    )
    words = ["convert", folder, "-o", tmp_path / "out", "--to", "compressed-tensors"]
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and "vllm serve" in result.stdout, result
