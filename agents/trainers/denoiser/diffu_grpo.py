"""diffu-GRPO, of d1 (arXiv 2504.12216).

GRPO on token log-probabilities of one fully masked forward pass, the prompt's tokens masked with probability 0.15 so
that inner iterations differ. Cheap, and biased: no token sees another of its completion.

Deviations: 4 inner iterations by default instead of 12; tokens are averaged within a completion first, as in GRPO's
paper, where the published code averages all tokens of a batch.

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
class DiffuGRPOConfig(ratio.RatioConfig):
    """Train the denoiser with diffu-GRPO."""

    learning_rate: float = 3e-4
    """Peak learning rate; linear warm-up, then a cosine to zero."""
    corruption: CorruptionConfig = field(
        default_factory=lambda: CorruptionConfig("full", maskings=1, p_mask_prompt=0.15)
    )
    """How completions are masked."""
    inner_iterations: int = 4
    """Number of updates per batch; each draws its own masks."""
    clip: float = 0.5
    """Each token's probability ratio is clipped to [1 - clip, 1 + clip]."""
    kl_weight: float = 0.04
    """Weight of the divergence from the reference."""


def diffu_grpo_loss(batch: Batch, config: DiffuGRPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """See `ratio.token_ratio_loss`."""
    return ratio.token_ratio_loss(batch, config.clip, config.kl_weight)


def train(config: DiffuGRPOConfig) -> Path:
    """Train; see `trainer.train`."""
    return trainer.train("diffu-grpo", config, diffu_grpo_loss)
