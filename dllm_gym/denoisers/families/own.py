"""Transformers' own Llama, Qwen2 and Qwen3 with ``is_causal`` false: what this project trains and saves."""

from __future__ import annotations

from pathlib import Path

from dllm_gym.denoisers.families.base import Family
from dllm_gym.denoisers.families.fields import require_known

FIXED: dict[str, list] = {"quantization_config": [None], "use_sliding_window": [False, None]}


def read(given: str, folder: Path, raw: dict):
    """The transformers class and config that config.json describes. Raises ValueError for a causal model."""
    import transformers

    if raw.get("is_causal", True):
        raise ValueError(
            f"{given}, is_causal={raw.get('is_causal', True)}: a causal language model; 'llama', "
            f"'qwen2' and 'qwen3' can be read with is_causal false, as `train_policy.py sft` and "
            f"`PretrainedDenoiser.save` write it."
        )
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[raw["model_type"]]
    model_class = getattr(transformers, f"{name}ForCausalLM")
    config_class = getattr(transformers, f"{name}Config")
    require_known(given, raw, {*config_class().to_dict(), "rope_scaling", "rope_theta"}, FIXED)
    return model_class, config_class.from_pretrained(folder, local_files_only=True)


OWN = Family(model_types=("llama", "qwen2", "qwen3"), read=read, block_causal=True)
