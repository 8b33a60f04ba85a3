# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Many checkpoints through the engine, one after the other, in this process: seconds each instead of a minute.

    PYTHONPATH=VLLM python in_process.py JOBS.json

JOBS.json is a list of {"ckpt": folder, "out": file, "ids": [[token]], "logprobs": count, "tokens": count} and, where
wanted, "options" of LLM and the folder of a LoRA "adapter". Each `out` gets {"logprobs": per prompt and position from
the second on, {token: log-probability}} and the greedy "tokens" after the first prompt, or {"error": text, "type":
name, "file": where it was raised} where the checkpoint is refused.
"""

import json
import os
import sys
import traceback
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def find_origin(error: Exception) -> str:
    """The file that raised an error, or the one that pydantic tells of."""
    entries = [*getattr(error, "errors", list)()]
    inner = next((e["ctx"]["error"] for e in entries if "error" in e.get("ctx", {})), error)
    return traceback.extract_tb(inner.__traceback__)[-1].filename if inner.__traceback__ else ""


def serve(job: dict) -> dict:
    import torch
    from engines import SETTINGS, clean
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    llm, options, request = None, job.get("options", {}), {}
    if torch.cuda.is_available():  # other processes are on the card
        options = options | {"gpu_memory_utilization": 0.04, "kv_cache_memory_bytes": 256 << 20}
        if hasattr(EngineArgs, "gdn_prefill_backend"):  # the default needs FlashInfer on Hopper
            options["gdn_prefill_backend"] = "triton"
    if adapter := job.get("adapter"):
        options = options | {"enable_lora": True, "max_lora_rank": 8}
        request = {"lora_request": LoRARequest("adapter", 1, adapter)}
    try:
        llm = LLM(
            job["ckpt"],
            **SETTINGS,
            enforce_eager=True,
            max_logprobs=300,
            distributed_executor_backend=UniProcExecutor,
            **options,
        )
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["ids"]]
        if request:
            # On CPU vLLM has no logits of a prompt's tokens with an adapter: each prefix is a prompt.
            params = SamplingParams(temperature=0, max_tokens=1, logprobs=job["logprobs"], detokenize=False)
            prefixes = [[TokensPrompt(prompt_token_ids=ids[:n]) for n in range(1, len(ids))] for ids in job["ids"]]
            outs = [llm.generate(group, params, use_tqdm=False, **request) for group in prefixes]
            entries = [[o.outputs[0].logprobs[0] for o in group] for group in outs]
        else:
            params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=job["logprobs"], detokenize=False)
            entries = [o.prompt_logprobs[1:] for o in llm.generate(prompts, params, use_tqdm=False)]
        logprobs = [[{t: p.logprob for t, p in at.items()} for at in prompt] for prompt in entries]
        params = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
        tokens = llm.generate(prompts[:1], params, use_tqdm=False, **request)[0].outputs[0].token_ids
        return {"logprobs": logprobs, "tokens": list(tokens)}
    except Exception as e:
        frame = traceback.extract_tb(e.__traceback__)[-1]
        return {"error": str(e), "type": type(e).__name__, "file": frame.filename, "origin": find_origin(e)}
    finally:
        del llm
        clean()


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        Path(job["out"]).write_text(json.dumps(serve(job)))


if __name__ == "__main__":
    main()
