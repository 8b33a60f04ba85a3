# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""INT8 checkpoints of AMD Quark that do not fill their layers are refused, with
the name of the layer, shard or expert; shards of all kinds are filled."""

import importlib
import importlib.util
from types import SimpleNamespace

import pytest
import torch

from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from . import checkpoints as ck
from .utils import FusedShards, shard

K = ck.K


def has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


needs_files = pytest.mark.skipif(
    not has_module(f"{ck.INT8}.checkpoint"), reason="needs patch 0008"
)


@pytest.fixture(autouse=True)
def environment(layer_environment):
    return layer_environment


def make_case(kind: str, activation: str = "token_sym", weight: str = "per_channel"):
    ck.needs_kernel(kind)
    generator = torch.Generator().manual_seed(0)
    case = ck.Case(kind, weight, activation)
    x = ck.inputs_for(case, 17, generator)
    return ck.draw_checkpoint(case, x, generator), x, ck.routing(17, generator)


def find_name(checkpoint: ck.Checkpoint, ending: str) -> str:
    return next(n for n in checkpoint.tensors if n.endswith(ending))


# kind, tensor, what becomes of it, what the refusal names
BROKEN = [
    ("qkv", "k_proj.weight_scale", "drop", "shard k: weight_scale is not in"),
    ("qkv", "k_proj.weight", "drop", "shard k: weight is not in"),
    ("gate_up", "up_proj.weight_scale", "drop", "shard 1: weight_scale is not in"),
    ("row", "o_proj.weight_scale", "drop", "o_proj: weight_scale is not in"),
    (
        "moe_per_expert",
        "experts.3.up_proj.weight_scale",
        "drop",
        r"expert 3: up_proj .*not in",
    ),
    ("moe_per_expert", "experts.0.gate_proj.weight", "drop", r"expert 0: gate_proj"),
    ("moe_stacked", "down_proj.weight_scale", "drop", r"expert 0: down_proj"),
    ("plain", "weight_scale", float("nan"), "is nan"),
    ("plain", "weight_scale", float("inf"), "is inf"),
    ("plain", "weight_scale", -1.0, "is -1.0"),
    ("plain", "weight_scale", 0.0, "is 0.0, but its weight is not 0"),
    ("gate_up", "up_proj.weight_scale", float("nan"), "shard 1"),
    (
        "moe_per_expert",
        "5.down_proj.weight_scale",
        float("nan"),
        r"expert 5: down_proj",
    ),
    ("moe_stacked", "up_proj.weight_scale", 0.0, r"expert 0: up_proj"),
    ("plain", "weight", torch.bfloat16, "expected int8.*exclude"),
    ("moe_per_expert", "2.up_proj.weight", torch.bfloat16, "expert 2.*exclude"),
    ("plain", "weight_scale", torch.int32, "expected float32"),
    ("plain", "weight", "cut", r"expected int8 \[192, 128\]"),
    ("plain", "weight", "grow", r"expected int8 \[192, 128\]"),
    ("qkv", "v_proj.weight_scale", "cut", r"shard v: weight_scale.*expected \[64\]"),
    ("moe_per_expert", "1.gate_proj.weight_scale", "cut", r"expert 1.*expected \[64\]"),
    ("moe_per_expert", "1.gate_proj.weight", "cut", r"expert 1.*\[64, 128\]"),
]


@pytest.mark.parametrize("kind,ending,change,named", BROKEN)
def test_broken_tensors_are_refused_by_name(kind, ending, change, named):
    checkpoint, x, routes = make_case(kind)
    name = find_name(checkpoint, ending)
    tensor = checkpoint.tensors[name]
    if change == "drop":
        del checkpoint.tensors[name]
    elif change == "cut":
        checkpoint.tensors[name] = tensor[: len(tensor) // 2]
    elif change == "grow":
        checkpoint.tensors[name] = torch.cat([tensor, tensor])
    elif isinstance(change, torch.dtype):
        checkpoint.tensors[name] = tensor.to(change)
    else:
        tensor.view(-1)[7] = change
    with pytest.raises(ValueError, match=named) as refusal:
        ck.serve(checkpoint, x, routes, files=False)
    assert checkpoint.prefix.rpartition(".")[0] in str(refusal.value)


SHARDS = {
    "plain": "up_proj: weight_scale",
    "qkv": "qkv_proj: shard v: weight_scale",
    "gate_up": "gate_up_proj: shard 1: weight_scale",
    "moe_per_expert": r"experts: expert 7: down_proj \(w2\): weight_scale",
}


@pytest.mark.parametrize("kind", SHARDS)
def test_scales_that_no_tensor_fills_are_named(kind):
    """Without the look at the whole checkpoint, as for other loaders."""
    checkpoint, _, _ = make_case(kind)
    name = [n for n in checkpoint.tensors if n.endswith("weight_scale")][-1]
    del checkpoint.tensors[name]
    layer = ck.build_loaded(checkpoint)
    with pytest.raises(ValueError, match=SHARDS[kind]) as refusal:
        ck.finish(layer)
    assert "missing from `exclude`" in str(refusal.value)


@pytest.mark.parametrize("kind", ["plain", "moe_per_expert"])
def test_scales_filled_in_part_are_seen(kind):
    """Also where a model's own loader goes past the parameter's."""
    checkpoint, _, _ = make_case(kind)
    layer = ck.build_loaded(checkpoint)
    name = "weight_scale" if kind == "plain" else "w2_weight_scale"
    param = getattr(layer, name)
    fresh = getattr(ck.build(make_case(kind)[0]), name)
    param.data.view(-1)[-3:] = fresh.data.view(-1)[-3:]
    with pytest.raises(ValueError, match=f"{checkpoint.prefix}: .*was not loaded"):
        ck.finish(layer)


@pytest.mark.parametrize("kind", ck.LINEAR + ck.EXPERTS)
def test_weight_zero_points(kind):
    checkpoint, x, routes = make_case(kind)
    for name in [n for n in checkpoint.tensors if n.endswith("weight_scale")]:
        zero = torch.zeros_like(checkpoint.tensors[name], dtype=torch.int8)
        checkpoint.tensors[name.replace("scale", "zero_point")] = zero
    expected = ck.reference(checkpoint, x, routes)
    assert ck.is_right(ck.serve(checkpoint, x, routes), expected)
    zero.view(-1)[3] = 1
    with pytest.raises(ValueError, match="weight_zero_point is not 0"):
        ck.serve(checkpoint, x, routes)


@pytest.mark.parametrize("kind", ["plain", "moe_per_expert"])
def test_zero_scales_of_zero_channels(kind):
    checkpoint, x, routes = make_case(kind)
    for name in [n for n in checkpoint.tensors if n.endswith("weight_scale")]:
        checkpoint.tensors[name][5] = 0
        checkpoint.tensors[name.removesuffix("_scale")][5] = 0
    expected = ck.reference(checkpoint, x, routes)
    assert ck.is_right(ck.serve(checkpoint, x, routes), expected)


@pytest.mark.parametrize("kind", ck.LINEAR + ck.EXPERTS)
@pytest.mark.parametrize("form", ["[N, 1]", "[1, N]", "float16", "bfloat16"])
def test_forms_of_scales(kind, form):
    checkpoint, x, routes = make_case(kind)
    for name in [n for n in checkpoint.tensors if n.endswith("weight_scale")]:
        scale = checkpoint.tensors[name]
        axis = {"[N, 1]": -1, "[1, N]": -2}.get(form)
        if axis:
            scale = scale.unsqueeze(axis)
        else:
            scale = (scale * 100).to(getattr(torch, form))
        checkpoint.tensors[name] = scale
    expected = ck.reference(checkpoint, x, routes)
    assert ck.is_right(ck.serve(checkpoint, x, routes), expected)


@pytest.mark.parametrize("activation", ["static_sym", "static_asym"])
@pytest.mark.parametrize("kind, proj", [("qkv", "q"), ("qkv", "v"), ("gate_up", "up")])
def test_static_scales_that_differ_between_shards(kind, proj, activation):
    """Refused, whichever shard differs; the way out is served right."""
    checkpoint, x, routes = make_case(kind, activation)
    name = find_name(checkpoint, f"{proj}_proj.input_scale")
    checkpoint.tensors[name] = checkpoint.tensors[name] * 1.5
    with pytest.raises(ValueError, match="input_scale .*another shard.*is_dynamic"):
        ck.serve(checkpoint, x, routes)
    inputs = checkpoint.config["global_quant_config"]["input_tensors"]
    inputs.update(is_dynamic=True, qscheme="per_channel")
    out = ck.serve(checkpoint, x, routes)
    served = activation.replace("static", "token")
    assert ck.is_right(out, ck.reference(checkpoint, x, routes, served))


@pytest.mark.parametrize("activation", ["static_sym", "static_asym"])
@pytest.mark.parametrize("ending", ["input_scale", "q_proj.input_scale"])
def test_missing_static_scales(activation, ending):
    checkpoint, x, routes = make_case("qkv", activation)
    for name in [n for n in checkpoint.tensors if n.endswith(ending)]:
        del checkpoint.tensors[name]
    with pytest.raises(ValueError, match="shard q: input_scale is not in"):
        ck.serve(checkpoint, x, routes, files=False)


@pytest.mark.parametrize("kind", ["plain", "moe_per_expert"])
def test_dummy_weights_are_not_checked(kind):
    """They come without the parameters' loaders."""
    checkpoint, _, _ = make_case(kind)
    torch.set_default_dtype(torch.bfloat16)
    layer = ck.build(checkpoint)
    for param in layer.parameters():
        if param.is_floating_point():
            param.data.uniform_(-1e-3, 1e-3)
    ck.finish(layer)


def make_unquantized(
    kind: str, stack: str = "model.layers", int8: str = "model.layers.0.mlp.down_proj"
) -> tuple[ck.Checkpoint, torch.nn.Module]:
    """A checkpoint whose linear layer is in `exclude`, and the layer, not loaded.

    stack: the list of layers that it is in. int8: a module of the files that is INT8.
    """
    checkpoint, _, _ = make_case(kind)
    checkpoint.prefix = checkpoint.prefix.replace("model.layers", stack)
    tensors = {
        name.replace("model.layers", stack): tensor.bfloat16()
        for name, tensor in checkpoint.tensors.items()
        if name.endswith("weight")
    }
    quantized = {f"{int8}.weight": torch.ones(4, 4, dtype=torch.int8)}
    quantized[f"{int8}.weight_scale"] = torch.ones(4)
    checkpoint.tensors = tensors
    checkpoint.config["exclude"] = [n.removesuffix(".weight") for n in tensors]
    torch.set_default_dtype(torch.bfloat16)
    config = ck.quark_config(checkpoint)
    ck.look_at_files(config, (tensors | quantized).items())
    with torch.device(ck.DEVICE):
        return checkpoint, ck.build(checkpoint, config)


@needs_files
@pytest.mark.parametrize("kind", ck.LINEAR)
def test_unquantized_layers_without_their_tensors_are_named(kind):
    """Stock does not look, and torch.empty's numbers would be served."""
    checkpoint, layer = make_unquantized(kind)
    *others, _ = checkpoint.tensors.items()
    ck.load(layer, others)
    with pytest.raises(ValueError, match=f"{checkpoint.prefix}: weight is not in"):
        ck.finish(layer)


@needs_files
@pytest.mark.parametrize("kind", ck.LINEAR)
def test_unquantized_layers_with_their_tensors_pass(kind):
    checkpoint, layer = make_unquantized(kind)
    ck.load(layer, checkpoint.tensors.items())
    assert layer.weight.isfinite().all()
    ck.finish(layer)


@needs_files
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ck.LINEAR)
def test_each_rank_sees_unquantized_layers_without_their_tensors(kind, size):
    for rank in range(size):
        with shard(rank, size):
            checkpoint, layer = make_unquantized(kind)
            *others, last = checkpoint.tensors.items()
            ck.load(layer, others)
            assert layer.weight.isnan().any()
            ck.load(layer, [last])
            assert layer.weight.isfinite().all()
            ck.finish(layer)


@needs_files
def test_unquantized_layers_of_dummy_weights_pass():
    _, layer = make_unquantized("plain")
    layer.weight.data.uniform_(-1e-3, 1e-3)
    ck.finish(layer)
    ck.finish(layer)  # in the kernel's form


@needs_files
@pytest.mark.parametrize("stack", ["vision_tower.layers", "visual.blocks", "h"])
def test_unquantized_layers_of_another_stack_pass(stack):
    """A tower may be in no file where it is not used."""
    _, layer = make_unquantized("plain", stack)
    ck.finish(layer)
    _, layer = make_unquantized("plain", stack, f"{stack}.0.down_proj")
    with pytest.raises(ValueError, match="weight is not in the checkpoint"):
        ck.finish(layer)


@needs_files
def test_unquantized_layers_load_as_stocks():
    """Loaders, and some models, ask for the class of the method."""
    _, layer = make_unquantized("qkv")
    assert layer.weight.weight_loader == layer.weight_loader_v2
    assert type(layer.quant_method) is UnquantizedLinearMethod


@pytest.fixture
def shares_kv_cache(monkeypatch):
    """All layers take keys and values of others, as Gemma 3n's last ones."""
    counts = SimpleNamespace(num_hidden_layers=99999, num_kv_shared_layers=99999)
    model_config = SimpleNamespace(hf_text_config=counts)
    monkeypatch.setattr(get_current_vllm_config(), "model_config", model_config)
    return counts


def drop_keys_and_values(checkpoint: ck.Checkpoint) -> None:
    for name in [n for n in checkpoint.tensors if ".k_proj" in n or ".v_proj" in n]:
        del checkpoint.tensors[name]


@needs_files
@pytest.mark.parametrize("activation", ["token_sym", "static_sym", "static_asym"])
@pytest.mark.parametrize("weight", ck.WEIGHTS)
def test_layers_that_share_a_cache_need_no_keys(weight, activation, shares_kv_cache):
    checkpoint, x, routes = make_case("qkv", activation, weight)
    stem = checkpoint.prefix.removesuffix("qkv_proj")
    shares_kv_cache.num_kv_shared_layers -= int(stem.split(".")[2])  # from this one on
    expected = ck.reference(checkpoint, x, routes)[:, :128]
    drop_keys_and_values(checkpoint)
    # As Quark writes what it does not quantize: modules that there are.
    scheme = checkpoint.config["global_quant_config"]
    checkpoint.config["layer_quant_config"] = {f"{stem}q_proj": scheme}
    checkpoint.config["global_quant_config"] = {"weight": None, "input_tensors": None}
    out = ck.serve(checkpoint, x, routes)
    assert ck.is_right(out[:, :128], expected), ck.deviation(out[:, :128], expected)
    assert not out[:, 128:].any()
    shares_kv_cache.num_kv_shared_layers -= 1
    checkpoint.config["layer_quant_config"] = {f"{stem}*": scheme}
    with pytest.raises(ValueError, match="shard k: weight is not in"):
        ck.serve(checkpoint, x, routes)


@pytest.mark.parametrize("last", ["weight", "weight_scale"])
def test_layers_that_share_a_cache_have_all_of_a_shard(last, shares_kv_cache):
    checkpoint, x, routes = make_case("qkv")
    del checkpoint.tensors[find_name(checkpoint, f"v_proj.{last}")]
    with pytest.raises(ValueError, match=f"shard v: {last} is not in"):
        ck.serve(checkpoint, x, routes, files=False)


@needs_files
def test_unquantized_layers_that_share_a_cache_need_no_keys(shares_kv_cache):
    checkpoint, layer = make_unquantized("qkv")
    with pytest.raises(ValueError, match="qkv_proj: weight is not in"):
        ck.finish(layer)
    drop_keys_and_values(checkpoint)
    ck.load(layer, checkpoint.tensors.items())
    ck.finish(layer)
    shares_kv_cache.num_kv_shared_layers = 0
    checkpoint, layer = make_unquantized("qkv")
    drop_keys_and_values(checkpoint)
    ck.load(layer, checkpoint.tensors.items())
    with pytest.raises(ValueError, match="qkv_proj: weight is not in"):
        ck.finish(layer)


def test_experts_that_an_all2all_backend_pads_are_refused():
    checkpoint, _, _ = make_case("moe_per_expert")
    layer = ck.build(checkpoint)
    layer.moe_config.hidden_dim_unpadded = ck.K - 16
    int8 = importlib.import_module(ck.INT8)
    with pytest.raises(ValueError, match="rounds the hidden size .*--all2all-backend"):
        int8.prepare_experts(layer)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("weight", ck.WEIGHTS)
@pytest.mark.parametrize("kind", ck.LINEAR)
def test_tensor_parallel_linear(kind, weight, size):
    """Each rank holds its part; at 4 ranks two share a KV head."""
    checkpoint, x, routes = make_case(kind, weight=weight)
    expected = ck.reference(checkpoint, x, routes)
    torch.set_default_dtype(torch.bfloat16)
    parts, offset = [], 0
    for n, _ in checkpoint.modules.values():
        parts.append(expected[:, offset : offset + n])
        offset += n
    total = 0
    for rank in range(size):
        with shard(rank, size), torch.device(ck.DEVICE):
            layer = ck.build(checkpoint)
            ck.load(layer, checkpoint.tensors.items())
            ck.finish(layer)
        if kind == "row":
            # Every rank quantizes its own part of a token.
            part = x.chunk(size, -1)[rank].contiguous()
            total = total + layer(part.to(ck.DEVICE))[0].cpu().double()
            continue
        rank_parts = []
        for i, part in enumerate(parts):
            heads = 2 if kind == "qkv" and i else size
            index = rank * heads // size
            rank_parts.append(part.chunk(min(heads, size), -1)[index])
        out = layer(x.to(ck.DEVICE))[0].cpu()
        assert ck.is_right(out, torch.cat(rank_parts, -1)), (
            rank,
            ck.deviation(out, expected),
        )
    if kind == "row":
        module = next(iter(checkpoint.modules))
        weights = ck._matrix(checkpoint, module, True).chunk(size, -1)
        inputs = [ck.quantize(p, "token_sym") for p in x.chunk(size, -1)]
        assert ck.is_right(total, sum(p @ m.t() for p, m in zip(inputs, weights)))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("column", [False, True])
def test_fused_layers_of_a_models_own(column, size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, K, generator=generator).to(torch.bfloat16)
    shards = {}
    for name, rows in {"index_k": 32, "gate": 64}.items():
        weight = torch.randint(-127, 128, (rows, K), generator=generator)
        scale = torch.rand(rows, generator=generator) + 0.5
        shards[name] = weight.to(torch.int8), scale.reshape(-1, 1) if column else scale
    torch.set_default_dtype(torch.bfloat16)
    for rank in range(size):
        with shard(rank, size), torch.device(ck.DEVICE):
            layer = FusedShards(K, [32, 64, 32], size, **own_layer(rank))
            for name, (weight, scale) in shards.items():
                layer.weight.weight_loader(layer.weight, weight, name)
                layer.weight_scale.weight_loader(layer.weight_scale, scale, name)
            layer.quant_method.process_weights_after_loading(layer)
        out = layer(x.to(ck.DEVICE))[0].cpu()
        x_q = ck.quantize(x, "token_sym")
        expected = [
            x_q @ (w.double() * s.double().reshape(-1, 1)).t()
            for w, s in shards.values()
        ]
        expected[1] = expected[1].chunk(size, -1)[rank]
        served = out[:, : 32 + 64 // size]
        assert ck.is_right(served, torch.cat(expected, -1)), (rank, served)


@pytest.mark.parametrize("kind", ["weight", "weight_scale"])
def test_fused_layers_of_a_models_own_name_what_is_missing(kind):
    with torch.device(ck.DEVICE):
        layer = FusedShards(K, [32, 64, 32], 1, **own_layer(kind))
        for name, rows in {"index_k": 32, "gate": 64}.items():
            for each, tensor in {
                "weight": torch.ones(rows, K, dtype=torch.int8),
                "weight_scale": torch.ones(rows),
            }.items():
                if (name, each) != ("gate", kind):
                    param = getattr(layer, each)
                    param.weight_loader(param, tensor.cpu(), name)
        with pytest.raises(ValueError, match=f"shard gate: {kind} is not in"):
            layer.quant_method.process_weights_after_loading(layer)


def test_fused_layers_of_a_models_own_without_a_shard_are_refused():
    """Rows that no tensor filled are padding only where the model made them 0."""
    with torch.device(ck.DEVICE):
        layer = FusedShards(K, [32, 64, 32], 1, **own_layer("gap"))
        weight = torch.ones(32, K, dtype=torch.int8)
        layer.weight.weight_loader(layer.weight, weight.cpu(), "index_k")
        scale = layer.weight_scale
        scale.weight_loader(scale, torch.ones(32).cpu(), "index_k")
        with pytest.raises(ValueError, match="weight_scale .*was not loaded"):
            layer.quant_method.process_weights_after_loading(layer)


def own_layer(name) -> dict:
    config = ck.quark_config(ck.make_checkpoint("plain"))
    return {"quant_config": config, "prefix": f"model.layers.0.in_proj_{name}"}


@pytest.mark.parametrize("weight", ck.WEIGHTS)
@pytest.mark.parametrize("kind", ck.EXPERTS)
def test_expert_parallel_experts(kind, weight, environment):
    """Each rank holds half of the experts; the parts add up."""
    checkpoint, x, routes = make_case(kind, weight=weight)
    expected = ck.reference(checkpoint, x, routes)
    torch.set_default_dtype(torch.bfloat16)
    environment.parallel_config.enable_expert_parallel = True
    prefix, total = checkpoint.prefix, 0
    for rank in range(2):
        # One process holds both ranks' layers: they need names of their own.
        with shard(rank, 2), torch.device(ck.DEVICE):
            layer = ck.build(checkpoint)
            assert layer.local_num_experts == ck.E // 2
            ck.load(layer, checkpoint.tensors.items())
            ck.finish(layer)
        total = total + ck.run(layer, x, routes).double()
        ck.forget(prefix)
    assert ck.is_right(total, expected), ck.deviation(total, expected)


def test_expert_parallel_names_the_missing_expert(environment):
    checkpoint, _, _ = make_case("moe_per_expert")
    del checkpoint.tensors[find_name(checkpoint, "experts.6.up_proj.weight_scale")]
    torch.set_default_dtype(torch.bfloat16)
    environment.parallel_config.enable_expert_parallel = True
    with shard(1, 2), torch.device(ck.DEVICE):
        layer = ck.build(checkpoint)
        ck.load(layer, checkpoint.tensors.items())
        with pytest.raises(ValueError, match=r"expert 6: up_proj .* weight_scale"):
            ck.finish(layer)


@pytest.mark.skipif(not importlib.util.find_spec(ck.INT8), reason="needs patch 0007")
def test_no_scales_of_no_experts_pass():
    """As those of a rank that has none of the experts."""
    weights = importlib.import_module(f"{ck.INT8}.weights")
    scale, weight = torch.empty(0, 96), torch.empty(0, 96, 64, dtype=torch.int8)
    where = "model.layers.0.moe.experts".format
    layer = torch.nn.Module()
    weights._check_scale(layer, "weight_scale", scale, weight, where, True)
