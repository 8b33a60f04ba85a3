# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Train the nano model and write it as a Hugging Face checkpoint (BF16).

    python -m examples.step3p5_nano.train --out OUT [--steps 1250] [--stdlib DIR] [--minutes 9]

Runs on a GPU in minutes, on a CPU in hours. The router's selection bias balances the load as in
DeepSeek-V3 (arXiv 2412.19437, 2.1.2): after each step it moves by a constant towards experts that
were chosen less than average.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from examples.step3p5_nano.model import MoE, Step3p5, acceptance, evaluate, load
from examples.step3p5_nano.text import EOS, held_out_windows, stdlib, text_of, training_files

HERE = Path(__file__).parent
ROUTER_BIAS_STEP = 1e-3
MTP_WEIGHT = 0.3  # as in DeepSeek-V3


def save(model: Step3p5, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        k: (v if k.endswith("router_bias") else v.bfloat16()).detach().cpu().contiguous()
        for k, v in model.state_dict().items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (out / name).resolve() != (HERE / name).resolve():
            shutil.copy(HERE / name, out / name)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--stdlib", type=Path, default=stdlib(), help="folder with the library's sources")
    ap.add_argument("--steps", type=int, default=1250)
    ap.add_argument("--minutes", type=float, default=math.inf, help="finish within this time, decaying on time")
    ap.add_argument("--batch", type=int, default=96)
    ap.add_argument("--length", type=int, default=512)
    ap.add_argument("--lr", type=float, default=3e-3)
    args = ap.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    data = bytearray()
    files = training_files(args.stdlib)
    for f in files:
        data += f.read_bytes()
        data.append(0)  # becomes EOS below; no source file holds a NUL
    corpus = torch.frombuffer(data, dtype=torch.uint8).long()
    corpus[corpus == 0] = EOS
    corpus = corpus.to(device)
    held_out = torch.tensor(held_out_windows(args.stdlib), device=device)
    model = Step3p5(json.loads((HERE / "config.json").read_text())).to(device)
    print(f"{len(files)} files, {len(corpus):,} bytes; {sum(p.numel() for p in model.parameters()):,} parameters")

    moes = [m for m in model.modules() if isinstance(m, MoE)]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device == "cuda")
    start, step, progress = time.time(), 0, 0.0
    while progress < 1:
        progress = max(step / args.steps, (time.time() - start) / (60 * args.minutes))
        rate = args.lr * min(1, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * min(progress, 1))) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(corpus) - args.length, (args.batch, 1), device=device)
        ids = corpus[starts + torch.arange(args.length + 1, device=device)]
        with torch.autocast(device, torch.bfloat16):
            all_logits = model.all_logits(ids[:, :-1])
        # The k-th MTP layer sees one token less and predicts one token further.
        losses = [F.cross_entropy(y.flatten(0, 1).float(), ids[:, k + 1 :].flatten()) for k, y in enumerate(all_logits)]
        loss = losses[0]
        total = loss + MTP_WEIGHT * sum(losses[1:]) / max(1, len(losses) - 1)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loads = [moe.load for moe in moes if moe.load is not None]
        for moe, chosen in zip(moes, loads, strict=True):
            moe.router_bias += ROUTER_BIAS_STEP * (1 - progress) * (chosen.mean() - chosen).sign()
        if step % 250 == 0 or progress >= 1:
            model.eval()
            with torch.autocast(device, torch.bfloat16):
                ppl, _ = evaluate(model, held_out)
            model.train()
            loads = [moe.load for moe in moes if moe.load is not None]
            uneven = max((chosen.max() / chosen.mean()).item() for chosen in loads)
            print(
                f"step {step} {time.time() - start:.0f} s: train {loss.exp():.3f} held-out {ppl:.3f} "
                f"busiest expert {uneven:.2f}x",
                flush=True,
            )
        step += 1

    save(model, args.out)
    final = load(args.out).to(device)
    ppl, top = evaluate(final, held_out)
    print(f"saved {args.out}: {ppl:.4f} perplexity per byte on {len(held_out)} held-out windows")
    print(f"first MTP layer: {acceptance(final, held_out):.3f} of its tokens accepted")
    print(text_of(top[0].tolist())[:300])


if __name__ == "__main__":
    main()
