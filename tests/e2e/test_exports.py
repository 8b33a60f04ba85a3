# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Calibrated static exports, symmetric and not, of AMD Quark itself, through the engine."""

import json

import pytest
import torch

from tests.e2e.jobs import read_logprobs, relative_distance

pytestmark = pytest.mark.xdist_group("exports")
SCHEMES = [f"{kind}-{w}-{s}" for kind in ("moe", "dense") for w in ("channel", "tensor") for s in ("sym", "asym")]


@pytest.fixture(scope="module")
def served(exports, in_process) -> dict[str, dict]:
    jobs = []
    for name in SCHEMES:
        ids = json.loads((exports / name / "expected.json").read_text())["ids"]
        jobs.append({"ckpt": str(exports / name), "ids": ids, "logprobs": 128, "tokens": 4})
    return dict(zip(SCHEMES, in_process(jobs), strict=True))


@pytest.mark.engine
@pytest.mark.parametrize("name", SCHEMES)
def test_static_exports(name, exports, served):
    """Log-probabilities are the float reference's, far nearer than with a broken layer."""
    result, expected = served[name], json.loads((exports / name / "expected.json").read_text())
    assert "error" not in result, result
    out = read_logprobs(result, 128)
    # Experts of a static export are served with per-token scales.
    references = {reading: torch.tensor(expected[reading])[:, :-1] for reading in ("exact", "served", "blank")}
    distances = {reading: round(relative_distance(out, y), 4) for reading, y in references.items()}
    print(name, distances)
    assert distances["served"] <= 0.15 and distances["blank"] >= 0.5, distances
