"""What the sampler's trainers share: the environment, the seed of everything drawn, and how they are set up."""

from __future__ import annotations

import functools
import inspect
import math
import random
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch

from dllm_gym.agents.policy import Critic, PolicyConfig, UnmaskingPolicy
from dllm_gym.agents.run import at_least_one
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


def check_common(config) -> None:
    """Refuse what would fail later, before a trainer writes anything. Raises ValueError."""
    at_least_one(config, "checkpoint_every")
    at_least_one(config.report, "problems", "validation_problems")
    if not config.report.thresholds:
        raise ValueError("report.thresholds is empty: the learned policy is compared with the best of them.")
    if config.policy.confidence_k > config.env.confidence_k:
        raise ValueError(
            f"policy.confidence_k={config.policy.confidence_k}: must be no more than env.confidence_k="
            f"{config.env.confidence_k}, what the environment shows."
        )


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


def make_policy_network(config: PolicyConfig, seed: int, device: torch.device) -> UnmaskingPolicy:
    """A fresh policy whose weights follow from the seed."""
    with seeded(seed):
        return UnmaskingPolicy(config).to(device)


def make_critic(config: PolicyConfig, seed: int, device: torch.device) -> Critic:
    """A fresh value network whose weights follow from the seed."""
    with seeded(seed + 1):
        return Critic(config).to(device)


@contextmanager
def seeded(seed: int):
    """Torch's global generator seeded inside: initialisers know no other. Afterwards all global ones are as before."""
    python, legacy = random.getstate(), np.random.get_state()  # Stable-Baselines3 seeds them too
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


def own_threads(train: Callable) -> Callable:
    """A decorator: ``train`` runs with its config's ``threads`` of torch, and leaves as many as it found."""

    @functools.wraps(train)
    def limited(*args, **kwargs):
        threads = inspect.signature(train).bind(*args, **kwargs).arguments["config"].threads
        before = torch.get_num_threads()
        if threads:
            torch.set_num_threads(threads)
        try:
            return train(*args, **kwargs)
        finally:
            torch.set_num_threads(before)

    return limited


def iteration_generators(
    seed: int, iteration: int, device: torch.device
) -> tuple[np.random.Generator, torch.Generator]:
    """Generators that follow from (seed, iteration) alone, so that a resumed run needs no generator state."""
    rng = np.random.default_rng([seed, iteration])
    return rng, torch.Generator(device).manual_seed(int(rng.integers(2**63 - 1)))


def cosine(iteration: int, iterations: int, warmup: int) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine to zero."""
    if iteration < warmup:
        return (iteration + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (iteration - warmup) / max(1, iterations - warmup)))
