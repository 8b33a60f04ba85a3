# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""How near to a tie greedy texts part: the float model's gap between the two tokens.

    python -m benchmarks.correctness.divergence --ckpts DIR --stdlib DIR RESULTS

RESULTS holds what gpu_parallel.py wrote (--out). For each run against the same checkpoint's `mtp-0` (one GPU, no
drafts): at the first token where a text differs, the difference in log-probability that the checkpoint's float32
W8A8 emulation (BF16: the float model) gives the two tokens.
"""

import argparse
import json
import re
from pathlib import Path

from examples.step3p5_nano.lab import Judge

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "examples/step3p5_nano"


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--ckpts", type=Path, required=True)
    ap.add_argument("--stdlib", type=Path, default=None)
    ap.add_argument("results", type=Path)
    args = ap.parse_args()
    judge = Judge(stdlib=args.stdlib)
    print("| checkpoint | run | texts that part | largest gap (nats) | gaps |\n|---|---|---|---|---|")
    for base in sorted(args.results.glob("*-mtp-0.json")):
        name = base.name.removesuffix("-mtp-0.json")
        ckpt = NANO if name == "bf16" else args.ckpts / name
        base_texts = json.loads(base.read_text())["continuations"]
        for result in sorted(args.results.glob(f"{name}-*.json")):
            kind = result.stem.removeprefix(f"{name}-")
            if result == base or not re.match(r"mtp-\d|tensor|expert|pipeline|data", kind):
                continue
            gaps = judge.gaps(ckpt, base_texts, json.loads(result.read_text())["continuations"])
            listed = ", ".join(f"{g:.3f}" for g in gaps)
            parted, largest = f"{len(gaps)} of {len(base_texts)}", max(gaps, default=0)
            print(f"| {name} | {kind} | {parted} | {largest:.3f} | {listed} |", flush=True)


if __name__ == "__main__":
    main()
