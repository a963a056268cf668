"""The forward pass of every family, written out: what the denoisers are compared with."""

import json

import torch
from safetensors.torch import load_file
from torch.nn import functional as F


def some_tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed))


def reference(
    folder,
    tokens: torch.Tensor,
    visible: torch.Tensor | None = None,
    *,
    start: int = 0,
    kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> torch.Tensor:
    """Logits ``[W, V]`` of the token at each position, as the original code computes them, in float64.

    Args:
        tokens: ``[W]``, of the whole row, or of the positions from ``start`` on.
        visible: ``[W, W]`` bool, which position sees which; None: every position sees every other.
        kept: keys and values of the whole row at each layer. An empty list is filled; else its entries from ``start``
            on are replaced by those of ``tokens``, which attend to all.
    """
    config = json.loads((folder / "config.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    weights = {name: weight.double() for file in files for name, weight in load_file(file).items()}
    if config["model_type"] == "llada":
        layers, heads, groups = config["n_layers"], config["n_heads"], config["n_kv_heads"]
        block, embed, norm, head = (
            "model.transformer.blocks.{}.",
            *(f"model.transformer.{name}" for name in ("wte", "ln_f", "ff_out")),
        )
        before, after = "attn_norm", "ff_norm"
        q, k, v, o, gate, up, down = "q_proj k_proj v_proj attn_out ff_proj up_proj ff_out".split()
    else:
        layers, heads, groups = (
            config[f"num_{name}"] for name in ("hidden_layers", "attention_heads", "key_value_heads")
        )
        block, embed, norm, head = "model.layers.{}.", "model.embed_tokens", "model.norm", "lm_head"
        before, after = "input_layernorm", "post_attention_layernorm"
        q, k, v, o = (f"self_attn.{name}_proj" for name in "qkvo")
        gate, up, down = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def rms_norm(x, name):
        return x * (x.pow(2).mean(dim=-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * weights[f"{name}.weight"]

    x = weights[f"{embed}.weight"][tokens]
    length, width = x.shape
    size = config.get("head_dim") or width // heads
    visible = torch.ones(length, 1, dtype=torch.bool) if visible is None else visible
    angles = torch.outer(
        torch.arange(start, start + length).double(),
        config["rope_theta"] ** -(torch.arange(0, size, 2).double() / size),
    )
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def rotate(x):
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], dim=-1) * sin

    def split(x, count):
        return x.view(length, count, size).transpose(0, 1).repeat_interleave(heads // count, dim=0)

    for layer in range(layers):
        at = block.format(layer)
        y = rms_norm(x, at + before)
        queries, keys = split(linear(y, at + q), heads), split(linear(y, at + k), groups)
        if f"{at}self_attn.q_norm.weight" in weights:
            queries, keys = rms_norm(queries, at + "self_attn.q_norm"), rms_norm(keys, at + "self_attn.k_norm")
        keys, values = rotate(keys), split(linear(y, at + v), groups)
        if kept is not None and len(kept) == layer:
            kept.append((keys.clone(), values.clone()))
        elif kept is not None:
            for whole, part in zip(kept[layer], (keys, values), strict=True):
                whole[:, start : start + length] = part
            keys, values = kept[layer]
        scores = rotate(queries) @ keys.transpose(1, 2) / size**0.5
        attention = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
        x = x + linear((attention @ values).transpose(0, 1).reshape(length, heads * size), at + o)
        y = rms_norm(x, at + after)
        x = x + linear(F.silu(linear(y, at + gate)) * linear(y, at + up), at + down)
    logits = linear(rms_norm(x, norm), head if f"{head}.weight" in weights else embed)
    return torch.cat([logits[:1], logits[:-1]]) if config["model_type"] == "Dream" else logits


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=0, atol=tolerance)
