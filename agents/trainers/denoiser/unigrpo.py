"""UniGRPO, of MMaDA (arXiv 2505.15809).

GRPO on the masked tokens of a completion that is masked at a random ratio, the same masks for old, new and reference,
so that over the inner iterations every stage of denoising is trained.

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
class UniGRPOConfig(ratio.RatioConfig):
    """Train the denoiser with UniGRPO."""

    learning_rate: float = 2e-4
    """Peak learning rate; linear warm-up, then a cosine to zero."""
    corruption: CorruptionConfig = field(default_factory=lambda: CorruptionConfig("bernoulli"))
    """How completions are masked."""


def unigrpo_loss(batch: Batch, config: UniGRPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """See `ratio.token_ratio_loss`."""
    return ratio.token_ratio_loss(batch, config.clip, config.kl_weight)


def train(config: UniGRPOConfig) -> Path:
    """Train; see `trainer.train`."""
    return trainer.train("unigrpo", config, unigrpo_loss)
