"""Completions and maskings that several test files draw."""

import torch
from torch import Tensor

from dllm_gym.decoding.corruption import Corruption, corrupt

LENGTH = 4


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ending(*lengths: int, length: int) -> Tensor:
    """Completions of so many tokens."""
    return torch.arange(length) < torch.tensor(lengths)[:, None]


def draw(kind: str, completion: Tensor, maskings: int = 4, seed: int = 0, **settings) -> Corruption:
    """After prompts of five tokens, the first two of them padding."""
    prompt_mask = (torch.arange(5) >= 2).expand(len(completion), -1)
    return corrupt(kind, completion, prompt_mask, maskings, seeded(seed), **settings)
