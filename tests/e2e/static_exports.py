# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Calibrated exports of tiny random models by AMD Quark itself, and what their numbers say.

Run in Quark's environment:

    python static_exports.py OUT

Writes OUT/{moe,dense}-{scheme}: the export, and expected.json with token ids [B, T] and log-probabilities
[B, T, V] of a float32 model on Transformers' own modules whose quantized linear layers are W8A8 as the
export's tensors say: static input scales and zero points (`exact`), experts with per-token ones (`served`),
or give nothing (`blank`: how far off a broken layer is).
"""

import json
import logging
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
SCHEMES = {  # weights, activations symmetric
    "channel-sym": ("per_channel", True),
    "channel-asym": ("per_channel", False),
    "tensor-sym": ("per_tensor", True),
    "tensor-asym": ("per_tensor", False),
}


def build(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "dense":
        return LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16().eval()
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **moe)).bfloat16().eval()


def export(kind: str, scheme: str, out: Path) -> None:
    from quark.torch import ModelQuantizer, export_safetensors
    from quark.torch.quantization.config.config import Int8PerChannelSpec, Int8PerTensorSpec, QConfig, QLayerConfig

    weights, symmetric = SCHEMES[scheme]
    common = {"scale_type": "float", "round_method": "half_even", "is_dynamic": False}
    if weights == "per_channel":
        weight = Int8PerChannelSpec(symmetric=True, ch_axis=0, **common)
    else:
        weight = Int8PerTensorSpec(symmetric=True, observer_method="min_max", **common)
    inputs = Int8PerTensorSpec(symmetric=symmetric, observer_method="min_max", **common)
    config = QConfig(
        global_quant_config=QLayerConfig(
            weight=weight.to_quantization_spec(), input_tensors=inputs.to_quantization_spec()
        ),
        exclude=["*lm_head", "*mlp.gate"],
    )
    model = build(kind)
    calibration = [torch.randint(2, 128, (2, 64)) for _ in range(8)]
    quantizer = ModelQuantizer(config)
    model = quantizer.freeze(quantizer.quantize_model(model, calibration))
    with torch.no_grad():
        export_safetensors(model, str(out))


class W8A8(torch.nn.Module):
    """x W^T with INT8 weight [N, K]; static scale and zero point, or (scale None) one scale per token."""

    def __init__(self, weight, scale, input_scale, input_zero_point):
        super().__init__()
        self.weight = weight.float() * scale.float().reshape(-1, 1)
        self.scale, self.zero = input_scale, input_zero_point

    def forward(self, x):
        if self.scale is False:
            return x @ self.weight.t() * 0
        if self.scale is None:
            s, z = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127, 0
        else:
            s, z = self.scale.float(), 0 if self.zero is None else self.zero.float()
        return (((x / s).round() + z).clamp(-128, 127) - z) * s @ self.weight.t()


def expect(kind: str, out: Path) -> None:
    tensors = {k: v for f in out.glob("*.safetensors") for k, v in load_file(f).items()}
    ids = torch.randint(2, 128, (4, 48), generator=torch.Generator().manual_seed(1))
    page = {"ids": ids.tolist()}
    for reading in ("exact", "served", "blank"):
        model = build(kind).float()
        with torch.no_grad():
            for name, module in list(model.named_modules()):
                if f"{name}.weight" in tensors and f"{name}.weight_scale" not in tensors:
                    module.weight.copy_(tensors[f"{name}.weight"].float())
            for name in [n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")]:
                static = None if reading == "served" and ".experts." in name else tensors[f"{name}.input_scale"]
                static = False if reading == "blank" else static
                zero = tensors.get(f"{name}.input_zero_point")
                parent, _, child = name.rpartition(".")
                layer = W8A8(tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"], static, zero)
                setattr(model.get_submodule(parent), child, layer)
            page[reading] = model(ids).logits.log_softmax(-1).tolist()
    (out / "expected.json").write_text(json.dumps(page))


def main() -> None:
    logging.disable(logging.WARNING)
    out = Path(sys.argv[1])
    for kind in ("moe", "dense"):
        for scheme in SCHEMES:
            folder = out / f"{kind}-{scheme}"
            export(kind, scheme, folder)
            expect(kind, folder)
            print(folder)


if __name__ == "__main__":
    main()
