# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The files of an INT8 checkpoint are held against its config before weights are
read: what no layer can be made of is refused by its tensor's name.

Run `pytest tests/quantization/quark/test_int8_checkpoint.py`.
"""

import json
import os
from types import SimpleNamespace
from typing import Any

import pytest
import regex as re
import torch
from safetensors.torch import save_file

from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.quantization.quark.int8 import layers as int8_layers
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper

from . import checkpoints as ck
from .utils import quark_config

KINDS = ck.LINEAR + ck.EXPERTS


@pytest.fixture(autouse=True)
def environment(layer_environment):
    return layer_environment


def write(folder, *files: dict[str, torch.Tensor], index: bool = False) -> str:
    names = [f"model-{i}.safetensors" for i in range(len(files))]
    for name, tensors in zip(names, files):
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / name)
    if index:
        weight_map = {t: name for name, tensors in zip(names, files) for t in tensors}
        text = json.dumps({"weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)
    return str(folder)


def look(checkpoint: ck.Checkpoint, folder: str, **kwargs) -> QuarkConfig:
    """What VllmConfig does with a config that it made."""
    config = ck.quark_config(checkpoint)
    config.maybe_update_config(folder, **kwargs)
    return config


@pytest.mark.parametrize("activation", ck.ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_sound_checkpoints_pass(kind, activation, tmp_path):
    checkpoint = ck.make_checkpoint(kind, activation)
    first, *others = checkpoint.tensors
    folder = write(
        tmp_path,
        {first: checkpoint.tensors[first]},
        {n: checkpoint.tensors[n] for n in others},
    )
    look(checkpoint, folder, hf_config=None, revision=None)


def test_places_without_files_pass(tmp_path):
    checkpoint = ck.make_checkpoint("plain")
    look(checkpoint, str(tmp_path))
    look(checkpoint, "s3://bucket/model")
    look(checkpoint, str(tmp_path / "nobody" / "nothing"))


def test_configs_without_int8_are_not_looked_at(tmp_path):
    checkpoint = ck.make_checkpoint("plain")
    for part in ("weight", "input_tensors"):
        checkpoint.config["global_quant_config"][part]["dtype"] = "fp8_e4m3"
    (tmp_path / "model.safetensors").write_text("no such file")
    config = ck.quark_config(checkpoint)
    assert config.int8 is None
    config.maybe_update_config(str(tmp_path))


BROKEN = [
    ("qkv", "k_proj.weight_scale", "drop", "k_proj.weight is int8, but"),
    ("qkv", "k_proj.weight", "drop", "k_proj.weight_scale has no"),
    ("moe_per_expert", "3.up_proj.weight_scale", "drop", "3.up_proj.weight is int8"),
    ("moe_stacked", "down_proj.weight_scale", "drop", "down_proj.weight is int8"),
    ("qkv", "v_proj.weight_scale", "cut", "v_proj.weight_scale is F32"),
    ("moe_stacked", "up_proj.weight_scale", "cut", "up_proj.weight_scale is F32"),
    ("plain", "weight_scale", torch.int32, "weight_scale is I32"),
    ("row", "o_proj.weight", "input_rotation", "o_proj.input_rotation lies beside"),
    ("plain", "weight", "exclude", "is in `exclude`"),
    (
        "plain",
        "weight",
        "twice",
        "is in the checkpoint twice, in model-0.* and model-1",
    ),
]


@pytest.mark.parametrize("kind,ending,change,named", BROKEN)
def test_broken_tensors_are_refused_by_name(kind, ending, change, named, tmp_path):
    checkpoint = ck.make_checkpoint(kind)
    name = next(n for n in checkpoint.tensors if n.endswith(ending))
    files = [checkpoint.tensors]
    tensor = checkpoint.tensors[name]
    if change == "drop":
        del checkpoint.tensors[name]
    elif change == "cut":
        checkpoint.tensors[name] = tensor[: len(tensor) // 2]
    elif change == "exclude":
        checkpoint.config["exclude"] = ["*up_proj"]
    elif change == "twice":
        files.append({name: tensor})
    elif change == "input_rotation":
        rotation = name.replace(".weight", ".input_rotation")
        checkpoint.tensors[rotation] = torch.eye(ck.K)
    else:
        checkpoint.tensors[name] = tensor.to(change)
    with pytest.raises(ValueError, match=named):
        look(checkpoint, write(tmp_path, *files))


def test_scales_of_another_name_are_refused_and_renamed(tmp_path):
    """As `quantize_quark.py --model_export hf_format` writes them."""
    checkpoint = ck.make_checkpoint("qkv")
    scale = ".weight_quantizer.scale"
    tensors = {
        n.replace(".weight_scale", scale): t for n, t in checkpoint.tensors.items()
    }
    with pytest.raises(ValueError, match=r"AMD/Quark issue 44.*rename \*_quantizer"):
        look(checkpoint, write(tmp_path, tensors))
    renamed = {n.replace("_quantizer.scale", "_scale"): t for n, t in tensors.items()}
    look(checkpoint, write(tmp_path, renamed))


def test_scales_that_are_renamed_in_part_are_named(tmp_path):
    """What lies beside the scales has to be renamed, too."""
    checkpoint = ck.make_checkpoint("plain")
    name = next(n for n in checkpoint.tensors if n.endswith(".weight_scale"))
    left = name.replace(".weight_scale", ".weight_quantizer.zero_point")
    checkpoint.tensors[left] = torch.zeros(4, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"quantizer.zero_point has a name.*rename"):
        look(checkpoint, write(tmp_path, checkpoint.tensors))


def test_fake_quantized_exports_are_refused(tmp_path):
    """weight_format="fake_quantized": weights stay floats, with scales beside them."""
    checkpoint = ck.make_checkpoint("qkv")
    tensors = {
        n: t.bfloat16() if t.dtype == torch.int8 else t
        for n, t in checkpoint.tensors.items()
    }
    with pytest.raises(ValueError, match="BF16, with a weight_scale.*real_quantized"):
        look(checkpoint, write(tmp_path, tensors))


@pytest.mark.parametrize("kind", ["plain", "qkv"])
def test_dynamic_layers_drop_static_scales_of_the_files(kind, tmp_path):
    """As the way out of scales that differ between shards leaves them there."""
    checkpoint = ck.make_checkpoint(kind)
    for name in [n for n in checkpoint.tensors if n.endswith(".weight")]:
        for part in ("input_scale", "input_zero_point"):
            named = name.replace("weight", part)
            checkpoint.tensors[named] = torch.tensor(0.5).to(
                torch.float32 if part == "input_scale" else torch.int8
            )
    config = look(checkpoint, write(tmp_path, checkpoint.tensors))
    torch.set_default_dtype(torch.bfloat16)
    layer = ck.build(checkpoint, config)
    for name in [n for n in checkpoint.tensors if "input" in n]:
        # A model's loader looks it up by its name.
        param = dict(layer.named_parameters())[name.rpartition(".")[2]]
        param.weight_loader(param, checkpoint.tensors[name])
    ck.load(layer, (t for t in checkpoint.tensors.items() if "input" not in t[0]))
    ck.finish(layer)
    assert not layer.scheme.is_static_input_scheme


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_are_unquantized_in_the_files(kind, tmp_path, monkeypatch):
    """Quark does not list what it cannot quantize, people forget: as it is there."""
    ck.needs_kernel(kind)
    checkpoint = ck.make_checkpoint(kind)
    weights = {
        n: torch.randn(t.shape).to(torch.bfloat16)
        for n, t in checkpoint.tensors.items()
        if n.endswith(".weight")
    }
    config = look(checkpoint, write(tmp_path, weights))
    torch.set_default_dtype(torch.bfloat16)
    layer = ck.build(checkpoint, config)
    assert type(layer.quant_method).__name__.startswith("Unquantized")
    warnings = []
    monkeypatch.setattr(int8_layers.logger, "warning", lambda *a: warnings.append(a))
    config.int8.check_claims()
    config.int8.check_claims()
    stem = checkpoint.prefix.rpartition(".")[0]
    assert len(warnings) == 1 and warnings[0][2].startswith(stem)


def test_unquantized_files_that_a_mapper_renames_by_an_expression(tmp_path):
    """As the Transformers backend maps GPT-NeoX's."""
    checkpoint = ck.make_checkpoint("plain")
    written = "gpt_neox.layers.1.mlp.up_proj"
    weight = torch.ones(4, 4, dtype=torch.bfloat16)
    config = look(checkpoint, write(tmp_path, {f"{written}.weight": weight}))
    expression = re.compile(r"^gpt_neox\.(.+)")
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_regex={expression: r"model.\1"}))
    assert config.int8.linear("model.layers.1.mlp.up_proj", None) is None
    assert config.int8.linear("model.layers.2.mlp.up_proj", None)


@pytest.mark.parametrize(
    "stacks",
    [
        ("experts.gate_up_proj", "experts.down_proj"),
        ("experts.gate_up_proj.weight", "experts.down_proj.weight"),
        ("input_linear.weight", "output_linear.weight"),
    ],
)
def test_stacked_experts_that_are_unquantized_in_the_files(stacks, tmp_path):
    """Of Llama 4, gpt-oss, Qwen3.5 and Granite; AMD Quark leaves them as they are."""
    checkpoint = ck.make_checkpoint("moe_per_expert")
    stem = checkpoint.prefix.removesuffix(".experts")
    tensors = {f"{stem}.{n}": torch.ones(8, 4, 4, dtype=torch.bfloat16) for n in stacks}
    config = look(checkpoint, write(tmp_path, tensors))
    assert config.int8.experts(checkpoint.prefix, 8, None) is None
    assert config.int8.experts("model.layers.77.moe.experts", 8, None)


def test_fused_layers_that_are_half_quantized_are_refused(tmp_path):
    checkpoint = ck.make_checkpoint("qkv")
    name = next(n for n in checkpoint.tensors if n.endswith("k_proj.weight"))
    checkpoint.tensors[name] = checkpoint.tensors[name].to(torch.bfloat16)
    del checkpoint.tensors[f"{name}_scale"]
    config = look(checkpoint, write(tmp_path, checkpoint.tensors))
    torch.set_default_dtype(torch.bfloat16)
    with pytest.raises(ValueError, match="k_proj is not quantized"):
        ck.build(checkpoint, config)


def test_several_problems_are_counted(tmp_path):
    checkpoint = ck.make_checkpoint("qkv")
    for name in [n for n in checkpoint.tensors if n.endswith("scale")]:
        del checkpoint.tensors[name]
    with pytest.raises(ValueError, match=r"_proj.weight is int8.*\(and 2 more\)"):
        look(checkpoint, write(tmp_path, checkpoint.tensors))


@pytest.mark.parametrize("cut", [0, 5, 40, -1])
def test_files_that_are_cut_short_are_named(cut, tmp_path):
    checkpoint = ck.make_checkpoint("plain")
    folder = write(tmp_path, checkpoint.tensors)
    path = tmp_path / "model-0.safetensors"
    os.truncate(path, cut if cut >= 0 else path.stat().st_size + cut)
    with pytest.raises(ValueError, match="model-0.safetensors: is no whole"):
        look(checkpoint, folder)


def test_the_index_says_which_files_count(tmp_path):
    checkpoint = ck.make_checkpoint("plain")
    folder = write(tmp_path, checkpoint.tensors, index=True)
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "more.safetensors")
    (tmp_path / "broken.safetensors").write_text("consolidated, or of another tool")
    look(checkpoint, folder)
    two = {"weight_map": {"a": "model-0.safetensors", "b": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(two))
    with pytest.raises(ValueError, match="model-1.safetensors: is missing"):
        look(checkpoint, folder)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match="index.json: is no index"):
        look(checkpoint, folder)


def test_sharded_states_are_refused(tmp_path):
    """They hold layers as kernels do: stock stops at missing keys."""
    checkpoint = ck.make_checkpoint("plain")
    save_file(checkpoint.tensors, tmp_path / "model-rank-0-part-0.safetensors")
    with pytest.raises(ValueError, match="sharded state.*load the checkpoint"):
        look(checkpoint, str(tmp_path))


def layers(count: int, kinds: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    headers = {
        f"model.layers.{i}.{name}": torch.ones(shape)
        for i in range(count)
        for name, shape in kinds.items()
    }
    headers["model.embed_tokens.weight"] = torch.ones(8, 4)
    return headers | {"model.norm.weight": torch.ones(4)}


BLOCK = {
    "input_layernorm.weight": (4,),
    "mlp.gate.weight": (2, 4),
    "self_attn.q_norm.weight": (4,),
}


def test_a_layer_short_of_a_tensor_is_named(tmp_path):
    tensors = layers(5, BLOCK)
    del tensors["model.layers.3.input_layernorm.weight"]
    with pytest.raises(ValueError, match="layers.3.input_layernorm.weight is not in"):
        look(ck.make_checkpoint("plain"), write(tmp_path, tensors))


def mixed_layers(count: int, stack: str = "model.layers") -> dict[str, torch.Tensor]:
    """Layers with attention in high precision and an INT8 down_proj each."""
    attention = {f"self_attn.{p}_proj.weight": (4, 4) for p in "qkvo"}
    scaled = {"mlp.down_proj.weight": (4, 4), "mlp.down_proj.weight_scale": (4,)}
    tensors = layers(count, BLOCK | attention | scaled)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        dtype = torch.int8 if "down_proj" in name else torch.bfloat16
        tensors[name] = tensors[name].to(dtype)
    return {n.replace("model.layers", stack): t for n, t in tensors.items()}


def drop(tensors: dict[str, torch.Tensor], part: str) -> None:
    dropped = [n for n in tensors if part in n]
    assert dropped
    for name in dropped:
        del tensors[name]


def look_at_attention(folder: str, hf_config: Any = None) -> QuarkConfig:
    checkpoint = ck.make_checkpoint("plain")
    checkpoint.config["exclude"] = ["*self_attn*", "*experts*"]
    return look(checkpoint, folder, hf_config=hf_config)


def test_a_layer_without_attention_is_named(tmp_path):
    """Several modules below one name; of a model whose layers may do without, none."""
    tensors = mixed_layers(5)
    drop(tensors, ".3.self_attn.")
    folder = write(tmp_path, tensors)
    with pytest.raises(ValueError, match="layers.3.self_attn.k_proj.weight is not in"):
        look_at_attention(folder)
    (tmp_path / "config.json").write_text(json.dumps({"block_configs": [{}]}))
    look_at_attention(folder)


@pytest.mark.parametrize("stack", ["model.layers", "layers", "model.text.layers"])
@pytest.mark.parametrize("missing", [1, 3])
def test_a_missing_layer_is_named(missing, stack, tmp_path):
    tensors = mixed_layers(5, stack)
    drop(tensors, f"layers.{missing}.")
    with pytest.raises(ValueError, match=f"{stack}.{missing} is not in the checkpoint"):
        look_at_attention(write(tmp_path, tensors))


COUNTS = [
    ({"num_hidden_layers": 7}, "model.layers.5 is not .* there are 7"),
    ({"text_config": {"num_hidden_layers": 6}}, "model.layers.5 is not .* are 6"),
    ({"num_hidden_layers": 5}, ""),
    ({"num_hidden_layers": 4}, ""),  # the last one is for MTP
    ({"num_hidden_layers": None}, ""),
    # LongCat's have two attentions each.
    ({"num_hidden_layers": 10, "num_layers": 5}, ""),
    ({"num_hidden_layers": 7, "block_configs": [{}]}, ""),
    ({"num_hidden_layers": 7, "block_configs": []}, "model.layers.5 is not"),
    ({"num_hidden_layers": 7, "num_kv_shared_layers": 1}, "model.layers.5 is not"),
]


@pytest.mark.parametrize("config, named", COUNTS)
@pytest.mark.parametrize("in_use", [False, True])
def test_missing_last_layers_are_named(in_use, config, named, tmp_path):
    """By config.json or, with what the user overrides, by the config in use."""
    written = {"num_hidden_layers": 5} if named else {"num_hidden_layers": 9}
    hf_config = SimpleNamespace(to_dict=lambda: config) if in_use else None
    (tmp_path / "config.json").write_text(json.dumps(written if in_use else config))
    folder = write(tmp_path, mixed_layers(5))
    if named:
        with pytest.raises(ValueError, match=named):
            look_at_attention(folder, hf_config)
    else:
        look_at_attention(folder, hf_config)


@pytest.mark.parametrize("config, named", COUNTS)
def test_missing_last_layers_on_the_hub_are_named(config, named, monkeypatch):
    import huggingface_hub

    spelled = {torch.int8: "I8", torch.bfloat16: "BF16", torch.float32: "F32"}
    tensors = {
        n: SimpleNamespace(dtype=spelled[t.dtype], shape=list(t.shape))
        for n, t in mixed_layers(5).items()
    }
    metadata = SimpleNamespace(files_metadata={"f": SimpleNamespace(tensors=tensors)})
    name = "get_safetensors_metadata"
    monkeypatch.setattr(huggingface_hub, name, lambda *_, **__: metadata)
    checkpoint = ck.make_checkpoint("plain")
    checkpoint.config["exclude"] = ["*self_attn*"]
    hf_config = SimpleNamespace(to_dict=lambda: config)
    known = {"hf_config": hf_config, "revision": "main"}
    if named:
        with pytest.raises(ValueError, match=named):
            look(checkpoint, "nobody/nothing", **known)
    else:
        look(checkpoint, "nobody/nothing", **known)


@pytest.mark.parametrize("other", ["model.vision_tower.layers", "model.mtp.layers"])
def test_layers_of_several_models_are_not_counted(other, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 9}))
    tensors = mixed_layers(5)
    tensors[f"{other}.0.norm.weight"] = torch.ones(4)
    look_at_attention(write(tmp_path, tensors))


def test_numbers_of_a_tower_may_have_gaps(tmp_path):
    """As those of convolutions with functions in between, in Parakeet's encoder."""
    tensors = mixed_layers(5)
    for i in (0, 2, 3, 5, 6):
        tensors[f"encoder.subsampling.layers.{i}.weight"] = torch.ones(4, 4)
    look_at_attention(write(tmp_path, tensors))


def test_functions_between_linear_layers_have_numbers(tmp_path):
    tensors = mixed_layers(5)
    for i in (0, 2, 4, 6):
        name = f"projector.layers.{i}.weight"
        tensors[name] = torch.ones(4, 4, dtype=torch.int8)
        tensors[f"{name}_scale"] = torch.ones(4)
    look_at_attention(write(tmp_path, tensors))


def test_huge_numbers_take_no_memory(tmp_path):
    tensors = mixed_layers(5)
    for name in [n for n in tensors if ".layers.4." in n]:
        tensors[name.replace(".4.", ".4000000000000.")] = tensors.pop(name)
    with pytest.raises(ValueError, match="model.layers.4 is not in the checkpoint"):
        look_at_attention(write(tmp_path, tensors))
    tensors = with_experts(torch.bfloat16)
    for name in [n for n in tensors if ".2.mlp.experts.3." in n]:
        tensors[name.replace("experts.3", "experts.3000000000000")] = tensors.pop(name)
    with pytest.raises(ValueError, match="2.mlp.experts.3.down_proj.weight is not in"):
        look_at_attention(write(tmp_path, tensors))


def test_one_layer_without_scales_of_a_cache_passes(tmp_path):
    """Quark gives the attention that it excludes none."""
    tensors = mixed_layers(6)
    for name in [n for n in tensors if "_proj.weight" in n and "self_attn" in n]:
        module = name.removesuffix(".weight")
        if ".4." not in name:
            tensors[name] = tensors[name].to(torch.int8)
            tensors[f"{module}.weight_scale"] = torch.ones(4)
            if "k_proj" in name or "v_proj" in name:
                tensors[f"{module}.output_scale"] = torch.ones(1)
    checkpoint = ck.make_checkpoint("plain")
    checkpoint.config["exclude"] = ["*layers.4.self_attn*"]
    look(checkpoint, write(tmp_path, tensors))
    del tensors["model.layers.3.self_attn.k_proj.output_scale"]
    with pytest.raises(ValueError, match="layers.3.self_attn.k_proj.output_scale is"):
        look(checkpoint, write(tmp_path, tensors))


OTHER_COUNTS = [
    ({"num_experts": 4, "block_configs": [{}]}, "model.layers.5"),
    ({"num_experts": 4, "mtp_num_experts": 2}, "mtp.layers.0"),
    ({"num_experts": 4}, "vision_tower.layers.0"),
]


@pytest.mark.parametrize("config, layer", OTHER_COUNTS)
def test_layers_may_have_other_counts_of_experts(config, layer, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = with_experts(torch.bfloat16)
    for name in [n for n in tensors if ".layers.0." in n and ".experts." not in n]:
        tensors[name.replace("model.layers.0", layer)] = tensors[name].clone()
    for e in range(2):
        for p in ("gate", "up", "down"):
            name = f"{layer}.mlp.experts.{e}.{p}_proj.weight"
            tensors[name] = torch.ones(4, 4, dtype=torch.bfloat16)
    look_at_attention(write(tmp_path, tensors))


def test_a_head_may_be_tied_by_an_override(tmp_path):
    config = {"architectures": ["XForCausalLM"], "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder = write(tmp_path, mixed_layers(5))
    for is_tied in (False, True):
        in_use = config | {"tie_word_embeddings": is_tied}
        hf_config = SimpleNamespace(to_dict=lambda in_use=in_use: in_use)
        config_of_folder = look_at_attention(folder, hf_config)
        assert config_of_folder.int8._lacks_head != is_tied


def test_layers_of_a_draft_have_its_models_numbers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 99}))
    tensors = mixed_layers(5)
    drop(tensors, ".layers.3.")
    draft = {n.replace(".layers.", ".layers.6"): t for n, t in tensors.items()}
    look_at_attention(write(tmp_path, draft))


def test_layers_that_share_a_cache_lack_keys_alone(tmp_path):
    counts = {"num_kv_shared_layers": 1, "num_hidden_layers": 6}
    config = {"text_config": counts}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = mixed_layers(6)
    for part in ("k_proj", "v_proj"):
        drop(tensors, f".5.self_attn.{part}")
    look_at_attention(write(tmp_path, tensors))
    for name, named in {
        ".3.input_layernorm": "layers.3.input_layernorm.weight is not in",
        ".2.self_attn.k_proj": "layers.2.self_attn.k_proj.weight is not in",
    }.items():
        short = dict(tensors)
        drop(short, name)
        with pytest.raises(ValueError, match=named):
            look_at_attention(write(tmp_path, short))


def with_experts(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    experts = {
        f"model.layers.{i}.mlp.experts.{e}.{p}_proj.weight": torch.ones(4, 4)
        for i in range(5)
        for e in range(4)
        for p in ("gate", "up", "down")
    }
    scales = {f"{n}_scale": torch.ones(4) for n in experts if dtype == torch.int8}
    return mixed_layers(5) | {n: t.to(dtype) for n, t in experts.items()} | scales


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize(
    "missing, named",
    [
        (".2.mlp.experts.1.", "2.mlp.experts.1.down_proj.weight is .* of other exp"),
        (".2.mlp.experts.3.", "2.mlp.experts.3.down_proj.weight is .* there are 4 ex"),
        (".2.mlp.experts.3.up", "2.mlp.experts.3.up_proj.weight is .* of other exp"),
        (".2.mlp.experts.", r"2.mlp.experts.\*.down_proj.weight is .* like it have"),
    ],
)
def test_missing_experts_are_named(missing, named, dtype, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_experts": 4}))
    checkpoint = ck.make_checkpoint("plain")
    listed = ["*experts*"] if dtype == torch.bfloat16 else []
    checkpoint.config["exclude"] = ["*self_attn*", *listed]
    tensors = with_experts(dtype)
    look(checkpoint, write(tmp_path, tensors))
    drop(tensors, missing)
    with pytest.raises(ValueError, match=named):
        look(checkpoint, write(tmp_path, tensors))


def test_one_excluded_projection_of_one_layer_passes(tmp_path):
    """As people keep the most sensitive ones in high precision."""
    scaled = {"mlp.down_proj.weight": (4, 4), "mlp.down_proj.weight_scale": (4,)}
    tensors = layers(5, BLOCK | scaled)
    for name in [n for n in tensors if n.endswith("down_proj.weight")]:
        tensors[name] = tensors[name].to(torch.int8)
    name = "model.layers.3.mlp.down_proj"
    tensors[f"{name}.weight"] = torch.ones(4, 4, dtype=torch.bfloat16)
    del tensors[f"{name}.weight_scale"]
    checkpoint = ck.make_checkpoint("plain")
    checkpoint.config["exclude"] = [name]
    look(checkpoint, write(tmp_path, tensors))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_model_short_of_its_ends_is_named(name, tmp_path):
    tensors = layers(5, BLOCK)
    del tensors[name]
    with pytest.raises(ValueError, match="(last norm|embedding) is not in"):
        look(ck.make_checkpoint("plain"), write(tmp_path, tensors))


@pytest.mark.parametrize("tied", [False, True, None])
@pytest.mark.parametrize("kind", ["Step3p5ForCausalLM", "MistralModel"])
def test_a_model_short_of_its_head_is_named(kind, tied, tmp_path):
    """Where its config says that the embedding is not the head, too."""
    config = {"architectures": [kind], "tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = layers(5, BLOCK)
    folder = write(tmp_path, tensors)
    if tied is False and kind == "Step3p5ForCausalLM":
        with pytest.raises(ValueError, match="lm_head is not in the checkpoint"):
            build_head(folder)
    else:
        build_head(folder)
    build_head(write(tmp_path, tensors | {"lm_head.weight": torch.ones(8, 4)}))


def build_head(folder: str) -> ParallelLMHead:
    config = look(ck.make_checkpoint("plain"), folder)
    return ParallelLMHead(64, 64, quant_config=config, prefix="lm_head")


def test_a_model_for_pooling_needs_no_head(tmp_path, monkeypatch):
    config = {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder = write(tmp_path, layers(5, BLOCK))
    model_config = SimpleNamespace(runner_type="pooling")
    monkeypatch.setattr(get_current_vllm_config(), "model_config", model_config)
    build_head(folder)
    model_config.runner_type = "generate"
    with pytest.raises(ValueError, match="lm_head is not in the checkpoint"):
        build_head(folder)


@pytest.mark.parametrize("is_draft", [False, True])
def test_drafts_share_the_head(is_draft, tmp_path):
    """Of one whose only matrix outside of its layers is not the embedding."""
    config = {"architectures": ["XForCausalLM"], "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = layers(1, BLOCK)
    tensors["model.fc.weight"] = torch.ones(4, 8)
    if is_draft:
        del tensors["model.embed_tokens.weight"]
    build_head(write(tmp_path, tensors))


def test_layers_of_several_kinds_pass(tmp_path):
    """Dense first layers, layers that share keys and values, MTP layers, drafts."""
    tensors = layers(9, BLOCK)
    for i in (5, 7):
        del tensors[f"model.layers.{i}.self_attn.q_norm.weight"]
    del tensors["model.layers.0.mlp.gate.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(4, 4)
    tensors["model.layers.8.eh_proj.weight"] = torch.ones(4, 8)
    look(ck.make_checkpoint("plain"), write(tmp_path, tensors))
    (tmp_path / "draft").mkdir()
    draft = {n: t for n, t in layers(1, BLOCK).items() if "embed" not in n}
    look(ck.make_checkpoint("plain"), write(tmp_path / "draft", draft))


OTHERS = {
    # What stands where, and which norms are missing, in models of that name.
    "chatglm": (
        ["transformer.encoder.layers.{}.input_layernorm"],
        ["transformer.embedding.word_embeddings", "transformer.encoder.norm"],
    ),
    "plamo2": (
        ["model.layers.layers.{}.pre_mixer_norm"],
        ["model.embed_tokens", "model.norm"],
    ),
    "opt": (
        ["model.decoder.layers.{}.final_layer_norm+bias"],
        ["model.decoder.embed_tokens"],
    ),
    "olmo": (["model.layers.{}.mlp.gate"], ["model.embed_tokens"]),
    "modernbert": (
        ["layers.{}.mlp_norm", "layers.{}.attn_norm-0"],
        ["embeddings", "final_norm"],
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_another_build_pass(name, tmp_path):
    """No layer of theirs, no embedding and no norm is taken for missing."""
    layer_modules, others = OTHERS[name]
    tensors = {}
    for i in range(6):
        for module in layer_modules:
            module, _, kind = module.format(i).partition("+")
            module, _, without = module.partition("-")
            if without != str(i):
                flat = "norm" in module
                tensors[f"{module}.weight"] = (
                    torch.ones(4) if flat else torch.ones(4, 4)
                )
                if kind:
                    tensors[f"{module}.{kind}"] = torch.ones(4)
    for module in others:
        tensors[f"{module}.weight"] = (
            torch.ones(4) if "norm" in module else torch.ones(8, 4)
        )
    look(ck.make_checkpoint("plain"), write(tmp_path, tensors))


def test_an_index_without_its_files_passes(tmp_path):
    """As for dummy weights."""
    checkpoint = ck.make_checkpoint("plain")
    folder = write(tmp_path, checkpoint.tensors, index=True)
    os.unlink(tmp_path / "model-0.safetensors")
    look(checkpoint, folder)


def test_a_hub_that_does_not_answer_passes(monkeypatch):
    """Its client's errors are of many kinds; what is in the cache still loads."""
    import huggingface_hub

    revisions = []

    def get(model, revision=None):
        revisions.append(revision)
        raise Exception("no route")

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", get)
    look(ck.make_checkpoint("plain"), "nobody/nothing", revision="abc")
    assert revisions == ["abc"]
    # Releases that do not say the revision may load another.
    look(ck.make_checkpoint("plain"), "nobody/nothing", hf_config=None)
    assert revisions == ["abc"]


def block(folder, kind: str, *extra: str) -> ck.Checkpoint:
    """A checkpoint of `kind` in files, and modules beside it that are INT8, too."""
    checkpoint = ck.make_checkpoint(kind)
    stem = checkpoint.prefix.split(".self_attn")[0].split(".mlp")[0].split(".moe")[0]
    for name in extra:
        weight = torch.ones(4, 4, dtype=torch.int8)
        checkpoint.tensors[f"{stem}.{name}.weight"] = weight
        checkpoint.tensors[f"{stem}.{name}.weight_scale"] = torch.ones(4)
    write(folder, checkpoint.tensors)
    return checkpoint


@pytest.mark.parametrize("router", ["moe.gate", "mlp.shared_expert_gate"])
@pytest.mark.parametrize("kind", KINDS)
def test_int8_routers_are_named(kind, router, tmp_path):
    """Models build them unquantized, and nothing asks the config about them."""
    ck.needs_kernel(kind)
    checkpoint = block(tmp_path, kind, router)
    config = look(checkpoint, str(tmp_path))
    layer = ck.build_loaded(checkpoint, config)
    with pytest.raises(ValueError, match=f"{router}.weight is int8, but vLLM builds"):
        ck.finish(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_int8_layers_of_other_stages_pass(kind, tmp_path):
    """Pipeline stages and drafts build some decoder layers only."""
    ck.needs_kernel(kind)
    checkpoint = ck.make_checkpoint(kind)
    other = "model.layers.9999.moe.gate"
    checkpoint.tensors[f"{other}.weight"] = torch.ones(4, 4, dtype=torch.int8)
    checkpoint.tensors[f"{other}.weight_scale"] = torch.ones(4)
    config = look(checkpoint, write(tmp_path, checkpoint.tensors))
    layer = ck.build_loaded(checkpoint, config)
    ck.finish(layer)


def test_int8_layers_that_a_model_leaves_out_pass(tmp_path):
    """Keys and values of layers that share others', for one."""
    checkpoint = block(tmp_path, "row", "self_attn.k_proj", "self_attn.v_proj")
    config = look(checkpoint, str(tmp_path))
    layer = ck.build_loaded(checkpoint, config)
    ck.finish(layer)


@pytest.mark.parametrize("kind", ["qkv", "gate_up"])
def test_fused_layers_of_models_without_a_mapping_pass(kind, tmp_path):
    checkpoint = block(tmp_path, kind)
    config = look(checkpoint, str(tmp_path))
    config.packed_modules_mapping = {}
    layer = ck.build_loaded(checkpoint, config)
    ck.finish(layer)


@pytest.mark.parametrize("kind", ["qkv", "plain"])
def test_scales_of_a_cache_are_dropped_where_the_model_has_no_place(kind, tmp_path):
    """As of StableLM, or beside kv_b_proj: stock stops with a KeyError."""
    checkpoint = ck.make_checkpoint(kind)
    module = next(iter(checkpoint.modules))
    scales = {f"{module}.output_scale": torch.tensor(0.02)}
    config = look(checkpoint, write(tmp_path, checkpoint.tensors, scales))
    layer = ck.build_loaded(checkpoint, config)
    layer.output_scale.weight_loader(layer.output_scale, torch.tensor(0.02), "q")
    ck.finish(layer)
    assert layer.output_scale.numel() == 0


def test_layers_without_scales_of_a_cache_have_no_place_for_them(tmp_path):
    checkpoint = ck.make_checkpoint("plain")
    torch.set_default_dtype(torch.bfloat16)
    layer = ck.build(checkpoint, look(checkpoint, write(tmp_path, checkpoint.tensors)))
    assert not hasattr(layer, "output_scale")


@pytest.mark.parametrize("kind", ["stacked", "INT8", "alone"])
def test_experts_of_gpt_oss_are_refused(kind, tmp_path):
    checkpoint = ck.make_checkpoint("plain")
    tensors = {"model.layers.0.self_attn.sinks": torch.zeros(4)}
    tensors["model.layers.0.mlp.router.weight"] = torch.zeros(2, 8)
    experts = "model.layers.0.mlp.experts"
    if kind == "alone":  # attention is excluded: nothing in the files is INT8
        checkpoint.tensors.clear()
    if kind != "INT8":
        tensors[f"{experts}.gate_up_proj"] = torch.zeros(2, 8, 8)
    else:
        name = f"{experts}.0.gate_up_proj"
        tensors[f"{name}.weight"] = torch.ones(8, 8, dtype=torch.int8)
        tensors[f"{name}.weight_scale"] = torch.ones(8)
    folder = write(tmp_path, checkpoint.tensors, tensors)
    with pytest.raises(ValueError, match="gate_up_proj.* is (F32|I8), and gpt-oss"):
        look(checkpoint, folder)


def test_experts_beside_the_sinks_of_other_models_pass(tmp_path):
    """As Granite's with sliding windows."""
    checkpoint, moe = ck.make_checkpoint("plain"), "model.layers.0.block_sparse_moe"
    tensors = {"model.layers.0.self_attn.sinks": torch.zeros(4)}
    tensors[f"{moe}.experts.gate_up_proj"] = torch.zeros(2, 8, 8)
    tensors[f"{moe}.router.weight"] = torch.zeros(2, 8)
    look(checkpoint, write(tmp_path, checkpoint.tensors, tensors))


def test_an_int8_router_that_is_built_after_all_experts(tmp_path):
    """As the Transformers backend builds them, with routers as linear layers."""
    gate = "model.layers.0.mlp.shared_expert_gate"
    checkpoint, folder = with_int8(tmp_path, gate)
    config = look(checkpoint, folder)
    torch.set_default_dtype(torch.bfloat16)
    for layer in (0, 1):
        config.int8.experts(f"model.layers.{layer}.mlp.experts", 2, None)
        config.int8._check_routers(config.int8._blocks)
    checkpoint.prefix = gate
    ck.build(checkpoint, config)
    checkpoint.prefix = "model.layers.1.self_attn.o_proj"
    ck.build(checkpoint, config)


def test_an_int8_router_with_a_bias_is_refused_as_a_router(tmp_path):
    gate = "model.layers.5.mlp.gate"
    checkpoint, folder = with_int8(tmp_path, gate)
    bias = {f"{gate}.e_score_correction_bias": torch.zeros(64)}
    save_file(bias, tmp_path / "bias.safetensors")
    checkpoint.prefix = "model.layers.5.self_attn.o_proj"
    config = look(checkpoint, folder)
    torch.set_default_dtype(torch.bfloat16)
    ck.build(checkpoint, config)
    checkpoint.prefix = "model.layers.6.self_attn.o_proj"
    with pytest.raises(ValueError, match="mlp.gate.weight is int8, but vLLM builds"):
        ck.build(checkpoint, config)


def test_scales_of_groups_are_refused(tmp_path):
    checkpoint = ck.make_checkpoint("plain")
    name = next(n for n in checkpoint.tensors if n.endswith("weight_scale"))
    scale = checkpoint.tensors[name].reshape(-1, 1).expand(-1, 4)
    checkpoint.tensors[name] = scale
    with pytest.raises(ValueError, match="one scale per group .* per_channel"):
        look(checkpoint, write(tmp_path, checkpoint.tensors))


ROUTERS = ["*moe.gate*", "re:.*moe.gate", "re:.*\\.moe\\.gate"]


@pytest.mark.parametrize("pattern", ROUTERS)
def test_patterns_for_a_router_spare_experts(pattern, tmp_path):
    """Which would name moe.gate_proj, too, had the files one tensor for all experts."""
    ck.needs_kernel("moe_per_expert")
    checkpoint = ck.make_checkpoint("moe_per_expert")
    checkpoint.config["exclude"] = [pattern]
    config = look(checkpoint, write(tmp_path, checkpoint.tensors))
    torch.set_default_dtype(torch.bfloat16)
    assert ck.build(checkpoint, config).w13_weight.dtype == torch.int8


def with_int8(tmp_path, module: str) -> tuple[ck.Checkpoint, str]:
    """A checkpoint whose `module` is INT8, too, and its folder."""
    checkpoint = ck.make_checkpoint("plain")
    checkpoint.tensors[f"{module}.weight"] = torch.ones(64, 64, dtype=torch.int8)
    checkpoint.tensors[f"{module}.weight_scale"] = torch.ones(64)
    checkpoint.config["exclude"] = []
    return checkpoint, write(tmp_path, checkpoint.tensors)


def test_an_int8_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lm_head.weight is int8, but vLLM builds"):
        look(*with_int8(tmp_path, "lm_head"))


def test_an_int8_embedding_is_refused(tmp_path):
    config = look(*with_int8(tmp_path, "model.embed_tokens"))
    with pytest.raises(ValueError, match="embed_tokens.weight is int8, but vLLM"):
        VocabParallelEmbedding(64, 64, quant_config=config, prefix="model.embed_tokens")


@pytest.mark.parametrize("entry", ["model.embed_tokens", "*embed*", "re:.*embed.*"])
def test_an_embedding_may_be_in_exclude(tmp_path, entry):
    checkpoint = ck.make_checkpoint("plain")
    checkpoint.config["exclude"] = [entry]
    config = look(checkpoint, write(tmp_path, checkpoint.tensors))
    tokens = VocabParallelEmbedding(
        64, 64, quant_config=config, prefix="model.embed_tokens"
    )
    torch.nn.init.normal_(tokens.weight)
    ids = torch.arange(4)
    assert torch.equal(tokens(ids), tokens.weight[:4])


def test_configs_that_were_not_made_from_a_file():
    """As upstream's tests make them."""
    scheme = quark_config().quant_config["global_quant_config"]
    config = QuarkConfig({"global_quant_config": scheme, "exclude": []})
    assert config.int8 is not None
    assert QuarkConfig({}).int8 is None
