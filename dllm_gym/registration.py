"""The environments' ids. Entry points are strings, so that registering imports neither torch nor a model."""

from __future__ import annotations

import gymnasium as gym

IDS = {"GSM8K": "gsm8k", "Countdown": "countdown", "Sudoku": "sudoku", "Oracle": "oracle"}
FORMS = {"": None, "-TopK": "topk", "-Threshold": "threshold", "-Position": "position"}
"""Suffix of the id -> form of action and observation, see `dllm_gym.envs.wrappers`."""


def register_all() -> None:
    """Register every ``MaskedDiffusion-{task}{form}-v0``."""
    for name, task in IDS.items():
        kwargs = {"task": task} | ({"denoiser": "oracle"} if task == "oracle" else {})
        gym.register(
            id=f"MaskedDiffusion-{name}-v0",
            entry_point="dllm_gym.envs.unmasking:UnmaskingEnv",
            vector_entry_point="dllm_gym.envs.vector:UnmaskingVectorEnv",
            kwargs=kwargs,
        )
        for suffix, form in FORMS.items():
            if form:
                gym.register(
                    id=f"MaskedDiffusion-{name}{suffix}-v0",
                    entry_point="dllm_gym.envs.wrappers:make_form",
                    kwargs=kwargs | {"form": form},
                )
