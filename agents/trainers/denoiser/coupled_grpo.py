"""Coupled-GRPO, of DiffuCoder (arXiv 2506.20639).

GRPO on token log-probabilities under a mask and its complement: every token is scored exactly once, beside half of the
others on average, at the cost of two forwards.

Deviation: the pair alone, without the published code's third, fully masked forward.

Metrics: ``clip_fraction`` of scored tokens whose ratio is outside [1 - clip, 1 + clip]; ``kl`` to the reference (k3,
per scored token).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from dllm_gym.agents.trainers.denoiser import ratio, trainer
from dllm_gym.agents.trainers.denoiser.objective import Batch, CorruptionConfig


@dataclass
class CoupledGRPOConfig(ratio.RatioConfig):
    """Train the denoiser with coupled-GRPO."""

    learning_rate: float = 2e-4
    """Peak learning rate; linear warm-up, then a cosine to zero."""
    corruption: CorruptionConfig = field(default_factory=lambda: CorruptionConfig("coupled"))
    """How completions are masked."""


def coupled_grpo_loss(batch: Batch, config: CoupledGRPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """See `ratio.token_ratio_loss`."""
    return ratio.token_ratio_loss(batch, config.clip, config.kl_weight)


def train(config: CoupledGRPOConfig) -> Path:
    """Train; see `trainer.train`."""
    return trainer.train("coupled-grpo", config, coupled_grpo_loss)
