# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Fifty broken nano checkpoints through the engine: each is right or refused."""

import collections
import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from examples.step3p5_nano.model import load
from tests.e2e.jobs import read_logprobs
from tests.quantization.quark.mutants import Mutator, is_int8, judge_error

COUNT = 50
NOT_BUILT = re.compile(r"\.layers\.(8|9|10)\.")  # the MTP layers
NAMED = ("layers.", "embed_tokens", "the embedding", "lm_head", "norm.weight", "the last norm", ".safetensors")


class Mutant:
    """A changed copy of a checkpoint folder; `change` says how."""

    def __init__(self, seed: int, sources: list[Path], out: Path):
        pick = random.Random(f"folder {seed}").choice
        source = pick(sources)
        self.folder, self.change = out / str(seed), source.name
        shutil.copytree(source, self.folder, ignore=shutil.ignore_patterns("*.index.json"))
        file = self.folder / "model.safetensors"
        tensors = load_file(file)
        kept = {k: tensors.pop(k) for k in list(tensors) if NOT_BUILT.search(k)}
        config = json.loads((self.folder / "config.json").read_text())
        self.config = config["quantization_config"]
        self.mutator = Mutator(seed, tensors, self.config)
        self.is_cut = pick(range(13)) == 0
        if not self.is_cut:
            self.change += f": {self.mutator.mutate()}"
        self.tensors = tensors | kept
        write(file, self.tensors)
        if self.mutator.again:
            write(self.folder / "more.safetensors", self.mutator.again)
        if not self.config:
            del config["quantization_config"]
        (self.folder / "config.json").write_text(json.dumps(config))
        if self.is_cut:
            size = file.stat().st_size
            at = pick([0, 6, 4000, size // 2, size - 5])
            os.truncate(file, at)
            self.change += f": file cut at {at}"


def write(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, {"format": "pt"})


def reading(mutant: Mutant, ids: torch.Tensor) -> torch.Tensor | None:
    """Log-probabilities [B, T, V] that the mutant's numbers say; None: nothing sound."""
    from tests.quantization.quark.checkpoints import activation_of  # imports vLLM

    if mutant.is_cut or mutant.mutator.flaw:
        return None
    tensors = dict(mutant.tensors)
    try:
        for name in [n for n in tensors if n.endswith("weight_scale")]:
            module, scale = name.removesuffix(".weight_scale"), tensors.pop(name)
            if activation_of(mutant.config, module) is None:
                continue  # the layer is not quantized, whatever lies beside it
            if not (torch.isfinite(scale).all() and (scale > 0).all()):
                return None
            rows = tensors[f"{module}.weight"].shape[:-1]
            tensors[name] = scale.reshape(()).expand(rows) if scale.numel() == 1 else scale
        for name in [n for n in tensors if n.endswith("_zero_point")]:
            if tensors.pop(name).any() and name.endswith("weight_zero_point"):
                return None
        folder = mutant.folder / "reading"
        folder.mkdir()
        shutil.copy(mutant.folder / "config.json", folder)
        write(folder / "model.safetensors", tensors)
        return load(folder)(ids).log_softmax(-1)
    except Exception:  # missing or misshapen tensors, a config that says nothing: whatever it is, no checkpoint
        return None


@pytest.mark.engine
def test_mutants_through_the_engine(ckpts, judge, in_process, tmp_path):
    sources = [ckpts["quark"], ckpts["quark-all"], ckpts["stacked"]]
    mutants = [Mutant(seed, sources, tmp_path) for seed in range(COUNT)]
    ids = [w[:120] for w in judge.windows[:3]]
    results = in_process([{"ckpt": str(m.folder), "ids": ids, "logprobs": 258, "tokens": 4} for m in mutants])
    verdicts, unnamed, silent = collections.Counter(), [], []
    for mutant, result in zip(mutants, results, strict=True):
        if "error" in result:
            message = result["error"]
            verdict = judge_error(result["type"], message, result["file"], NAMED)
            assert verdict != "bare", (mutant.change, result)
            if verdict == "unnamed":
                unnamed.append(f"{mutant.change}: {result['type']}: {message.splitlines()[0][:100] if message else ''}")
        elif mutant.config and not is_int8(mutant.config):
            verdict = "not INT8"
        elif (expected := reading(mutant, torch.tensor(ids))) is None:
            verdict = "silent"
            silent.append(f"{mutant.change}: nothing sound")
        else:
            out = read_logprobs(result, 258)
            gap = F.kl_div(out, expected[:, :-1], reduction="none", log_target=True).sum(-1).mean().item()
            verdict = "right" if gap < 0.05 else "silent"
            if verdict == "silent":
                silent.append(f"{mutant.change}: {gap:.3f} nats from what its numbers say")
        verdicts[verdict] += 1
    print(f"\n{COUNT} mutants through the engine: {dict(verdicts)}")
    print("\n".join(["upstream's errors without a name:", *unnamed]))
    assert not silent, "\n".join(silent)
    assert verdicts["right"] >= 5 and verdicts["refused"] >= 20
