"""LLaDA (arXiv 2502.09992): a Llama without a causal mask, under names of its own."""

from __future__ import annotations

from pathlib import Path

from dllm_gym.denoisers.families.base import Family
from dllm_gym.denoisers.families.fields import (
    ROPE_FIELDS,
    SHARED_FIXED,
    require_fields,
    require_known,
    shared_settings,
)

NAMES = {
    "model.embed_tokens": "model.transformer.wte",
    "model.layers": "model.transformer.blocks",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
"""What transformers' Llama calls a module, and what LLaDA calls it."""

FIELDS = "d_model n_layers n_heads vocab_size max_sequence_length rms_norm_eps".split()
FIXED: dict[str, list] = {
    "block_type": ["llama"],
    "block_group_size": [1],
    "activation_type": ["silu"],
    "layer_norm_type": ["rms"],
    "layer_norm_with_affine": [True],
    "bias_for_layer_norm": [False, None],
    "attention_layer_norm": [False],
    "input_emb_norm": [False],
    "include_bias": [False],
    "include_qkv_bias": [False, None],
    "rope": [True],
    "alibi": [False],
    "scale_logits": [False],
    "embedding_dropout": [0.0],
    "residual_dropout": [0.0],
    **SHARED_FIXED,
}
"""What makes a LLaDA config a Llama: the values of the published checkpoints, assumed where a field is absent."""
HARMLESS = {
    *("embedding_size", "mlp_hidden_size", "mlp_ratio", "n_kv_heads", "multi_query_attention", "weight_tying"),
    *("alibi_bias_max", "attention_layer_norm_with_affine", "rope_full_precision", "flash_attention", "precision"),
    *("init_device", "init_fn", "init_std", "init_cutoff_factor"),
}


def read(given: str, folder: Path, raw: dict):
    """The transformers class and config that config.json describes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM, LlamaConfig(**_settings(given, raw), is_causal=False)  # type: ignore[call-arg]


def _settings(given: str, raw: dict) -> dict:
    require_fields(given, raw, FIELDS)
    require_known(given, raw, {*FIELDS, *HARMLESS, *ROPE_FIELDS}, FIXED)
    heads, width = raw["n_heads"], raw["d_model"]
    rows = raw.get("embedding_size") or raw["vocab_size"]  # the embedding may be padded beyond the vocabulary
    if rows < raw["vocab_size"]:
        raise ValueError(f"{given}: embedding_size={rows} is less than vocab_size={raw['vocab_size']}.")
    return {
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": raw.get("mlp_hidden_size") or raw["mlp_ratio"] * width,
        "num_hidden_layers": raw["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": raw.get("n_kv_heads") or (1 if raw.get("multi_query_attention") else heads),
        "max_position_embeddings": raw["max_sequence_length"],
        "rms_norm_eps": raw["rms_norm_eps"],
        "tie_word_embeddings": raw.get("weight_tying", False),
        **shared_settings(given, raw),
    }


LLADA = Family(model_types=("llada",), read=read, names=NAMES, published=True)
