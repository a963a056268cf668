"""Rewards: the verifier's score against the cost of steps (arXiv 2512.09106, section 3)."""

from __future__ import annotations

from collections.abc import Callable

from dllm_gym.names import find

Reward = Callable[[float, int, int, float], float]
"""``(score, nfe, gen_length, alpha) -> reward`` of a finished episode."""


def multiplicative(score: float, nfe: int, gen_length: int, alpha: float) -> float:
    """``score * ((L - min(NFE, L) + 1) / L) ** alpha``: speed pays only for right answers."""
    return score * ((gen_length - min(nfe, gen_length) + 1) / gen_length) ** alpha


def additive(score: float, nfe: int, gen_length: int, alpha: float) -> float:
    """``score - alpha * NFE / L``: steps cost the same whatever comes of them (the paper's ablation)."""
    return score - alpha * nfe / gen_length


REWARDS: dict[str, Reward] = {"multiplicative": multiplicative, "additive": additive}


def get_reward(reward: str | Reward) -> Reward:
    """A reward by name, in any case, or a callable as it is. Raises ValueError for an unknown name."""
    if callable(reward):
        return reward
    return REWARDS[find(reward, REWARDS, "reward", ", or a callable (score, nfe, gen_length, alpha) -> float")]
