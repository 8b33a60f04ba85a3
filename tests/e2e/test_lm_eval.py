# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""README's command of lm-evaluation-harness, `lm_eval --model vllm`, on nano: `make lm-eval` makes its environment."""

import json
import subprocess

import pytest

from examples.step3p5_nano.lab import CPU_PATCHES, GARBAGE, HERE, RIGHT, ROOT

PYTHON = ROOT / "build/lm-eval/bin/python"
OPERATOR = ROOT / "vllm_quark/_int8_moe_C.abi3.so"
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not (ROOT / "build/lm-eval/.made").exists(), reason="make lm-eval makes its environment"),
]


@pytest.fixture
def lm_eval(tmp_path):
    """`lm_eval(ckpt, *flags)`: perplexity per byte by lm_eval under `vllm-quark run FLAGS`."""

    def run(ckpt, *flags) -> float:
        args = f"pretrained={ckpt},dtype=bfloat16,max_model_len=1024,enforce_eager=True,add_bos_token=False"
        words = [
            PYTHON,
            "-m",
            "vllm_quark",
            "run",
            *flags,
            "--",
            PYTHON.with_name("lm_eval"),
            "--model",
            "vllm",
            "--model_args",
            args,
            "--include_path",
            HERE,
            "--tasks",
            "nano_held_out",
            "--output_path",
            tmp_path,
        ]
        env = {
            "PATH": f"{PYTHON.parent}:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        if OPERATOR.exists():
            env["VLLM_INT8_MOE_LIBRARY"] = str(OPERATOR)
        process = subprocess.run(words, capture_output=True, text=True, env=env, cwd=ROOT)
        assert process.returncode == 0, process.stdout[-1000:] + process.stderr[-3000:]
        (result,) = tmp_path.rglob("results_*.json")
        scores = json.loads(result.read_text())["results"]["nano_held_out"]
        result.unlink()
        return next(value for name, value in scores.items() if name.startswith("byte_perplexity,"))

    return run


def test_the_figure_is_the_one_of_docs(lm_eval, ckpts, judge):
    """Within 2 % of the float reference's, and 1 % of what the INT8 numbers say."""
    scores = lm_eval(ckpts["quark"])
    print(f"\nlm_eval: {scores:.4f} per byte, float reference {judge.reference.perplexity:.4f}")
    assert abs(scores / judge.reference.perplexity - 1) <= RIGHT
    assert abs(scores / judge.emulate(ckpts["quark"]).perplexity - 1) <= 0.01


def test_garbage_without_the_fixes(lm_eval, ckpts, judge):
    scores = lm_eval(ckpts["quark"], "--only", ",".join(CPU_PATCHES))
    assert not scores < GARBAGE * judge.reference.perplexity  # NaN, too
