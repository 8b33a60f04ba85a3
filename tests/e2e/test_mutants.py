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

COUNT = 50
CONFIG_KEYS = ("quant_method", "global_quant_config", "exclude", "export", "layer_quant_config")


class Mutant:
    """A changed copy of a checkpoint folder; `what` says how."""

    def __init__(self, seed: int, sources: list[Path], out: Path):
        self.random = random.Random(seed)
        self.folder = out / str(seed)
        source = self.random.choice(sources)
        shutil.copytree(source, self.folder)
        for extra in self.folder.glob("*.index.json"):
            extra.unlink()
        self.tensors = load_file(self.folder / "model.safetensors")
        self.config = json.loads((self.folder / "config.json").read_text())
        self.again: dict[str, torch.Tensor] = {}
        change = self.random.choice([self.tensor] * 5 + [self.exclude] * 2 + [self.key] * 2 + [self.file])
        self.change = f"{source.name}: {change()}"

    def write(self, cut: int | None = None) -> None:
        (self.folder / "model.safetensors").unlink()
        tensors = {k: v.contiguous() for k, v in self.tensors.items()}
        save_file(tensors, self.folder / "model.safetensors", {"format": "pt"})
        if self.again:
            save_file(self.again, self.folder / "more.safetensors", {"format": "pt"})
        if cut is not None:
            os.truncate(self.folder / "model.safetensors", cut)
        (self.folder / "config.json").write_text(json.dumps(self.config))

    def tensor(self) -> str:
        names = [k for k in self.tensors if "layers.8." not in k and "layers.9." not in k and "layers.10." not in k]
        name = self.random.choice(sorted(names))
        if self.random.random() < 0.6:  # experts are most of a checkpoint, but not of what breaks
            name = self.random.choice(sorted(k for k in names if ".experts." not in k))
        tensor = self.tensors[name]
        how = self.random.choice(
            ["drop", "rename", "int8", "half", "transpose", "column", "nan", "negate", "twice", "cut"]
        )
        if how == "drop":
            del self.tensors[name]
        elif how == "rename":
            self.tensors[name.replace("model.", "model.model.", 1) + "_"] = self.tensors.pop(name)
        elif how in ("int8", "half"):
            self.tensors[name] = tensor.to(torch.int8 if how == "int8" else torch.float16)
        elif how == "transpose" and tensor.dim() > 1:
            self.tensors[name] = tensor.transpose(-1, -2)
        elif how == "column":
            for k in [k for k in self.tensors if k.endswith("weight_scale")]:
                self.tensors[k] = self.tensors[k].unsqueeze(-1)
        elif how in ("nan", "negate"):
            name = self.random.choice(sorted(k for k in names if k.endswith("weight_scale")))
            bad = self.tensors[name].clone()
            bad.view(-1)[3] = float("nan") if how == "nan" else -bad.view(-1)[3]
            self.tensors[name] = bad
        elif how == "twice":
            self.again = {name: self.random.choice([tensor.clone(), tensor + 1])}
        elif how == "cut":
            self.tensors[name] = tensor[: max(1, len(tensor) // 2)]
        self.write()
        return f"{how} {name}"

    def exclude(self) -> str:
        entries = self.config["quantization_config"]["exclude"]
        how = self.random.choice(["globs", "bare", "vllm", "forget", "more", "null", "regex", "nonsense"])
        attention = [e for e in entries if "self_attn" in e]
        if how == "globs":
            entries[:] = [e for e in entries if e not in attention] + (["*self_attn*"] if attention else [])
        elif how == "bare":
            entries[:] = [e.removeprefix("model.") for e in entries]
        elif how == "vllm":
            entries[:] = [e.replace(".share_expert.", ".moe.share_expert.") for e in entries]
        elif how == "forget":
            gone = self.random.choice(entries)
            entries.remove(gone)
            how += f" {gone}"
        elif how == "more":
            weights = sorted(k for k, v in self.tensors.items() if v.dtype == torch.int8 and "layers.10." not in k)
            entries.append(self.random.choice(weights).removesuffix(".weight"))
            how += f" {entries[-1]}"
        elif how == "null":
            self.config["quantization_config"]["exclude"] = None
        elif how == "regex":
            entries.append("re:model.layers.(")
        else:
            entries.append("model.layers.77.nothing")
        self.write()
        return f"exclude {how}"

    def key(self) -> str:
        quant = self.config["quantization_config"]
        how = self.random.choice(["missing", "null", "none", "asymmetric", "static", "tensor", "group"])
        if how in ("missing", "null"):
            key = self.random.choice(CONFIG_KEYS)
            quant[key] = None
            if how == "missing":
                del quant[key]
            how += f" {key}"
        elif how == "none":
            del self.config["quantization_config"]
        elif how == "asymmetric":
            quant["global_quant_config"]["weight"]["symmetric"] = False
        elif how == "static":
            quant["global_quant_config"]["input_tensors"].update(is_dynamic=False, qscheme="per_tensor", ch_axis=None)
        else:
            quant["global_quant_config"]["weight"]["qscheme"] = f"per_{how}"
        self.write()
        return f"config {how}"

    def file(self) -> str:
        size = (self.folder / "model.safetensors").stat().st_size
        cut = self.random.choice([0, 6, 4000, size // 2, size - 5])
        self.write(cut)
        return f"file cut at {cut}"


def reading(mutant: Mutant, ids: torch.Tensor) -> torch.Tensor | None:
    """Log-probabilities [B, T, V] that the mutant's tensors say; None: nothing sound."""
    try:
        if mutant.again and not all(torch.equal(mutant.tensors[k], v) for k, v in mutant.again.items()):
            return None
        scales = [v for k, v in mutant.tensors.items() if k.endswith("weight_scale")]
        if not all(torch.isfinite(s).all() and (s > 0).all() for s in scales):
            return None
        return load(mutant.folder)(ids).log_softmax(-1)
    except Exception:  # truncated files, missing or misshapen tensors: whatever it is, no checkpoint
        return None


@pytest.mark.engine
def test_mutants_through_the_engine(ckpts, judge, in_process, tmp_path):
    sources = [ckpts["quark"], ckpts["quark-all"], ckpts["stacked"]]
    mutants = [Mutant(seed, sources, tmp_path) for seed in range(COUNT)]
    ids = [w[:120] for w in judge.windows[:3]]
    results = in_process([{"ckpt": str(m.folder), "ids": ids, "logprobs": 258, "tokens": 4} for m in mutants])
    verdicts, unnamed = collections.Counter(), []
    for mutant, result in zip(mutants, results, strict=True):
        if "error" in result:
            said = result["error"]
            ours = re.search(r"/quark/int8/\w+\.py$|/cpu_int8_\w+\.py$", result["file"])
            assert not ours or result["type"] == "ValueError", (mutant.change, result)
            named = any(
                w in said
                for w in ("layers.", "embed_tokens", "lm_head", "norm.weight", "quantization_config", ".safetensors")
            )
            verdict = "refused" if named or "regular expression" in said else "refused without a name"
            if verdict != "refused":
                unnamed.append(f"{mutant.change}: {result['type']}: {said.splitlines()[0][:100] if said else ''}")
        else:
            expected = reading(mutant, torch.tensor(ids))
            assert expected is not None, f"silent: {mutant.change}"
            out = torch.tensor([[[at[str(t)] for t in range(258)] for at in p] for p in result["logprobs"]])
            gap = F.kl_div(out, expected[:, :-1], reduction="none", log_target=True).sum(-1).mean().item()
            assert gap < 0.05, f"silent: {mutant.change}: {gap:.3f} nats from what its numbers say"
            verdict = "right"
        verdicts[verdict] += 1
    print(f"\n{COUNT} mutants through the engine: {dict(verdicts)}")
    print("\n".join(["upstream's errors without a name:", *unnamed]))
    assert verdicts["right"] >= 5 and verdicts["refused"] >= 20
