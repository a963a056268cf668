"""wd1: weighted log-likelihood without ratios (arXiv 2507.08838).

The optimum of KL-regularised RL is the old policy reweighted by ``exp(psi * A)``. Within a group of G completions the
good ones are raised with weights ``softmax(psi * A)`` and the bad ones lowered with ``softmax(-psi * A)``:

    loss = -sum_i (w+_i - w-_i) * log p(x_i),   log p the mean over tokens of one fully masked forward pass (d1's).

No old policy is needed. Here the weights are times G, so that they are of the size of an advantage.

Metrics: ``log_prob`` in nats per token; ``weight_size`` mean absolute weight of a completion; of the completions that
are learned from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dllm_gym.agents.trainers.denoiser import trainer
from dllm_gym.agents.trainers.denoiser.objective import Batch, CorruptionConfig, TrainerConfig
from dllm_gym.agents.trainers.denoiser.ratio import mean_scored


@dataclass
class WD1Config(TrainerConfig):
    """Train the denoiser with wd1."""

    corruption: CorruptionConfig = field(
        default_factory=lambda: CorruptionConfig("full", maskings=1, p_mask_prompt=0.15)
    )
    """How completions are masked."""
    psi: float = 1.0
    """Inverse temperature of the weights."""

    def check(self) -> None:
        super().check()
        if self.psi <= 0:
            raise ValueError(f"psi={self.psi}: must be above 0.")

    def advantages(self, reward: Tensor) -> Tensor:
        """``[groups, G]`` rewards -> ``G * (w+ - w-)``; what is not finite is left out of G too."""
        scaled = self.psi * super().advantages(reward)
        out = ~reward.isfinite()
        good, bad = (x.masked_fill(out, -torch.inf).softmax(dim=1).nan_to_num(0.0) for x in (scaled, -scaled))
        return (~out).sum(dim=1, keepdim=True) * (good - bad)

    def learns_from(self, advantage: Tensor) -> Tensor:
        return super().learns_from(advantage) & (advantage != 0)


def wd1_loss(batch: Batch, config: WD1Config) -> tuple[Tensor, dict[str, Tensor]]:
    """``-sum(weight * G (w+ - w-) * log p)``, ``batch.advantage`` being G (w+ - w-)."""
    log_prob = mean_scored(batch.new.log_prob, batch.corruption.scored)
    loss = -(batch.weight * batch.advantage * log_prob).sum()
    return loss, {
        "log_prob": (batch.weight * log_prob).sum(),
        "weight_size": (batch.weight * batch.advantage.abs()).sum(),
    }


def train(config: WD1Config) -> Path:
    """Train; see `trainer.train`."""
    return trainer.train("wd1", config, wd1_loss)
