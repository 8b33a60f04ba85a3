# SPDX-License-Identifier: Apache-2.0
"""Step-3.5-Flash's layers at their real widths, random weights: checkpoints whose depth is cut to fit one machine.

And a Qwen3-MoE of the same widths, for experts that know softmax routing only.
"""

import json
import multiprocessing
import sys
from pathlib import Path

from tests.quantization.quark import quantization_config

NANO = Path(__file__).resolve().parents[2] / "examples/step3p5_nano"
HIDDEN, DENSE, EXPERTS, WIDTH, VOCAB, HEAD = 4096, 11264, 288, 1280, 128896, 128
HEADS = {"full_attention": 64, "sliding_attention": 96}
GROUPS = 8


def make_config(layers: int, vocabulary: int = VOCAB, limit: float = 0.0) -> dict:
    """config.json of `layers` layers, the first one dense; every fourth has full attention. limit: of SwiGLU, or 0."""
    kinds = ["full_attention" if i % 4 == 0 else "sliding_attention" for i in range(layers)]
    config = json.loads((NANO / "config.json").read_text())
    config |= {
        "hidden_size": HIDDEN,
        "intermediate_size": DENSE,
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": 0,
        "vocab_size": vocabulary,
        "max_seq_len": 16384,
        "max_position_embeddings": 16384,
        "num_attention_heads": HEADS["full_attention"],
        "num_attention_groups": GROUPS,
        "head_dim": HEAD,
        "layer_types": kinds,
        "sliding_window": 512,
        "rope_theta": [5e6 if k == "full_attention" else 1e4 for k in kinds],
        "partial_rotary_factors": [0.5 if k == "full_attention" else 1.0 for k in kinds],
        "moe_layers_enum": ",".join(str(i) for i in range(1, layers)),
        "moe_num_experts": EXPERTS,
        "moe_top_k": 8,
        "moe_intermediate_size": WIDTH,
        "share_expert_dim": WIDTH,
        "swiglu_limits": [limit] * layers,
        "swiglu_limits_shared": [0.0] * layers,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config["attention_other_setting"] |= {
        "num_attention_heads": HEADS["sliding_attention"],
        "num_attention_groups": GROUPS,
        "head_dim": HEAD,
        "true_head_dim": HEAD,
    }
    config["rope_scaling"]["original_max_position_embeddings"] = 8192
    return config


def make_softmax_config(layers: int, vocabulary: int = VOCAB) -> dict:
    """config.json of Qwen3-MoE at these widths: routing by softmax, SiLU, no shared experts, full attention."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": DENSE,
        "num_hidden_layers": layers,
        "mlp_only_layers": [0],
        "decoder_sparse_step": 1,
        "vocab_size": vocabulary,
        "max_position_embeddings": 16384,
        "num_attention_heads": HEADS["full_attention"],
        "num_key_value_heads": GROUPS,
        "head_dim": HEAD,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": WIDTH,
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def tensor_shapes(
    layer: int | None, kind: str, dense: bool, vocabulary: int = VOCAB, softmax: bool = False
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer's BF16 tensors, experts left out; None: what stands outside layers.

    kind: of attention, for Step-3.5. softmax: of the model of `make_softmax_config`.
    """
    if layer is None:
        return {
            "model.embed_tokens.weight": (vocabulary, HIDDEN),
            "lm_head.weight": (vocabulary, HIDDEN),
            "model.norm.weight": (HIDDEN,),
        }
    heads = HEADS["full_attention" if softmax else kind]
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
        "self_attn.q_norm": (HEAD,),
        "self_attn.k_norm": (HEAD,),
        "self_attn.q_proj": (heads * HEAD, HIDDEN),
        "self_attn.k_proj": (GROUPS * HEAD, HIDDEN),
        "self_attn.v_proj": (GROUPS * HEAD, HIDDEN),
        "self_attn.o_proj": (HIDDEN, heads * HEAD),
        "self_attn.g_proj": (heads, HIDDEN),
    }
    part, width = ("mlp", DENSE) if dense else ("share_expert", WIDTH)
    if softmax:
        del shapes["self_attn.g_proj"]
    if dense or not softmax:
        shapes |= {f"{part}.{p}_proj": (width, HIDDEN) for p in ("gate", "up")}
        shapes[f"{part}.down_proj"] = (HIDDEN, width)
    if not dense:
        shapes["mlp.gate" if softmax else "moe.gate"] = (EXPERTS, HIDDEN)
    return {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def write_checkpoint(
    folder: Path, layers: int, int8: bool, device: str = "cuda", vocabulary: int = VOCAB, softmax: bool = False
) -> list[str]:
    """Random weights, one file a layer, made on `device`; returns the modules that are not quantized.

    softmax: the model of `make_softmax_config`, its experts one by one; else Step-3.5's, stacked.
    On a CPU a layer's experts are copies of eight: their numbers do not matter, and drawing them takes minutes.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator(device=device).manual_seed(0)
    config = make_softmax_config(layers, vocabulary) if softmax else make_config(layers, vocabulary)
    drawn = EXPERTS if device == "cuda" else 8
    weight_map: dict[str, str] = {}
    excluded: list[str] = []

    def save(name: str, tensors: dict) -> None:
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, folder / name)
        weight_map.update(dict.fromkeys(tensors, name))

    for layer in (None, *range(layers)):
        dense = layer in (None, 0)
        tensors = {}
        kind = "" if layer is None or softmax else config["layer_types"][layer]
        for name, shape in tensor_shapes(layer, kind, dense, vocabulary, softmax).items():
            weight = torch.zeros(shape, device=device)
            if len(shape) == 2:
                weight.normal_(generator=generator).mul_(shape[1] ** -0.5)
                excluded.append(name.removesuffix(".weight"))
            tensors[name] = weight.bfloat16()
        scales = {}
        for part in () if dense else ("gate", "up", "down"):
            rows, columns = (HIDDEN, WIDTH) if part == "down" else (WIDTH, HIDDEN)
            stacked_name = f"model.layers.{layer}.moe.{part}_proj.weight"
            weight = torch.empty(drawn, rows, columns, device=device, dtype=torch.int8 if int8 else torch.bfloat16)
            if int8:
                weight.random_(-127, 128, generator=generator)
                scale = torch.rand(EXPERTS, rows, device=device, generator=generator) + 0.5
                scales[f"{stacked_name}_scale"] = scale / (73 * columns**0.5)
            else:
                weight.normal_(generator=generator).mul_(columns**-0.5)
            if softmax:
                names = [f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight" for e in range(EXPERTS)]
                tensors |= {name: weight[e % drawn].clone() for e, name in enumerate(names)}
                if int8:
                    stacked = scales.pop(f"{stacked_name}_scale")
                    scales |= {f"{name}_scale": stacked[e].clone() for e, name in enumerate(names)}
            else:
                tensors[stacked_name] = weight.repeat(EXPERTS // drawn, 1, 1) if drawn < EXPERTS else weight
        if not dense and not softmax:
            tensors[f"model.layers.{layer}.moe.router_bias"] = torch.zeros(EXPERTS, device=device)
        save(f"layer-{'x' if layer is None else layer}.safetensors", tensors)
        if scales:
            save(f"scales-{layer}.safetensors", scales)
        del tensors, scales
    if device == "cuda":
        torch.cuda.empty_cache()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if int8:
        config["quantization_config"] = quantization_config(exclude=excluded)
    (folder / "config.json").write_text(json.dumps(config))
    return excluded


def write_apart(folder: Path, *words) -> None:
    """`write_checkpoint` in a process of its own, which gives its memory back, the GPU's too."""
    process = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=(folder, *words))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{folder}: could not be written")
