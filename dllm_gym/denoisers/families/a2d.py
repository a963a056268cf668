"""A2D: autoregressive Llama, Qwen2 and Qwen3, trained on as masked denoisers without a causal mask (dLLM, A2D models).

Those that were trained with BD3-LM's objective are block-causal; nothing in a checkpoint says so. Give `load_denoiser`
their ``block_size``.
"""

from __future__ import annotations

from pathlib import Path

from dllm_gym.denoisers.families.base import Family
from dllm_gym.denoisers.families.fields import read_as


def read(given: str, folder: Path, raw: dict):
    """The transformers class and config that config.json describes."""
    import transformers

    name = {"a2d-llama": "Llama", "a2d-qwen2": "Qwen2", "a2d-qwen3": "Qwen3"}[raw["model_type"]]
    classes = getattr(transformers, f"{name}ForCausalLM"), getattr(transformers, f"{name}Config")
    return read_as(given, raw, *classes, {"max_window_layers", "sliding_window"})


A2D = Family(model_types=("a2d-llama", "a2d-qwen2", "a2d-qwen3"), read=read, block_causal=True, published=True)
