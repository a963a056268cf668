"""Importance ratios and divergences that several objectives share; the functions are pure, of scores ``[n, B, L]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dllm_gym.agents.trainers.denoiser.objective import Batch, TrainerConfig, required
from dllm_gym.types import Score


@dataclass
class RatioConfig(TrainerConfig):
    """What objectives with a clipped ratio of new to old share."""

    clip: float = 0.2
    """The probability ratio of a token or of a completion is clipped to [1 - clip, 1 + clip]."""
    kl_weight: float = 0.01
    """Weight of the divergence from the reference."""

    uses_old: ClassVar[bool] = True

    @property
    def uses_reference(self) -> bool:
        return self.kl_weight > 0

    def check(self) -> None:
        super().check()
        if self.clip <= 0 or self.kl_weight < 0:
            raise ValueError(
                f"clip={self.clip}, kl_weight={self.kl_weight}: clip must be above 0, kl_weight 0 or more."
            )


def mean_scored(values: Tensor, scored: Tensor) -> Tensor:
    """``[n, B, L]`` -> ``[B]``: mean over a completion's scored tokens in all its maskings, 0 where there is none."""
    return (values * scored).sum(dim=(0, 2)) / scored.sum(dim=(0, 2)).clamp(min=1)


def k2(new: Score, reference: Score, scored: Tensor) -> Tensor:
    """Half the squared difference of log-probabilities, mean per scored token, ``[B]``: near 0 it is the KL divergence.

    Its gradient is that of the KL divergence from tokens that the denoiser itself sampled.
    """
    return mean_scored(0.5 * (new.log_prob - reference.log_prob).square(), scored)


def k3(new: Score, reference: Score, scored: Tensor) -> Tensor:
    """``exp(d) - d - 1`` with d = reference - new, mean per scored token, ``[B]``: GRPO's divergence."""
    difference = reference.log_prob - new.log_prob
    return mean_scored(difference.exp() - difference - 1, scored)


def clipped(log_ratio: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped objective, to be maximised, and where the ratio is outside [1 - clip, 1 + clip] (float)."""
    ratio = log_ratio.exp()
    objective = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return objective, ((ratio - 1).abs() > clip).float()


def token_ratio_loss(batch: Batch, clip: float, kl_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO's loss on the scored tokens: a completion's mean of clipped token ratios, and of ``k3`` to the reference."""
    scored = batch.corruption.scored
    objective, outside = clipped(batch.new.log_prob - required(batch.old).log_prob, batch.advantage[:, None], clip)
    loss = -(batch.weight * mean_scored(objective, scored)).sum()
    metrics = {"clip_fraction": (batch.weight * mean_scored(outside, scored)).sum()}
    if kl_weight:
        kl = (batch.weight * k3(batch.new, required(batch.reference), scored)).sum()
        loss, metrics["kl"] = loss + kl_weight * kl, kl
    return loss, metrics
