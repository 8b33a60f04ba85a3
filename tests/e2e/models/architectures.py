# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Tiny random models of the architectures that people quantize, by Transformers' own classes.

Each has two to four layers and weights of a size that keeps the activations' spread about one from layer to layer:
a layer that is wrong shows in the logits. `save_pretrained` writes them in the layout that their publishers use.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

VOCABULARY = 128
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
_ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
_GROUPS = {"n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_hidden_layers": 3}
# MLA: https://arxiv.org/abs/2405.04434, section 2.1. A head is as wide as published: GPU kernels know no other widths.
_MLA = {
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "head_dim": 64,
    "num_key_value_heads": 4,
}
_GDN = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}


@dataclass(frozen=True)
class Architecture:
    """`config` and `model`: names of Transformers' classes; `router`: globs of modules that stay unquantized.

    text: the checkpoint's prefix of the text model in a wrapper with a vision tower. published: what config.json of
    the published models has beside Transformers' own fields. splits: whether AMD Quark splits the stacked experts;
    else they stay BF16.
    """

    config: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    router: tuple[str, ...] = ()
    is_moe: bool = False
    text: str = ""
    published: dict[str, Any] = field(default_factory=dict)
    splits: bool = True

    def build(self) -> torch.nn.Module:
        """The model in float32 with random weights, the same each time."""
        config_class = getattr(transformers, self.config)
        options = _COMMON | self.options
        if self.text:
            named = {k: v for k, v in options.items() if k in ("vision_config", "tie_word_embeddings")}
            config = config_class(text_config={k: v for k, v in options.items() if k != "vision_config"}, **named)
        else:
            known = inspect.signature(config_class).parameters
            config = config_class(**{k: v for k, v in options.items() if k in known or k in self.options})
        torch.manual_seed(0)
        model = getattr(transformers, self.model)(config).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, param in model.named_parameters():
                _spread(name, param, generator)
            if config.get_text_config().tie_word_embeddings:
                model.get_input_embeddings().weight.mul_(options["hidden_size"] ** -0.5)
        return model


def _spread(name: str, param: torch.Tensor, generator: torch.Generator) -> None:
    """Random values that keep the spread of what passes; channels of different sizes, as real weights have."""
    leaf = name.rpartition(".")[2]
    if leaf in ("A_log", "dt_bias", "e_score_correction_bias", "sinks"):
        return
    if param.dim() < 2:
        if "norm" in name and leaf == "weight":
            noise = torch.rand(param.shape, generator=generator) * 0.4 - 0.2
            param.add_(noise.to(param.dtype))
        elif leaf.endswith("bias"):
            param.copy_(torch.randn(param.shape, generator=generator) * 0.05)
        return
    values = torch.randn(param.shape, generator=generator)
    if "embed" in name:
        param.copy_(values)
        return
    rows = torch.exp2(torch.randint(-1, 2, (*param.shape[:-1], 1), generator=generator).float())
    param.copy_(values * rows * param.shape[-1] ** -0.5)


ARCHITECTURES = {
    "llama": Architecture("LlamaConfig", "LlamaForCausalLM"),
    "llama-tied": Architecture("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "qwen2": Architecture("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": Architecture("Qwen3Config", "Qwen3ForCausalLM"),
    "stablelm": Architecture("StableLmConfig", "StableLmForCausalLM"),
    "qwen2-moe": Architecture(
        "Qwen2MoeConfig", "Qwen2MoeForCausalLM",
        _EXPERTS | {"shared_expert_intermediate_size": 128}, ("*mlp.gate", "*shared_expert_gate"), True,
    ),
    "qwen3-moe": Architecture("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _EXPERTS, ("*mlp.gate",), True),
    "mixtral": Architecture(
        "MixtralConfig", "MixtralForCausalLM",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": None},
        ("*block_sparse_moe.gate",), True,
    ),
    "olmoe": Architecture(
        "OlmoeConfig", "OlmoeForCausalLM", {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64},
        ("*mlp.gate",), True,
    ),
    "glm4-moe": Architecture(
        "Glm4MoeConfig", "Glm4MoeForCausalLM", _ROUTED | _GROUPS | {"use_qk_norm": True}, ("*mlp.gate",), True,
        published={"head_dim": 32},
    ),
    "glm4-moe-lite": Architecture(
        "Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM", _ROUTED | _GROUPS | _MLA, ("*mlp.gate",), True,
        published={"topk_method": "noaux_tc"},
    ),
    "deepseek-v2": Architecture(
        "DeepseekV2Config", "DeepseekV2ForCausalLM",
        _ROUTED | _GROUPS | _MLA | {"topk_method": "group_limited_greedy", "norm_topk_prob": False},
        ("*mlp.gate",), True,
    ),
    "deepseek-v3": Architecture(
        "DeepseekV3Config", "DeepseekV3ForCausalLM", _ROUTED | _GROUPS | _MLA, ("*mlp.gate",), True,
        published={"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    ),
    "minimax-m2": Architecture(
        "MiniMaxM2Config", "MiniMaxM2ForCausalLM",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64, "rotary_dim": 16},
        ("*block_sparse_moe.gate",), True, published={"scoring_func": "sigmoid", "use_routing_bias": True},
    ),
    "ernie-4.5-moe": Architecture(
        "Ernie4_5_MoeConfig", "Ernie4_5_MoeForCausalLM",
        {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 1,
         "moe_layer_start_index": 1, "num_hidden_layers": 3},
        ("*mlp.gate",), True,
    ),
    "dots1": Architecture(
        "Dots1Config", "Dots1ForCausalLM", _ROUTED | _GROUPS, ("*mlp.gate",), True,
        published={"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    ),
    "hunyuan": Architecture(
        "HunYuanMoEV1Config", "HunYuanMoEV1ForCausalLM",
        {"num_experts": 8, "moe_topk": 2, "moe_intermediate_size": 64, "intermediate_size": 64},
        ("*mlp.gate.wg",), True,
        published={"use_mixed_mlp_moe": True, "num_shared_expert": 1, "use_qk_norm": True},
    ),
    "phimoe": Architecture(
        "PhimoeConfig", "PhimoeForCausalLM",
        # vLLM's model has both biases always; one that a checkpoint lacks stays uninitialized memory.
        {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": None,
         "attention_bias": True, "lm_head_bias": True},
        ("*block_sparse_moe.gate",), True, published={"architectures": ["PhiMoEForCausalLM"]},
    ),
    "granite-moe": Architecture(
        "GraniteMoeConfig", "GraniteMoeForCausalLM",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64,
         "attention_multiplier": 32 ** -0.5},
        ("*router*",), True,
    ),
    "llama-4": Architecture(
        "Llama4TextConfig", "Llama4ForCausalLM",
        {"num_local_experts": 8, "num_experts_per_tok": 1, "intermediate_size": 64, "intermediate_size_mlp": 256},
        ("*router",), True,
    ),
    "llama-4-stacked": Architecture(
        "Llama4TextConfig", "Llama4ForCausalLM",
        {"num_local_experts": 8, "num_experts_per_tok": 1, "intermediate_size": 64, "intermediate_size_mlp": 256},
        ("*router",), True, splits=False,
    ),
    "gpt-oss": Architecture(
        "GptOssConfig", "GptOssForCausalLM",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": 64},
        ("*router",), True, splits=False,
    ),
    "qwen3-next": Architecture(
        "Qwen3NextConfig", "Qwen3NextForCausalLM",
        _EXPERTS | _GDN | {"shared_expert_intermediate_size": 128}, ("*mlp.gate", "*shared_expert_gate"), True,
    ),
    "qwen3.5": Architecture(
        "Qwen3_5Config", "Qwen3_5ForConditionalGeneration",
        _GDN | {"vision_config": {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2,
                                  "out_hidden_size": 128}},
        ("*visual*",), False, "model.language_model.",
    ),
    "qwen3.5-moe": Architecture(
        "Qwen3_5MoeConfig", "Qwen3_5MoeForConditionalGeneration",
        _EXPERTS | _GDN | {"shared_expert_intermediate_size": 128,
                           "vision_config": {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2,
                                             "out_hidden_size": 128}},
        ("*visual*", "*mlp.gate", "*shared_expert_gate"), True, "model.language_model.",
    ),
    "gemma-4": Architecture(
        "Gemma4TextConfig", "Gemma4ForCausalLM",
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64, "global_head_dim": 32,
         "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0,
         "tie_word_embeddings": True},
    ),
    "gemma-4-shared": Architecture(
        "Gemma4TextConfig", "Gemma4ForCausalLM",
        {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64, "global_head_dim": 32,
         "hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": VOCABULARY, "num_hidden_layers": 4,
         "num_kv_shared_layers": 2, "tie_word_embeddings": True},
    ),
    "gemma-4-images": Architecture(
        "Gemma4Config", "Gemma4ForConditionalGeneration",
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64, "global_head_dim": 32,
         "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0,
         "tie_word_embeddings": True,
         "vision_config": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
                           "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
                           "position_embedding_size": 64}},
        ("*vision*",), False, "model.language_model.",
    ),
}  # fmt: skip
