"""The environments' ids. Entry points are strings, so that registering imports neither torch nor a model."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

IDS: dict[str, dict[str, Any]] = {
    "GSM8K": {"task": "gsm8k"},
    "MATH500": {"task": "math500", "split": "test"},
    "AIME24": {"task": "aime24", "split": "test"},
    "AIME25": {"task": "aime25", "split": "test"},
    "HumanEval": {"task": "humaneval", "split": "test"},
    "MBPP": {"task": "mbpp"},
    "Countdown": {"task": "countdown"},
    "Sudoku": {"task": "sudoku"},
    "Mixture": {"task": "gsm8k,countdown"},
    "Oracle": {"task": "oracle", "denoiser": "oracle"},
}
"""Name of the id -> its defaults. Benchmarks without training problems are made with those they have."""
FORMS = {"-TopK": "topk", "-Threshold": "threshold", "-Position": "position"}
"""Suffix of the id -> form of action and observation, see `dllm_gym.envs.wrappers`."""


def register_all() -> None:
    """Register every ``MaskedDiffusion-{task}{form}-v0``."""
    for name, kwargs in IDS.items():
        gym.register(
            id=f"MaskedDiffusion-{name}-v0",
            entry_point="dllm_gym.envs.unmasking:UnmaskingEnv",
            vector_entry_point="dllm_gym.envs.vector:UnmaskingVectorEnv",
            kwargs=kwargs,
        )
        for suffix, form in FORMS.items():
            gym.register(
                id=f"MaskedDiffusion-{name}{suffix}-v0",
                entry_point="dllm_gym.envs.wrappers:make_form",
                vector_entry_point="dllm_gym.envs.wrappers:make_vector_form",
                kwargs=kwargs | {"form": form},
            )
