"""Transformers' own Llama and Qwen2 with ``is_causal`` false: what this project trains and saves."""

from __future__ import annotations

from pathlib import Path

from dllm_gym.denoisers.families.base import Family
from dllm_gym.denoisers.families.fields import require_known

FIXED: dict[str, list] = {"quantization_config": [None], "use_sliding_window": [False, None]}


def read(given: str, folder: Path, raw: dict):
    """The transformers class and config that config.json describes. Raises ValueError for a causal model."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    if raw.get("is_causal", True):
        raise ValueError(
            f"{given}, is_causal={raw.get('is_causal', True)}: a causal language model; 'llama' and 'qwen2' can be "
            f"read with is_causal false, as `train_policy.py sft` and `PretrainedDenoiser.save` write it."
        )
    classes: dict[str, tuple] = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}
    model_class, config_class = classes[raw["model_type"]]
    require_known(given, raw, {*config_class().to_dict(), "rope_scaling", "rope_theta"}, FIXED)
    return model_class, config_class.from_pretrained(folder, local_files_only=True)


BIDIRECTIONAL = Family(model_types=("llama", "qwen2"), read=read)
