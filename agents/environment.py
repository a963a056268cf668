"""Environments as configs name them."""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium as gym

from dllm_gym.envs.vector import UnmaskingVectorEnv
from dllm_gym.names import find


@dataclass
class EnvConfig:
    """The environment that a sampler is trained in."""

    id: str = "MaskedDiffusion-GSM8K-v0"
    """Registered id of a set-of-positions environment."""
    denoiser: str | None = None
    """"embedded", "embedded-early", a hub id or a local folder; None: the id's own, which is "embedded" but for the
    oracle."""
    dataset: str | None = None
    """None, "embedded", "hub", a hub id, or a local file; used for training and testing with their splits."""
    prompt_template: str | None = None
    """Path of a text file with {question} in it, for real data; None: the task's own prompt."""
    few_shot: int = 0
    """Worked examples before every question, for real data."""
    allow_code_execution: bool = False
    """Must be True for tasks whose verifier runs the completion."""
    gen_length: int | None = None
    """Tokens of a completion; None: the task's."""
    block_length: int | None = None
    """None: full diffusion."""
    temperature: float = 0.0
    """Of the token choice."""
    confidence_k: int = 1
    """Probabilities per position."""
    reward: str = "multiplicative"
    """"multiplicative" or "additive"."""
    alpha: float = 1.0
    """Weight of the cost of steps."""
    num_envs: int = 128
    """Rows decoded together."""
    device: str = "auto"
    """"auto", "cpu", "cuda"."""
    dtype: str = "auto"
    """Of the denoiser: "auto" (float32 on a CPU), "float32", "bfloat16" (2x faster where the CPU has bf16 units)."""

    @property
    def denoiser_name(self) -> str:
        """The denoiser that is used."""
        return self.denoiser or env_spec(self.id).kwargs.get("denoiser", "embedded")


def make_env(config: EnvConfig, split: str = "train", **changes) -> UnmaskingVectorEnv:
    """The vector environment of a config, on one split; its denoiser may be an object instead of a name.

    Raises:
        ValueError: an id that is not registered, or not one whose action is a set of positions.
    """
    settings = vars(config) | {"id": env_spec(config.id).id, "denoiser": config.denoiser_name, "split": split} | changes
    return gym.make_vec(settings.pop("id"), **settings)


def env_spec(env_id: str):
    """Gymnasium's spec of an id, in any case, whose action is a set of positions. Raises ValueError: no such id."""
    import dllm_gym  # noqa: F401  (registers the ids)

    ours = {i: s for i, s in gym.registry.items() if i.startswith("MaskedDiffusion-") and s.vector_entry_point}
    known = {i: s for i, s in ours.items() if "form" not in s.kwargs}
    return known[find(env_id, known, "env.id", ", whose action is a set of positions")]
