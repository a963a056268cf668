"""Dream (arXiv 2508.15487): a Qwen2 without a causal mask, whose column i - 1 predicts token i."""

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

FIELDS = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
]
FIXED: dict[str, list] = {
    "hidden_act": ["silu"],
    "use_sliding_window": [False, None],
    "use_mrope": [False, None],
    **SHARED_FIXED,
}
HARMLESS = {"tie_word_embeddings", "max_window_layers", "sliding_window"}


def read(given: str, folder: Path, raw: dict):
    """The transformers class and config that config.json describes."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM, Qwen2Config(**_settings(given, raw), is_causal=False)  # type: ignore[call-arg]


def _settings(given: str, raw: dict) -> dict:
    require_fields(given, raw, FIELDS)
    require_known(given, raw, {*FIELDS, *HARMLESS, *ROPE_FIELDS}, FIXED)
    tied = raw.get("tie_word_embeddings", False)
    return {name: raw[name] for name in FIELDS} | {"tie_word_embeddings": tied} | shared_settings(given, raw)


DREAM = Family(model_types=("Dream",), read=read, shifted=True, published=True)
