"""What the tests of policies share: a tiny one, and what it sees."""

from dataclasses import replace
from pathlib import Path

import torch

from dllm_gym.agents.samplers.policy import PolicyConfig, UnmaskingPolicy
from dllm_gym.agents.trainers.policy.networks import make_policy_network
from dllm_gym.types import Observation

TINY = PolicyConfig(hidden_dim=16, mlp_dim=32)


def see(rows: int = 5, length: int = 8, k: int = 1, seed: int = 0) -> Observation:
    """A random observation whose first row has nothing eligible."""
    generator = torch.Generator().manual_seed(seed)
    eligible = torch.rand(rows, length, generator=generator) < 0.7
    eligible[0] = False
    eligible[1:, 0] = True
    confidence = torch.rand(rows, length, k, generator=generator).sort(dim=-1, descending=True).values
    zeros = torch.zeros(rows, length)
    progress = torch.rand(rows, generator=generator)
    return Observation(confidence, zeros, zeros.long(), eligible.clone(), eligible, progress, zeros)


def tiny_policy(seed: int = 0, **changes) -> UnmaskingPolicy:
    return make_policy_network(replace(TINY, **changes), seed, torch.device("cpu")).seeded(seed)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
