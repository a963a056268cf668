"""The networks of the sampler's trainers, whose weights follow from a seed."""

from __future__ import annotations

import torch

from dllm_gym.agents.samplers.policy import Critic, PolicyConfig, UnmaskingPolicy
from dllm_gym.agents.trainers.configs import at_least_one
from dllm_gym.agents.trainers.seeding import seeded


def make_policy_network(config: PolicyConfig, seed: int, device: torch.device) -> UnmaskingPolicy:
    """A fresh policy whose weights follow from the seed."""
    with seeded(seed):
        return UnmaskingPolicy(config).to(device)


def make_critic(config: PolicyConfig, seed: int, device: torch.device) -> Critic:
    """A fresh value network whose weights follow from the seed."""
    with seeded(seed + 1):
        return Critic(config).to(device)


def check_common(config) -> None:
    """Refuse what would fail later, before a trainer writes anything. Raises ValueError."""
    at_least_one(config, "checkpoint_every")
    at_least_one(config.report, "problems", "validation_problems")
    if not config.report.thresholds:
        raise ValueError("report.thresholds is empty: the learned policy is compared with the best of them.")
    if config.policy.confidence_k > config.env.confidence_k:
        raise ValueError(
            f"policy.confidence_k={config.policy.confidence_k}: must be at most env.confidence_k="
            f"{config.env.confidence_k}, what the environment shows."
        )
