"""SDAR (arXiv 2510.06303) and TraDo (arXiv 2509.06949): a block-causal Qwen3, whose column i predicts token i."""

from __future__ import annotations

from pathlib import Path

from dllm_gym.denoisers.families.base import Family
from dllm_gym.denoisers.families.fields import read_as

HARMLESS = {
    *("attn_implementation", "debug", "ep_size", "fuse_cross_entropy", "micro_forward", "skip_checkpoint"),
    *("use_deepep", "max_window_layers", "sliding_window"),
}


def read(given: str, folder: Path, raw: dict):
    """The transformers class and config that config.json describes."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return read_as(given, raw, Qwen3ForCausalLM, Qwen3Config, HARMLESS)


SDAR = Family(
    model_types=("sdar",),
    read=read,
    attention_pattern="block-causal",
    block_causal=True,
    block_size=4,  # of the common checkpoints, whose config.json may not say it
    published=True,
)
