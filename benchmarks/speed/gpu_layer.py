# SPDX-License-Identifier: Apache-2.0
"""One routed-experts layer on a GPU: random weights, inputs and routing, launch
configs of vLLM's fused_moe_kernel, and times of CUDA-graph replays.

Shapes are Step-3.5-Flash's where none is said: 288 experts, top-8, hidden 4096,
expert width 1280. Runs on CUDA and ROCm alike; `compile_kernel` needs no GPU.
"""

import itertools
import json
import math
import multiprocessing
import os
import statistics
from dataclasses import dataclass
from pathlib import Path

COUNTS = (
    *(1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512),
    *(1024, 1536, 2048, 3072, 4096, 8192),
)
EXPERTS, TOP_K, HIDDEN, WIDTH = 288, 8, 4096, 1280
# Experts' popularity is lognormal with this sigma: the busiest of 288 gets about
# six times the mean, as routers balanced by a bias do.
SKEW = 0.7
FIELDS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M")
FIELDS += ("num_warps", "num_stages")

Key = tuple[int, ...]


def as_config(key: Key) -> dict[str, int]:
    """A launch config in vLLM's form; Key: values of FIELDS and, on ROCm, of
    matrix_instr_nonkdim, waves_per_eu and kpack."""
    names = (*FIELDS, "matrix_instr_nonkdim", "waves_per_eu", "kpack")
    return dict(zip(names, key, strict=False))


def as_key(config: dict[str, int]) -> Key:
    key = tuple(config[f] for f in FIELDS)
    if "kpack" in config:
        extra = ("matrix_instr_nonkdim", "waves_per_eu", "kpack")
        key += tuple(config[f] for f in extra)
    return key


@dataclass(frozen=True)
class Shape:
    """One rank's share of the layer: E of `experts` experts, each N wide."""

    E: int = EXPERTS
    N: int = WIDTH
    dtype: str = "int8"
    experts: int = EXPERTS
    hidden: int = HIDDEN
    top_k: int = TOP_K

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """dtype:E:N, of Step-3.5-Flash, or dtype:E:N:experts:hidden:top_k."""
        dtype, *numbers = text.split(":")
        own, width, *model = map(int, numbers)
        return cls(own, width, dtype, *model)

    @property
    def load(self) -> float:
        """Rows that an expert gets of each token, on average."""
        return self.top_k / self.experts

    def distance(self, other: "Shape") -> float:
        """How far apart two shapes are: logarithms of their sizes' ratios."""
        sizes = zip((self.N, self.hidden, self.load), (other.N, other.hidden, other.load), strict=True)
        return sum(abs(math.log(a / b)) for a, b in sizes) + abs(math.log(self.E / other.E)) / 2

    def __str__(self) -> str:
        model = "" if self.hidden == HIDDEN else f" K={self.hidden}"
        return f"{self.dtype} E={self.E} N={self.N}{model}"


def space(dtype: str, target: str) -> list[Key]:
    """Candidates with GROUP_SIZE_M = 1 for `dtype` (int8, fp8, bf16) on `target`
    (sm_90, gfx942, gfx950): those whose tiles fit shared memory and registers and
    keep enough bytes in flight."""
    size = 2 if dtype == "bf16" else 1
    amd = target.startswith("gfx")
    shared = {"gfx942": 64, "gfx950": 160}.get(target, 227) * 1024
    keys: list[Key] = []
    for m, n, k_bytes, warps, stages in itertools.product(
        (16, 32, 64, 128, 256),
        (32, 64, 128, 256),
        (64, 128, 256, 512),
        (4, 8),
        (1, 2) if amd else (2, 3, 4, 5),
    ):
        k = k_bytes // size
        tile = (m + n) * k_bytes
        # AMD's pipeline keeps one stage in registers.
        used = tile * max(1, stages - 1) if amd else tile * stages
        threads = warps * (64 if amd else 32)
        per_thread = m * n / threads
        if used > shared or per_thread > 128 or per_thread < 2:
            continue
        if n == 32 and m > 32 or m == 256 and n > 128:
            continue
        if warps == 8 and m * n < 64 * 64:
            continue
        if not amd and used < (48 if m <= 64 else 40) * 1024:
            continue
        key = (m, n, k, 1, warps, stages)
        if not amd:
            keys.append(key)
            continue
        for nonk in (16, 32):
            # kpack 2 is gone on gfx950: its loads are wide without.
            if m % nonk == 0 and n % nonk == 0 and not (m >= 128 and nonk == 16):
                keys.append((*key, nonk, 0, 2 if target == "gfx942" else 1))
    return keys


def grouped(key: Key) -> list[Key]:
    return [(*key[:3], group, *key[4:]) for group in (8, 32)]


def fits(key: Key, shape: Shape, tokens: int) -> bool:
    """Whether a candidate's BLOCK_SIZE_M is worth a try for `tokens` tokens."""
    each = tokens * shape.top_k / shape.experts
    return key[0] <= max(16, 20 * each) and key[0] >= min(64, each / 3)


def sources(shape: Shape, tokens: int) -> list[tuple[bool, int, bool]]:
    """(naive assignment, tokens modulo what Triton specializes on, second product)
    of the kernels that a call with `tokens` tokens launches."""
    naive = shape.experts == shape.E and tokens * shape.top_k * 4 <= shape.experts
    odd = tokens * shape.top_k % 16
    return [(naive, odd, down) for down in (False, True)]


class _NoDriver:
    """Stands for a GPU of `target`, to compile without one."""

    active: str | None = None

    def __init__(self, target: str) -> None:
        import torch
        from triton.backends.compiler import GPUTarget

        if target.startswith("gfx"):
            self.target = GPUTarget("hip", target, 64)
        else:
            self.target = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
        self.device = torch.device("cpu")

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self):
        return self.device


def compile_kernel(key: Key, dtype: str, target: str, source: tuple[bool, int, bool]):
    """fused_moe_kernel compiled ahead of time for `target`, into Triton's cache,
    where a launch with the same config finds it. Call it in a process that has no
    CUDA context: Triton's driver is replaced. What Triton raises passes."""
    import torch
    import triton.language as tl
    from triton.runtime import driver
    from vllm.model_executor.layers.fused_moe import fused_moe

    if _NoDriver.active != target:
        driver.set_active(_NoDriver(target))
        _NoDriver.active = target
    naive, odd, down = source
    quantized = dtype != "bf16"
    kinds = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}
    operand = kinds[dtype]
    if dtype == "fp8" and target == "gfx942":
        operand = torch.float8_e4m3fnuz
    scale = torch.float32 if quantized else None
    n, k = (HIDDEN, WIDTH) if down else (2 * WIDTH, HIDDEN)
    config = as_config(key)
    kernel = fused_moe.fused_moe_kernel
    newer = {}
    if "SWAP_AB" in kernel.arg_names:  # of newer releases, for fp8
        swaps = dtype == "fp8" and fused_moe.enable_swap_ab(key[0], key[1])
        newer["SWAP_AB"] = swaps
    return kernel.warmup(
        *(operand, operand, torch.bfloat16, None, scale, scale, torch.float32),
        *(None if naive else torch.int32, torch.int32, torch.int32),
        *(n, k, 16 * key[0], 512 + odd),
        *(k, 1, n * k, 1, k, n, 1),
        *((1, 1, n, 1, 1) if quantized else (0, 0, 0, 0, 0)),
        *(0, 0, 0, 0),
        naive_block_assignment=naive,
        SPLIT_K=1,
        MUL_ROUTED_WEIGHT=down,
        top_k=1 if down else TOP_K,
        compute_type=tl.bfloat16,
        use_fp8_w8a8=dtype == "fp8",
        use_int8_w8a8=dtype == "int8",
        use_int8_w8a16=False,
        per_channel_quant=quantized,
        HAS_BIAS=False,
        grid=(1,),
        **newer,
        **config,
    )


def _compile_one(job) -> tuple[Key, str | None]:
    key, dtype, target, source = job
    try:
        compile_kernel(key, dtype, target, source)
        return key, None
    except Exception as error:
        return key, f"{type(error).__name__}: {error}"


class Compiler:
    """Compiles candidates in parallel. Make it before this process first touches
    the GPU: its workers are forks."""

    def __init__(self, target: str, workers: int | None = None) -> None:
        import vllm.model_executor.layers.fused_moe.fused_moe  # noqa: F401

        self.target = target
        self.jobs: set[tuple] = set()
        self.failed: dict[Key, str] = {}
        context = multiprocessing.get_context("fork")
        self.pool = context.Pool(workers or os.cpu_count())

    def __call__(self, keys: list[Key], shape: Shape, tokens: int) -> list[Key]:
        """Those of `keys` whose kernels for that call compile."""
        jobs = [
            job
            for key in keys
            for source in sources(shape, tokens)
            if (job := (key, shape.dtype, self.target, source)) not in self.jobs
        ]
        for key, error in self.pool.imap_unordered(_compile_one, jobs, chunksize=1):
            if error:
                self.failed[key] = error
        self.jobs.update(jobs)
        return [key for key in keys if key not in self.failed]


def routing(shape: Shape, tokens: int, skew: float, generator):
    """top_k distinct experts of all `shape.experts` a token, [tokens, top_k] int32,
    and weights that sum to 1, float32; `skew` is the sigma of the experts'
    log-popularity, 0 for uniform. Drawn as Gumbel top-k."""
    import torch

    def draw(*size):
        return torch.rand(size, generator=generator, device="cuda")

    popularity = torch.randn(shape.experts, generator=generator, device="cuda") * skew
    scores = popularity - (-draw(tokens, shape.experts).log()).log()
    ids = scores.topk(shape.top_k).indices
    weights = draw(tokens, shape.top_k) + 0.1
    return weights / weights.sum(-1, keepdim=True), ids.int()


def _bytes_of(tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Layer:
    """Random weights of one rank's experts on the GPU and vLLM's layer over them."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        import torch
        from vllm.model_executor.layers.fused_moe.config import (
            FUSED_MOE_UNQUANTIZED_CONFIG,
            fp8_w8a8_moe_quant_config,
            int8_w8a8_moe_quant_config,
        )
        from vllm.platforms import current_platform

        self.shape = shape
        self.generator = torch.Generator(device="cuda").manual_seed(seed)
        E, N, H = shape.E, shape.N, shape.hidden

        def rand(*size):
            return torch.randn(size, generator=self.generator, device="cuda")

        # Normal weights, as trained ones nearly are, and for both 8-bit dtypes the same ones.
        kinds = {"int8": torch.int8, "fp8": current_platform.fp8_dtype(), "bf16": torch.bfloat16}
        dtype = kinds[shape.dtype]
        largest = {"int8": 127.0, "fp8": torch.finfo(kinds["fp8"]).max}.get(shape.dtype)

        def weight(rows: int, columns: int):
            w = torch.empty(E, rows, columns, dtype=dtype, device="cuda")
            scales = torch.ones(E, rows, 1, device="cuda")
            for expert, scale in zip(w, scales, strict=True):
                value = rand(rows, columns) * columns**-0.5
                if largest:
                    torch.div(value.abs().amax(-1, keepdim=True), largest, out=scale)
                    value /= scale
                expert.copy_(value.round_() if shape.dtype == "int8" else value)
            return w, scales

        self.w1, s1 = weight(2 * N, H)
        self.w2, s2 = weight(H, N)
        self.scales = (s1, s2)
        if shape.dtype == "int8":
            self.quant = int8_w8a8_moe_quant_config(s1, s2, a1_scale=None, a2_scale=None, per_act_token_quant=True)
        elif shape.dtype == "fp8":
            self.quant = fp8_w8a8_moe_quant_config(s1, s2, per_act_token_quant=True, per_out_ch_quant=True)
        else:
            self.quant = FUSED_MOE_UNQUANTIZED_CONFIG
        self.expert_map = None
        if shape.experts != E:
            self.expert_map = torch.full((shape.experts,), -1, dtype=torch.int32)
            self.expert_map[:E] = torch.arange(E, dtype=torch.int32)
            self.expert_map = self.expert_map.cuda()

    def inputs(self, tokens: int, skew: float):
        """Fresh activations [tokens, hidden] bfloat16 and routing."""
        import torch

        size = (tokens, self.shape.hidden)
        x = torch.randn(size, generator=self.generator, device="cuda")
        return x.bfloat16(), *routing(self.shape, tokens, skew, self.generator)

    def mixed_inputs(self, tokens: int) -> list:
        """`inputs` for one graph: half with uniform routing, half with skewed."""
        pairs = max(1, calls_of(tokens) // 2)
        return [self.inputs(tokens, skew) for _ in range(pairs) for skew in (0.0, SKEW)]

    def default(self, tokens: int) -> dict[str, int]:
        """What vLLM takes without a config file."""
        from vllm.model_executor.layers.fused_moe.fused_moe import get_default_config

        s = self.shape
        dtype = "fp8_w8a8" if s.dtype == "fp8" else None
        return get_default_config(tokens, s.E, s.N, s.hidden, s.top_k, dtype, None)

    def __call__(self, config: dict[str, int], inputs):
        from vllm.model_executor.layers.fused_moe import override_config
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

        x, weights, ids = inputs
        with override_config(config):
            return fused_experts(
                x,
                self.w1,
                self.w2,
                weights,
                ids,
                global_num_experts=self.shape.experts,
                expert_map=self.expert_map,
                quant_config=self.quant,
            )

    def reference(self, inputs, tokens: int):
        """float64 W8A8 of the first `tokens` tokens of int8 experts (per-channel
        weights, per-token activations), with what lies between the two products
        stored in bfloat16, as the kernels store it: [tokens, hidden]."""
        import torch
        import torch.nn.functional as F

        def quantized(x):
            scale = x.abs().amax(-1, keepdim=True) / 127
            return (x / scale).round() * scale

        x, weights, ids = (t[:tokens] for t in inputs)
        out = torch.zeros(x.shape, dtype=torch.float64, device="cuda")
        for t, k in itertools.product(range(len(x)), range(self.shape.top_k)):
            expert = int(ids[t, k])
            if expert >= self.shape.E:
                continue
            w1, w2 = (
                w[expert].double() * s[expert].double() for w, s in zip((self.w1, self.w2), self.scales, strict=True)
            )
            gate, up = (w1 @ quantized(x[t].double())).bfloat16().double().chunk(2)
            h = (F.silu(gate) * up).bfloat16().double()
            out[t] += weights[t, k].double() * (w2 @ quantized(h))
        return out

    def work(self, inputs) -> tuple[int, int]:
        """Bytes a call has to move and operations it has to do: weights and scales
        of the experts touched, inputs and outputs once; two a product."""
        x, weights, ids = inputs
        E, N, H = self.shape.E, self.shape.N, self.shape.hidden
        here = ids[ids < E]
        one = (_bytes_of(self.w1) + _bytes_of(self.w2)) // E
        if self.shape.dtype != "bf16":
            one += (2 * N + H) * 4
        moved = len(here.unique()) * one + 2 * _bytes_of(x)
        moved += _bytes_of(weights) + _bytes_of(ids)
        return moved, 2 * here.numel() * 3 * N * H


class Graph:
    """A CUDA graph of `call` over each of `inputs`, to time."""

    pool = None
    stream = None

    def __init__(self, call, inputs: list) -> None:
        import torch

        # torch.cuda.graph collects garbage and empties the cache at each capture.
        if Graph.stream is None:
            Graph.stream = torch.cuda.Stream()
            Graph.pool = torch.cuda.graph_pool_handle()
            Graph.keeper = torch.cuda.CUDAGraph()  # a pool goes with its last graph
            with torch.cuda.stream(Graph.stream):
                Graph.keeper.capture_begin(pool=Graph.pool)
                Graph.kept = torch.zeros(1, device="cuda")
                Graph.keeper.capture_end()
        self.calls = len(inputs)
        call(inputs[0])  # compiles what is not
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(Graph.stream):
            self.graph.capture_begin(pool=Graph.pool)
            try:
                for one in inputs:
                    call(one)
            finally:
                self.graph.capture_end()
        torch.cuda.synchronize()

    def times(self, replays: int) -> list[float]:
        """Microseconds a call, of each replay."""
        import torch

        marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        with torch.cuda.stream(Graph.stream):
            marks[0].record()
            for mark in marks[1:]:
                self.graph.replay()
                mark.record()
        torch.cuda.synchronize()
        pairs = itertools.pairwise(marks)
        return [a.elapsed_time(b) * 1000 / self.calls for a, b in pairs]


def time_together(graphs: dict, rounds: int, replays: int = 3, seconds: float = 0.0) -> dict:
    """Median microseconds a call of each graph, their replays interleaved. The first
    replay of a turn warms up. seconds: of replays before those of each turn, so that the
    clock is what the GPU sustains for this graph."""
    times: dict = {name: [] for name in graphs}
    order = list(graphs)
    for turn in range(rounds):
        for name in order if turn % 2 else reversed(order):
            graph = graphs[name]
            if seconds:
                graph.times(max(1, int(1e6 * seconds / graph.calls / min(graph.times(2)))))
            times[name] += graph.times(replays + 1)[1:]
    return {name: statistics.median(t) for name, t in times.items()}


def calls_of(tokens: int) -> int:
    """Inputs of each routing in one graph: as many as keep weights out of the L2."""
    return 8 if tokens <= 8 else 3 if tokens <= 64 else 2 if tokens <= 1024 else 1


def read_cells(files: list[Path]) -> dict:
    """What searches stored: (shape, tokens) to the cell."""
    cells: dict = {}
    for file in files:
        for line in file.read_text().splitlines() if file.exists() else ():
            cell = json.loads(line)
            cells[cell["shape"], cell["tokens"]] = cell
    return cells
