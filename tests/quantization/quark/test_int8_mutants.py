# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Broken INT8 checkpoints: each computes what its numbers say, or is refused.

Mutants of good one-layer checkpoints go through QuarkConfig, the loaders and the
kernels; a float64 reading of the same mutant, which shares nothing with vLLM,
says what is right. Run as a module, it prints the table for the vLLM it finds:

    python -m tests.quantization.quark.test_int8_mutants 2000
"""

import collections
import dataclasses
import os
import random
import sys
import traceback

import pytest
import torch

from vllm.platforms import current_platform

from . import checkpoints as ck
from .mutants import Mutator, is_int8, judge_error
from .utils import vllm_environment

COUNT = int(os.environ.get("VLLM_QUARK_MUTANTS", "2000"))


@dataclasses.dataclass
class Verdict:
    mutation: str
    outcome: str  # right, refused, not INT8, unnamed, bare, wrong
    detail: str


def judge(seed: int) -> Verdict:
    """Make, mutate and serve checkpoint number `seed`."""
    pick = random.Random(f"case {seed}").choice
    case = ck.Case(pick(ck.LINEAR + ck.EXPERTS), pick(ck.WEIGHTS), pick(ck.ACTIVATIONS))
    generator = torch.Generator().manual_seed(seed)
    x = ck.inputs_for(case, 9, generator)
    c = ck.draw_checkpoint(case, x, generator)
    routes = ck.routing(9, generator)
    number = c.prefix.split(".")[2]
    mutator = Mutator(seed, c.tensors, c.config)
    mutation = f"{case}: {mutator.mutate()}"
    expected, why = [], None
    # Static and asymmetric schemes may be served per token.
    for reading in (None, "token_sym", "token_asym"):
        try:
            if mutator.flaw:
                raise ck.MalformedError(mutator.flaw)
            expected.append(ck.reference(c, x, routes, reading))
        except ck.MalformedError as e:
            why = why or e
    if not is_int8(c.config):
        return Verdict(mutation, "not INT8", "")
    try:
        out = ck.serve(c, x, routes, list(mutator.again.items()))
    except Exception as e:
        last = traceback.extract_tb(e.__traceback__)[-1]
        kind = type(e).__name__
        outcome = judge_error(kind, str(e), last.filename, [f"layers.{number}."])
        detail = f"{kind}: {e}"
        if outcome == "bare":
            detail += f" at {last.filename}:{last.lineno}"
        return Verdict(mutation, outcome, detail)
    if not expected:
        return Verdict(mutation, "wrong", f"served, but {why}")
    error = min(ck.deviation(out, e) for e in expected)
    # Twice the matrix's bounds: with nine tokens one tie between two of 127 steps
    # can be 1 %.
    if error[0] <= 0.02 and error[1] <= 0.06:
        return Verdict(mutation, "right", "")
    return Verdict(
        mutation, "wrong", f"off by {error[0]:.3g}, worst token {error[1]:.3g}"
    )


def table(count: int) -> list[Verdict]:
    verdicts = [judge(seed) for seed in range(count)]
    totals = collections.Counter(v.outcome for v in verdicts)
    print(f"\n{count} mutants:", ", ".join(f"{v} {k}" for k, v in totals.most_common()))
    unnamed = collections.Counter(
        v.detail.split(":")[0] + ":" + v.detail.split(":")[-1][:60]
        for v in verdicts
        if v.outcome == "unnamed"
    )
    for detail, number in unnamed.most_common():
        print(f"  upstream's, without a name, {number}: {detail}")
    return verdicts


@pytest.mark.skipif(
    not current_platform.is_cpu(), reason="looks at loaders, which are CPU code"
)
def test_mutants():
    ck.needs_kernel("moe_stacked")
    with vllm_environment(), torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        verdicts = table(COUNT)
    silent = [v for v in verdicts if v.outcome in ("wrong", "bare")]
    assert not silent, silent[:5]
    outcomes = collections.Counter(v.outcome for v in verdicts)
    assert outcomes["right"] > COUNT / 10 and outcomes["refused"] > COUNT / 3


if __name__ == "__main__":
    with vllm_environment(), torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        for verdict in table(int(sys.argv[1]) if sys.argv[1:] else COUNT):
            if verdict.outcome in ("wrong", "bare") or "-v" in sys.argv:
                print(verdict)
