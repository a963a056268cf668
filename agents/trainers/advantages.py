"""Group-relative advantages: how much better an episode was than the others on the same problem."""

from __future__ import annotations

import torch
from torch import Tensor

BASELINES = ("group-mean", "leave-one-out")


def group_advantages(reward: Tensor, baseline: str = "group-mean", divide_by_std: bool = False) -> Tensor:
    """``[groups, size]`` rewards -> advantages of the same shape.

    An episode whose reward is not finite is left out: it does not count in the baseline and its advantage is 0.

    Args:
        reward: float32.
        baseline: "group-mean", or "leave-one-out", the mean of the OTHER episodes (unbiased, arXiv 2402.14740).
        divide_by_std: divide by the group's standard deviation (arXiv 2402.03300); weighs easy and hard problems up.

    Raises:
        ValueError: groups of one, whose advantage would always be 0; an unknown baseline.
    """
    check_group(reward.shape[1], baseline)
    valid = reward.isfinite()
    count = valid.sum(dim=1, keepdim=True)
    reward = torch.where(valid, reward.double(), 0.0)  # the mean of equal float32 rewards is then that reward
    mean = reward.sum(dim=1, keepdim=True) / count.clamp(min=1)
    advantage = torch.where(valid, reward - mean, 0.0)
    scale = torch.ones_like(mean)
    if divide_by_std:
        scale = 1 / ((advantage.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt() + 1e-6)
    if baseline == "leave-one-out":
        scale = scale * count / (count - 1).clamp(min=1)
    return (advantage * scale).float()


def scale_negatives(advantage: Tensor, scale: float) -> Tensor:
    """Advantages of any shape, those below 0 times ``scale``."""
    return torch.where(advantage < 0, scale * advantage, advantage)


def check_group(size: int, baseline: str = "group-mean") -> None:
    """Refuse groups without an advantage, and unknown baselines. Raises ValueError."""
    if size < 2:
        raise ValueError(f"group={size}: an advantage relative to the group needs 2 episodes or more.")
    if baseline not in BASELINES:
        raise ValueError(f"baseline={baseline!r}: must be one of {', '.join(BASELINES)}.")
