# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The native INT8 experts and router (csrc/cpu/int8_moe) against float64, on every
instruction set that this processor has.

Run `pytest tests/quantization/quark/test_cpu_native.py`.
"""

import os
import subprocess
import sys

import pytest
import torch

from vllm.platforms import current_platform

from .utils import (
    assert_close,
    emulate_moe,
    random_input,
    random_weight,
)

if not current_platform.is_cpu():
    pytest.skip("tests of the CPU platform", allow_module_level=True)
from vllm import envs
from vllm.model_executor.layers.fused_moe import cpu_int8_moe, cpu_int8_native
from vllm.model_executor.layers.fused_moe.cpu_int8_native import (
    native,
    route_on_cpu,
)

operators = native()
needs_operators = pytest.mark.skipif(
    operators is None, reason="csrc/cpu/int8_moe is not built here"
)
ISAS = operators.isas() if operators else ["none"]
ACTIVATIONS = operators.activations() if operators else []
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# E, I, K, k; multiples of nothing, one of each, a block, more than a block
SHAPES = [(3, 5, 3, 2), (1, 1, 1, 1), (5, 37, 71, 3), (2, 16, 64, 2), (4, 80, 160, 2)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=range(len(ISAS)), ids=ISAS)
def isa(request):
    return request.param


class Experts:
    """Random experts, plain and packed."""

    def __init__(self, experts: int, width: int, hidden: int, activation="silu"):
        self.activation = activation
        self.plain = [
            *random_weight(experts, 2 * width, hidden),
            *random_weight(experts, hidden, width),
        ]
        self.pack()

    def pack(self, a1=None, a2=None):
        w13, s13, w2, s2 = self.plain
        kind = ACTIVATIONS.index(self.activation)
        self.to_pack = w13, s13, None, w2, s2, None, kind, 7.0, a1, a2
        self.packed = operators.pack(*self.to_pack)
        self.static = a1, a2

    def __call__(self, x, weights, ids, isa=-1, expert_map=None):
        return operators.experts(x, weights, ids, self.packed, expert_map, False, isa)

    def emulate(self, x, weights, ids):
        return emulate_moe(x, *self.plain, weights, ids, self.activation, *self.static)


def routing(tokens: int, experts: int, top_k: int):
    weights, ids = torch.rand(tokens, experts).topk(top_k)
    return weights, ids.int()


@needs_operators
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 13, 47])
def test_any_shape(isa, shape, tokens):
    *sizes, top_k = shape
    experts = Experts(*sizes)
    x = random_input(tokens, sizes[2]).float()
    weights, ids = routing(tokens, sizes[0], top_k)
    assert_close(experts(x, weights, ids, isa), experts.emulate(x, weights, ids))


@needs_operators
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "swigluoai", "swiglustep"])
def test_activations_and_dtypes(isa, activation, dtype):
    experts = Experts(4, 48, 96, activation)
    x = random_input(21, 96).to(dtype)
    weights, ids = routing(21, 4, 2)
    out = experts(x, weights, ids, isa)
    assert out.dtype == dtype
    assert_close(out, experts.emulate(x, weights, ids))


@needs_operators
def test_gelu_tanh(isa):
    experts = Experts(4, 48, 96, "gelu_tanh")
    x = random_input(21, 96).float()
    weights, ids = routing(21, 4, 2)
    out = experts(x, weights, ids, isa)
    experts.activation = "gelu"
    assert_close(out, experts.emulate(x, weights, ids))


@needs_operators
@pytest.mark.parametrize("activation", ["silu", "gelu", "swigluoai", "swiglustep"])
def test_huge_gates(isa, activation):
    """Where the exponential of a gate is beyond float32."""
    experts = Experts(4, 48, 96, activation)
    gates = slice(0, 96, 2) if activation == "swigluoai" else slice(0, 48)
    experts.plain[1][:, gates] *= 1e25
    experts.pack()
    x = random_input(9, 96).float()
    weights, ids = routing(9, 4, 2)
    assert_close(experts(x, weights, ids, isa), experts.emulate(x, weights, ids))


@needs_operators
@pytest.mark.parametrize("tokens", [12, 13, 16, 28, 29, 60])
def test_rows_that_take_turns_at_a_long_weight(isa, tokens):
    experts = Experts(1, 300, 700)
    x = random_input(tokens, 700).float()
    weights, ids = torch.rand(tokens, 1), torch.zeros(tokens, 1, dtype=torch.int32)
    assert_close(experts(x, weights, ids, isa), experts.emulate(x, weights, ids))


@needs_operators
def test_extreme_weights_and_activations(isa):
    """-128 in weights and static activations, and a K that fills the sums."""
    experts = Experts(1, 32, 8192)
    experts.plain[0].fill_(-128)
    experts.pack(torch.tensor(0.5), torch.tensor(1e3))
    x = torch.full((3, 8192), -1e6)
    x[1] = 1e6
    ids, weights = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    assert_close(experts(x, weights, ids, isa), experts.emulate(x, weights, ids))


@needs_operators
@pytest.mark.parametrize("tokens", [5, 700])
def test_all_tokens_on_one_expert(isa, tokens):
    """More rows than the operator takes at once."""
    experts = Experts(4, 32, 64)
    x = random_input(tokens, 64).float()
    weights, ids = torch.rand(tokens, 1), torch.full((tokens, 1), 2, dtype=torch.int32)
    assert_close(experts(x, weights, ids, isa), experts.emulate(x, weights, ids))


@needs_operators
def test_more_tokens_than_are_taken_at_once():
    """Tokens are taken in chunks, here of 3500, and their rows in pieces."""
    experts = Experts(2, 8192, 8)
    x = random_input(7000, 8).float()
    weights, ids = torch.rand(7000, 2), torch.tensor([0, 1], dtype=torch.int32)
    ids = ids.expand(7000, 2).contiguous()
    ids[:, 1] = torch.randint(-1, 2, (7000,))
    out = experts(x, weights, ids)
    for sample in torch.tensor([[0, 366, 3499], [3500, 3501, 6999]]):
        reference = experts.emulate(x[sample], weights[sample], ids[sample])
        assert_close(out[sample], reference)
    alone = experts(x[3499:3502], weights[3499:3502], ids[3499:3502])
    assert torch.equal(out[3499:3502], alone)


@needs_operators
@pytest.mark.parametrize("width", [4, 2048])
def test_more_rows_than_are_in_memory_at_once(isa, width):
    """Rows between the products are taken in pieces, which part experts."""
    hidden = 8192 // width
    experts = Experts(5, width, hidden)
    tokens = 1200 if width > 4 else 9000
    x = random_input(tokens, hidden).float()
    weights, ids = routing(tokens, 5, 3)
    ids[ids == 3] = -1
    out = experts(x, weights, ids, isa)
    sample = torch.linspace(0, tokens - 1, 9).long()
    reference = experts.emulate(x[sample], weights[sample], ids[sample])
    assert_close(out[sample], reference)
    assert torch.equal(
        out[sample], experts(x[sample], weights[sample], ids[sample], isa)
    )


@needs_operators
def test_no_tokens(isa):
    experts = Experts(4, 32, 64)
    ids = torch.empty(0, 2, dtype=torch.int32)
    assert experts(torch.empty(0, 64), ids.float(), ids, isa).shape == (0, 64)


@needs_operators
@pytest.mark.parametrize("tokens", [1, 65])
def test_same_for_any_thread_count(isa, tokens):
    experts = Experts(6, 96, 160)
    x = random_input(tokens, 160)
    weights, ids = routing(tokens, 6, 3)
    threads_before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2, 3, 8, 64):
            torch.set_num_threads(threads)
            outs.append(experts(x, weights, ids, isa))
    finally:
        torch.set_num_threads(threads_before)
    assert all(torch.equal(outs[0], out) for out in outs[1:])


@needs_operators
def test_a_tokens_result_does_not_depend_on_the_others(isa):
    experts = Experts(6, 96, 160)
    x = random_input(65, 160)
    weights, ids = routing(65, 6, 3)
    out = experts(x, weights, ids, isa)
    for t in (0, 31, 64):
        alone = experts(x[t : t + 1], weights[t : t + 1], ids[t : t + 1], isa)
        assert torch.equal(alone[0], out[t])


@needs_operators
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_token(isa, bad, dtype):
    experts = Experts(4, 32, 64)
    x = random_input(9, 64).to(dtype)
    weights, ids = routing(9, 4, 2)
    clean = experts(x, weights, ids, isa)
    x[4, 63] = bad
    out = experts(x, weights, ids, isa)
    assert out[4].isnan().all()
    rest = torch.arange(9) != 4
    assert torch.equal(out[rest], clean[rest])


@needs_operators
def test_nan_with_static_scales(isa):
    experts = Experts(4, 32, 64)
    x = random_input(9, 64).float()
    x[4, 0] = float("nan")
    x[5, 0] = float("inf")
    weights, ids = routing(9, 4, 2)
    experts.pack(torch.tensor(0.05), torch.tensor(0.5))
    out = experts(x, weights, ids, isa)
    assert out[4].isnan().all()
    rest = torch.arange(9) != 4
    reference = experts.emulate(x[rest], weights[rest], ids[rest])
    assert_close(out[rest], reference)


@needs_operators
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bad_ids_are_refused(dtype):
    experts = Experts(4, 32, 64)
    x, ids = random_input(3, 64), torch.full((3, 1), 4, dtype=dtype)
    with pytest.raises(ValueError, match="expert id 4 out of range: 4 experts"):
        experts(x, ids.float(), ids)
    mapped = torch.full((8,), 9, dtype=torch.int32)
    with pytest.raises(ValueError, match="local expert 9 out of range: 4"):
        experts(x, ids.float(), ids, expert_map=mapped)
    assert not experts(x, ids.float(), ids - 5).any(), "negative ids are no expert"


@needs_operators
def test_misfits_are_refused():
    experts = Experts(4, 32, 64)
    x, (weights, ids) = random_input(3, 64), routing(3, 4, 2)
    with pytest.raises(ValueError, match="K as wide as the experts"):
        experts(x[:, :63], weights, ids)
    with pytest.raises(ValueError, match="topk_weights has to be"):
        experts(x, weights[:2], ids)
    with pytest.raises(ValueError, match="x has to be float32, bfloat16 or float16"):
        experts(x.double(), weights, ids)
    with pytest.raises(ValueError, match="k positive"):
        experts(x, weights[:, :0], ids[:, :0])
    packed = experts.packed
    misfits = [packed[:-64], packed[:0], packed.view(1, -1), packed.float()]
    # in the header: the name, the activation, and whether scales are static
    for offset, value in [(0, 0), (32, 5), (33, -1), (48, 2), (49, -1)]:
        misfits.append(packed.clone())
        misfits[-1][offset] = value
    for experts.packed in misfits:
        with pytest.raises(ValueError, match="packed has to come from pack"):
            experts(x, weights, ids)


@needs_operators
@pytest.mark.parametrize(
    "argument, value, match",
    [
        (0, torch.zeros(4, 63, 64, dtype=torch.int8), "w13 has to be"),
        (0, torch.zeros(4, 64, 64), "w13 has to be"),
        (1, torch.ones(4, 64, 1), "w13_scale has to be"),
        (3, torch.zeros(4, 64, dtype=torch.int8), "w2 has to be"),
        (4, torch.ones(4, 63), "w2_scale has to be"),
        (5, torch.ones(3, 64), "w2_bias has to be"),
        (6, -1, "none of activations"),
        (6, len(ACTIVATIONS), "none of activations"),
        (8, torch.ones(2), "a1_scale has to be"),
        (3, torch.zeros(1, 65537, 2, dtype=torch.int8), "between 1 and 65536"),
        (3, torch.zeros(4, 64, 0, dtype=torch.int8), "between 1 and 65536"),
    ],
)
def test_weights_that_do_not_fit_are_refused(argument, value, match):
    args = list(Experts(4, 32, 64).to_pack)
    args[argument] = value
    with pytest.raises(ValueError, match=match):
        operators.pack(*args)


@needs_operators
def test_inputs_that_are_not_contiguous(isa):
    experts = Experts(4, 32, 64)
    wide = random_input(9, 128)
    weights, ids = routing(9, 4, 2)
    for x in (wide[:, 64:], wide[:, ::2], wide[:, :64].t().contiguous().t()):
        expected = experts(x.contiguous(), weights, ids, isa)
        assert torch.equal(experts(x, weights, ids, isa), expected)
    strided = weights.t().contiguous().t(), ids.t().contiguous().t()
    assert torch.equal(experts(x, *strided, isa), expected)


@needs_operators
def test_contracts():
    experts = Experts(4, 32, 64)
    x, (weights, ids) = random_input(5, 64), routing(5, 4, 2)
    args = (x, weights, ids, experts.packed)
    torch.library.opcheck(torch.ops._int8_moe_C.experts.default, args)
    torch.library.opcheck(torch.ops._int8_moe_C.pack.default, experts.to_pack)
    unaligned = Experts(3, 5, 37).to_pack
    torch.library.opcheck(torch.ops._int8_moe_C.pack.default, unaligned)
    args = (torch.randn(5, 16), torch.rand(16), 4, False, True, 3.0)
    torch.library.opcheck(torch.ops._int8_moe_C.route.default, args)


@needs_operators
def test_compiles():
    experts = Experts(4, 32, 64)
    x = random_input(5, 64)
    bias = torch.rand(4)

    def layer(x, logits):
        weights, ids = route_on_cpu(logits, bias, 2, True, "sigmoid", None, 3.0)
        return experts(x * 2, weights, ids) + 1

    logits = torch.randn(5, 4)
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    for tokens in (5, 3):
        out = compiled(x[:tokens], logits[:tokens])
        assert torch.equal(out, layer(x[:tokens], logits[:tokens]))


def emulate_router(logits, bias, top_k, softmax, renormalize, scale):
    scores = logits.double().softmax(-1) if softmax else logits.double().sigmoid()
    ids = (scores + (0 if bias is None else bias.double())).topk(top_k).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * scale, ids


@needs_operators
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    "tokens, experts, top_k", [(1, 288, 8), (70, 17, 3), (3, 1, 1)]
)
@pytest.mark.parametrize("biased", [False, True])
def test_router(isa, softmax, renormalize, tokens, experts, top_k, biased):
    logits = torch.randn(tokens, experts) * 3
    bias = torch.rand(experts) if biased else None
    weights, ids = operators.route(logits, bias, top_k, softmax, renormalize, 3.0, isa)
    reference, reference_ids = emulate_router(
        logits, bias, top_k, softmax, renormalize, 3.0
    )
    assert torch.equal(ids.long(), reference_ids)
    torch.testing.assert_close(weights.double(), reference, rtol=1e-5, atol=1e-9)


@needs_operators
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_router_dtypes_and_ties(isa, dtype):
    """Scores are float32 whatever the logits' dtype; of equals the lower id."""
    logits = torch.zeros(2, 12, dtype=dtype)
    logits[1, 7] = 1
    weights, ids = operators.route(logits, None, 3, False, False, 1.0, isa)
    assert ids.tolist() == [[0, 1, 2], [7, 0, 1]]
    expected = torch.tensor([[0.5] * 3, [torch.tensor(1.0).sigmoid(), 0.5, 0.5]])
    torch.testing.assert_close(weights, expected)


@needs_operators
def test_router_extremes(isa):
    logits = torch.tensor([[-1e4, 1e4, 0.0, -200.0], [float("nan"), 1.0, 2.0, 3.0]])
    weights, ids = operators.route(logits, None, 2, False, True, 1.0, isa)
    assert ids[0].tolist() == [1, 2] and ids[1, 0] == 0
    torch.testing.assert_close(weights[0], torch.tensor([2 / 3, 1 / 3]))
    assert weights[1].isnan().all()
    with pytest.raises(ValueError, match="top_k has to be between"):
        operators.route(logits, None, 5, False, True, 1.0, isa)
    weights, ids = operators.route(logits[:0], None, 2, False, True, 1.0, isa)
    assert weights.shape == ids.shape == (0, 2)


def test_route_on_cpu_leaves_other_scores(monkeypatch):
    logits = torch.randn(3, 8)
    args = (logits, None, 2, True)
    assert route_on_cpu(*args, "sqrtsoftplus", None) is None
    if operators is not None:
        weights, ids = route_on_cpu(*args, "sigmoid", torch.int64)
        assert ids.dtype == torch.int64 and weights.dtype == torch.float32
    monkeypatch.setattr(cpu_int8_native, "native", lambda: None)
    assert route_on_cpu(*args, "sigmoid", None) is None
    assert not cpu_int8_native.has_native()


@pytest.mark.parametrize("name", ["VLLM_INT8_MOE_LIBRARY", "VLLM_INT8_MOE_ISA"])
def test_its_variables_are_vllms(name):
    assert envs.environment_variables[name]


FIND_EXPERTS = """
from vllm.model_executor.layers.fused_moe.cpu_int8_moe import native_experts
operators = [native_experts() for _ in range(3)]
assert all(operator is None for operator in operators)
"""


def run_python(
    code: str, library: str | None = None, *args: str, **variables: str
) -> str:
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "WARNING", **variables}
    if library is not None:
        environment["VLLM_INT8_MOE_LIBRARY"] = library
        environment.pop("LD_PRELOAD", None)
    process = subprocess.run(
        [sys.executable, "-c", code, *args],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout + process.stderr


@pytest.mark.parametrize("library", ["", "/no/such/library.so"])
def test_without_the_operator_experts_say_so_once(library):
    assert (
        run_python(FIND_EXPERTS, library).count("expert by expert, which is slower")
        == 1
    )


# Without vLLM, which takes long to import.
LIST_ISAS = """
import sys, torch
torch.ops.load_library(sys.argv[1])
try:
    print("isas:", *torch.ops._int8_moe_C.isas())
except ValueError as error:
    print(error)
"""


def list_capped_isas(cap: str) -> str:
    library = str(cpu_int8_native._library())
    return run_python(LIST_ISAS, None, library, VLLM_INT8_MOE_ISA=cap)


@needs_operators
def test_the_cap_on_instruction_sets(isa):
    assert f"isas: {' '.join(ISAS[isa:])}\n" in list_capped_isas(ISAS[isa])


@needs_operators
def test_a_cap_that_is_no_instruction_set():
    output = list_capped_isas("sse9")
    assert "VLLM_INT8_MOE_ISA=sse9 is none of " in output and "portable" in output


@needs_operators
@pytest.mark.parametrize("saturates", [False, True])
def test_onednn_stays_where_it_is_faster(isa, saturates, monkeypatch):
    """And right: for experts; the router is faster anywhere."""

    class Capped:
        isas = staticmethod(lambda: ISAS[isa:])

    monkeypatch.setattr(cpu_int8_moe, "find_native", lambda: (Capped, "library"))
    monkeypatch.setattr(cpu_int8_moe, "onednn_saturates", lambda: saturates)
    behind = ISAS[isa] in cpu_int8_moe.BEHIND_ONEDNN and not saturates
    has_onednn = hasattr(torch.ops._C, "onednn_scaled_mm")
    assert (cpu_int8_moe.native_experts() is None) == (behind and has_onednn)
    logits = torch.zeros(3, 8)
    assert route_on_cpu(logits, None, 2, True, "sigmoid", None) is not None


# [4096, 4096] through experts of width 1280, 8 a token; MiB of memory.
MEASURE_MEMORY = """
import re, sys, torch
torch.ops.load_library(sys.argv[1])

def read_memory(field):
    line = re.search(rf"{field}:\\s+(\\d+) kB", open("/proc/self/status").read())
    return int(line[1]) / 1024

operators = torch.ops._int8_moe_C
packed = operators.pack(
    torch.ones(2, 2560, 4096, dtype=torch.int8), torch.ones(2, 2560), None,
    torch.ones(2, 4096, 1280, dtype=torch.int8), torch.ones(2, 4096), None, 0, 7.0)
weights = torch.rand(4096, 8)
ids = torch.randint(0, 2, (4096, 8), dtype=torch.int32)
x = torch.zeros(4096, 4096, dtype=torch.bfloat16)
operators.experts(x[:1], weights[:1], ids[:1], packed)
open("/proc/self/clear_refs", "w").write("5")
before = read_memory("VmRSS")
out = operators.experts(x, weights, ids, packed)
peak, afterwards = read_memory("VmHWM"), read_memory("VmRSS")
print("grown", peak - before - 32, afterwards - before - 32)
"""


@needs_operators
@pytest.mark.skipif(
    sys.platform != "linux" or "LD_PRELOAD" in os.environ,
    reason="reads /proc; sanitizers keep what is freed",
)
def test_scratch_is_bounded_and_given_back():
    """Beside the output of 32 MiB: 128 at most, and 64 afterwards."""
    library = str(cpu_int8_native._library())
    output = run_python(MEASURE_MEMORY, None, library)
    peak, retained = map(float, output.split("grown")[1].split()[:2])
    assert peak < 130 and retained < 66


ROUTE = """
import torch
from vllm.model_executor.layers.fused_moe.cpu_int8_native import route_on_cpu
assert route_on_cpu(torch.zeros(3, 8), None, 2, True, "sigmoid", None) is None
"""


@pytest.mark.parametrize("library", ["", "/no/such/library.so"])
def test_without_the_operator_routers_say_nothing(library):
    """Models without INT8 experts are routed so too."""
    output = run_python(ROUTE, library)
    assert "INT8" not in output and "VLLM_INT8_MOE_LIBRARY" not in output


@pytest.mark.skipif(
    ISAS[0] in ("none", *cpu_int8_moe.BEHIND_ONEDNN), reason="experts run on oneDNN"
)
def test_its_library_and_instruction_set_are_logged(monkeypatch):
    messages = []
    monkeypatch.setattr(
        cpu_int8_moe.logger,
        "info_once",
        lambda text, *args: messages.append(text % args),
    )
    assert cpu_int8_moe.native_experts() is operators
    library = cpu_int8_native._library()
    assert messages == [f"INT8 experts on CPU run on {library}, {ISAS[0]}"]
