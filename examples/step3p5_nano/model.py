# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Step-3.5 in plain PyTorch: the float reference that decides what is right.

No vLLM in here. The module tree carries the checkpoint's own names, so a state dict is a
checkpoint. `load` reads BF16 and Quark INT8 checkpoints (stacked or per expert); INT8 layers then
compute what their numbers say: W8A8 with per-channel weight scales and dynamic per-token
activations, evaluated in the dtype of the model (float64 for an oracle).

Architecture: Step-3.5-Flash's config.json (stepfun-ai), Apache-2.0.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fake_quant_per_token(x: Tensor) -> Tensor:
    """Round `x` [..., K] to its symmetric INT8 grid, one scale per row (amax / 127)."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, 1)
    return (x / scale).round().clamp(-128, 127) * scale


class Norm(nn.Module):
    """RMS norm with a zero-centred weight: y = x / rms(x) * (1 + weight)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        y = x.to(wide)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * (1 + self.weight.to(wide))).to(x.dtype)


class Linear(nn.Module):
    """y = x W^T, W [N, K]; `quantized` makes it W8A8 (see `load`)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        bound = in_features**-0.5
        self.weight = nn.Parameter(torch.empty(out_features, in_features).uniform_(-bound, bound))
        self.quantized = False

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(fake_quant_per_token(x) if self.quantized else x, self.weight)


class StackedLinear(nn.Module):
    """The same projection of every expert: W [E, N, K]."""

    def __init__(self, experts: int, in_features: int, out_features: int):
        super().__init__()
        bound = in_features**-0.5
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features).uniform_(-bound, bound))
        self.quantized = False


def swiglu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """silu(gate) * up; with a limit, silu(gate) is capped and up clipped ("swiglustep")."""
    gate = F.silu(gate)
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * up


class MLP(nn.Module):
    def __init__(self, hidden: int, width: int, limit: float | None):
        super().__init__()
        self.gate_proj = Linear(hidden, width)
        self.up_proj = Linear(hidden, width)
        self.down_proj = Linear(width, hidden)
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), self.limit))


class MoE(nn.Module):
    """Sigmoid router with a selection bias; the chosen scores are renormalised and scaled."""

    router_bias: Tensor

    def __init__(self, cfg: dict[str, Any], limit: float | None):
        super().__init__()
        hidden, experts, width = cfg["hidden_size"], cfg["moe_num_experts"], cfg["moe_intermediate_size"]
        self.gate = Linear(hidden, experts)
        self.register_buffer("router_bias", torch.zeros(experts))
        self.gate_proj = StackedLinear(experts, hidden, width)
        self.up_proj = StackedLinear(experts, hidden, width)
        self.down_proj = StackedLinear(experts, width, hidden)
        self.top_k, self.scaling, self.limit = cfg["moe_top_k"], cfg["moe_router_scaling_factor"], limit
        self.load: Tensor | None = None  # how often each expert was chosen in the last call

    def route(self, x: Tensor) -> Tensor:
        """Weights [T, E] of each expert for each token, zero where it was not chosen."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            score = F.linear(x.to(wide), self.gate.weight.to(wide)).sigmoid()
            chosen = (score + self.router_bias.to(wide)).topk(self.top_k, dim=-1).indices
            mask = torch.zeros_like(score).scatter_(-1, chosen, 1)
            kept = score * mask
            self.load = mask.detach().sum(0)
            return kept / kept.sum(-1, keepdim=True) * self.scaling

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        weight = self.route(x)
        experts, width, hidden = self.gate_proj.weight.shape
        # All experts on all tokens: one wide matmul, unchosen experts weighted with zero.
        xq = fake_quant_per_token(x) if self.gate_proj.quantized else x
        gate = F.linear(xq, self.gate_proj.weight.reshape(-1, hidden))
        up = F.linear(xq, self.up_proj.weight.reshape(-1, hidden))
        act = swiglu(gate, up, self.limit).view(-1, experts, width)
        if self.down_proj.quantized:
            act = fake_quant_per_token(act)
        act = act * weight.to(act.dtype).unsqueeze(-1)
        down = self.down_proj.weight.transpose(1, 2).reshape(-1, hidden)
        return (act.flatten(1) @ down.to(act.dtype)).view(shape)


def rope_frequencies(cfg: dict[str, Any], layer: int, rotary: int) -> Tensor:
    """Inverse wavelengths [rotary / 2], llama3-scaled where the layer's type asks for it.

    llama3 scaling: long waves are slowed by `factor`, short ones kept, those between blended
    (Llama 3.1 model card; transformers' `_compute_llama3_parameters`).
    """
    theta = cfg["rope_theta"][layer] if isinstance(cfg["rope_theta"], list) else cfg["rope_theta"]
    freq = theta ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / rotary)
    scaling = cfg.get("rope_scaling")
    kinds = cfg.get("yarn_only_types")
    if not scaling or (kinds and cfg["layer_types"][layer] not in kinds):
        return freq
    turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return freq * keep + freq / scaling["factor"] * (1 - keep)


class Attention(nn.Module):
    angle: Tensor

    def __init__(self, cfg: dict[str, Any], layer: int):
        super().__init__()
        sliding_setting = cfg["attention_other_setting"]
        sliding = cfg["layer_types"][layer] == sliding_setting["attention_type"]
        source = sliding_setting if sliding else cfg
        self.heads, self.groups = source["num_attention_heads"], source["num_attention_groups"]
        self.dim, self.window = source["head_dim"], cfg["sliding_window"] if sliding else None
        hidden, eps = cfg["hidden_size"], cfg["rms_norm_eps"]
        self.q_proj = Linear(hidden, self.heads * self.dim)
        self.k_proj = Linear(hidden, self.groups * self.dim)
        self.v_proj = Linear(hidden, self.groups * self.dim)
        self.g_proj = Linear(hidden, self.heads)
        self.o_proj = Linear(self.heads * self.dim, hidden)
        self.q_norm, self.k_norm = Norm(self.dim, eps), Norm(self.dim, eps)
        self.rotary = int(self.dim * cfg["partial_rotary_factors"][layer])
        freq = rope_frequencies(cfg, layer, self.rotary)
        angle = torch.arange(cfg["max_position_embeddings"], dtype=torch.float64)[:, None] * freq
        self.register_buffer("angle", angle, persistent=False)

    def rope(self, x: Tensor) -> Tensor:
        angle = self.angle[: x.shape[1], None]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x[..., : self.rotary].chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., self.rotary :]), -1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.rope(self.q_norm(self.q_proj(x).view(batch, length, self.heads, self.dim)))
        k = self.rope(self.k_norm(self.k_proj(x).view(batch, length, self.groups, self.dim)))
        v = self.v_proj(x).view(batch, length, self.groups, self.dim)
        repeat = self.heads // self.groups
        q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)))
        if self.window is None:
            out = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True)
        else:
            gap = torch.arange(length, device=x.device)
            gap = gap[:, None] - gap
            mask = (gap >= 0) & (gap < self.window)
            out = F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=mask)
        out = out.transpose(1, 2) * self.g_proj(x).sigmoid().unsqueeze(-1)
        return self.o_proj(out.flatten(2))


class Layer(nn.Module):
    def __init__(self, cfg: dict[str, Any], index: int):
        super().__init__()
        hidden, eps = cfg["hidden_size"], cfg["rms_norm_eps"]
        self.self_attn = Attention(cfg, index)
        self.input_layernorm = Norm(hidden, eps)
        self.post_attention_layernorm = Norm(hidden, eps)
        if index in {int(i) for i in cfg["moe_layers_enum"].split(",")}:
            self.moe = MoE(cfg, cfg["swiglu_limits"][index])
            self.share_expert = MLP(hidden, cfg["share_expert_dim"], cfg["swiglu_limits_shared"][index])
        else:
            self.mlp = MLP(hidden, cfg["intermediate_size"], cfg["swiglu_limits_shared"][index])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        y = self.post_attention_layernorm(x)
        return x + (self.moe(y) + self.share_expert(y) if hasattr(self, "moe") else self.mlp(y))


class SharedHead(nn.Module):
    def __init__(self, cfg: dict[str, Any], output: Linear):
        super().__init__()
        self.norm = Norm(cfg["hidden_size"], cfg["rms_norm_eps"])
        self.output = output


class MTPLayer(Layer):
    """Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, 2.2): one more decoder layer that sees
    the hidden states [B, T, H] before it and the embeddings [B, T, H] of the token after each."""

    def __init__(self, cfg: dict[str, Any], index: int, output: Linear):
        super().__init__(cfg, index)
        hidden, eps = cfg["hidden_size"], cfg["rms_norm_eps"]
        self.enorm, self.hnorm = Norm(hidden, eps), Norm(hidden, eps)
        self.eh_proj = Linear(2 * hidden, hidden)
        self.shared_head = SharedHead(cfg, output)

    def forward(self, hidden: Tensor, embeds: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(self.eh_proj(torch.cat((self.enorm(embeds), self.hnorm(hidden)), -1)))


class Backbone(nn.Module):
    """What the checkpoint's names put below `model`."""

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: Norm


class Step3p5(nn.Module):
    """Logits [B, T, V] from token ids [B, T]; `cfg` is config.json as a dict."""

    def __init__(self, cfg: dict[str, Any]):
        super().__init__()
        self.cfg = cfg
        self.model = Backbone()
        self.model.embed_tokens = nn.Embedding(cfg["vocab_size"], cfg["hidden_size"])
        self.depth = cfg["num_hidden_layers"]
        self.lm_head = Linear(cfg["hidden_size"], cfg["vocab_size"])
        self.model.layers = nn.ModuleList(Layer(cfg, i) for i in range(self.depth))
        # The heads of the MTP layers are the model's own, written once per layer as Step-3.5 does.
        self.model.layers.extend(
            MTPLayer(cfg, self.depth + i, self.lm_head) for i in range(cfg.get("num_nextn_predict_layers", 0))
        )
        self.model.norm = Norm(cfg["hidden_size"], cfg["rms_norm_eps"])

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers[: self.depth]:
            x = layer(x)
        return x

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.model.norm(self.hidden(ids)))

    def all_logits(self, ids: Tensor) -> list[Tensor]:
        """The model's logits [B, T, V], then each MTP layer's: layer k's [B, T - k - 1, V] at t
        predict token t + k + 2."""
        x = self.hidden(ids)
        logits = [self.lm_head(self.model.norm(x))]
        for k, layer in enumerate(self.model.layers[self.depth :]):
            x = layer(x[:, :-1], self.model.embed_tokens(ids[:, k + 1 :]))
            head = layer.shared_head
            assert isinstance(head, SharedHead)
            logits.append(head.output(head.norm(x)))
        return logits


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> Step3p5:
    """The reference for the checkpoint in `folder`, its matmuls in `dtype`.

    BF16 weights are widened. A layer with a `weight_scale` ([N], [N, 1], or [E, N] stacked; per
    expert too) is dequantized and quantizes its activations per token. Raises ValueError naming
    tensors that are missing or that no layer takes.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    model = Step3p5(json.loads((folder / "config.json").read_text())).to(dtype)
    for name, module in model.named_modules():
        if isinstance(module, StackedLinear) and f"{name}.weight" not in tensors:
            stem, proj = name.rsplit(".", 1)
            for key in ("weight", "weight_scale"):
                parts = [tensors.pop(f"{stem}.experts.{e}.{proj}.{key}", None) for e in range(len(module.weight))]
                present = [p for p in parts if p is not None]
                if len(present) == len(parts):
                    tensors[f"{name}.{key}"] = torch.stack(present)
        if isinstance(module, (Linear, StackedLinear)):
            scale = tensors.pop(f"{name}.weight_scale", None)
            if scale is not None:
                weight = tensors[f"{name}.weight"].to(dtype)
                tensors[f"{name}.weight"] = weight * scale.to(dtype).reshape(*weight.shape[:-1], 1)
                module.quantized = True
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if missing or unexpected:
        raise ValueError(f"{folder}: missing {missing[:4]}, not taken {unexpected[:4]}")
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def evaluate(model: Step3p5, windows: Tensor) -> tuple[float, Tensor]:
    """Perplexity per predicted token over `windows` [B, T], and the top-1 ids [B, T - 1]."""
    loss, top = 0.0, []
    for ids in windows.split(8):
        logits = model(ids)[:, :-1]
        loss += F.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten(), reduction="sum").item()
        top.append(logits.argmax(-1))
    return math.exp(loss / windows[:, 1:].numel()), torch.cat(top)


@torch.inference_mode()
def acceptance(model: Step3p5, windows: Tensor) -> float:
    """Share of positions of `windows` [B, T] where the first MTP layer's best token is the model's own next one."""
    matches = []
    for ids in windows.split(8):
        main, draft, *_ = model.all_logits(ids)
        matches.append(draft.argmax(-1) == main[:, 1:].argmax(-1))
    return torch.cat(matches).float().mean().item()


@torch.inference_mode()
def generate(model: Step3p5, ids: list[int], count: int) -> list[int]:
    """Greedy continuation of `ids` by `count` tokens."""
    out = list(ids)
    for _ in range(count):
        out.append(int(model(torch.tensor([out], device=model.lm_head.weight.device))[0, -1].argmax()))
    return out[len(ids) :]
