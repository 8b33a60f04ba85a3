# SPDX-License-Identifier: Apache-2.0
"""`vllm bench serve` on the checkpoints of gpu_engine: time to first token and per token over request rates.

    python -m benchmarks.speed.gpu_serve OUT.json --work /dev/shm/depth --tokenizer FOLDER --series SITE [--sums SITE]
        [--stock SITE] [--runs bf16,fp8,quark-series] [--rates 8,32,inf]

Each of the runs is a server of its own, with the checkpoint, site and settings of `gpu_engine all`. Each rate is one
`vllm bench serve`: random prompts of 512 tokens, 64 tokens each, some ten seconds of requests. tokenizer: a folder with
any tokenizer whose ids the model has, such as a checkpoint of the nano model. Each server compiles Triton's kernels
anew: "first" has the figures of its first requests, 8 per second. All requests at once follow, without a figure, and
then the rates. Beside each rate stands the host's load before it: runs compare only where nothing else kept the host
busy.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from benchmarks.bench_serve import measure_serving
from benchmarks.speed.depth_runs import COMPILATION, RUNS, make_checkpoint
from examples.step3p5_nano.lab import find_port

PROMPT, ANSWER, SECONDS, MOST = 512, 64, 10, 400
FIGURES = ("request_throughput", "output_throughput", "completed", "failed")
FIGURES += tuple(f"{which}_{metric}_ms" for metric in ("ttft", "tpot") for which in ("median", "p99"))
CLI = [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def flags_of(engine: dict) -> list[str]:
    """Arguments of LLM as those of `vllm serve`."""
    flags: list[str] = []
    for name, value in engine.items():
        flags += [f"--{name.replace('_', '-')}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def wait_for(process: subprocess.Popen, url: str, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return True
        except OSError:
            time.sleep(1)
    return False


def measure_rate(url: str, rate: str, args: argparse.Namespace, log: Path, env: dict) -> dict:
    """Figures of one rate, in requests per second."""
    count = MOST if rate == "inf" else min(MOST, max(30, int(float(rate) * SECONDS)))
    flags = ["--random-input-len", str(PROMPT), "--random-output-len", str(ANSWER), "--ignore-eos"]
    flags += ["--num-prompts", str(count), "--request-rate", rate]
    flags += ["--percentile-metrics", "ttft,tpot", "--metric-percentiles", "99"]
    try:
        result = measure_serving(url, "depth", args.tokenizer, flags, log, env, args.timeout)
    except RuntimeError as error:
        return {"failed to run": str(error)}
    return {name: result[name] for name in FIGURES if name in result}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    for site in ("series", "sums", "stock"):
        parser.add_argument(f"--{site}", type=Path, required=site == "series")
    parser.add_argument("--runs", default="bf16,fp8,quark-series")
    parser.add_argument("--rates", default="8,32,inf")
    parser.add_argument("--moe-layers", type=int, default=4)
    parser.add_argument("--server", type=shlex.split, default=[], metavar="FLAGS", help="more flags of vllm serve")
    parser.add_argument("--timeout", type=float, default=200)
    args = parser.parse_args()
    results: dict = {"moe layers": args.moe_layers, "prompt": PROMPT, "answer": ANSWER, "runs": {}}
    if args.out.exists():
        results = json.loads(args.out.read_text())
    for name in args.runs.split(","):
        kind, site, engine = RUNS[name]
        checkpoint = make_checkpoint(args.work, kind, args.moe_layers + 1)
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1"}
        env["PYTHONPATH"] = f"{getattr(args, site)}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        port = find_port()
        words = [*CLI, "serve", str(checkpoint), "--tokenizer", str(args.tokenizer), "--served-model-name", "depth"]
        words += ["--port", str(port), "--max-model-len", "2048", "--max-num-seqs", "128", "--no-enable-prefix-caching"]
        words += ["--compilation-config", json.dumps(COMPILATION), "--kv-cache-memory-bytes", str(6 << 30)]
        log = args.out.with_suffix(f".{name}.log")
        log.unlink(missing_ok=True)
        kept = tempfile.TemporaryDirectory(prefix="triton-", dir=args.work, ignore_cleanup_errors=True)
        with open(log, "a") as output, kept as cache:  # the clients append, too
            env["TRITON_CACHE_DIR"] = cache
            start = time.monotonic()
            server = subprocess.Popen(
                [*words, *flags_of(engine), *args.server], env=env, stdout=output, stderr=subprocess.STDOUT
            )
            try:
                url, rates = f"http://127.0.0.1:{port}", {}
                if not wait_for(server, url, args.timeout):
                    rates = {"no server": server.poll()}
                else:
                    rates["seconds until ready"] = time.monotonic() - start
                    rates["first"] = measure_rate(url, "8", args, log, env)
                    measure_rate(url, "inf", args, log, env)
                    for rate in args.rates.split(","):
                        load = os.getloadavg()[0]
                        rates[rate] = {"host's load before": load, **measure_rate(url, rate, args, log, env)}
            finally:
                server.terminate()
                server.wait(60)
        results["runs"].setdefault(name, []).append(rates)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        print(name, json.dumps(rates), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
