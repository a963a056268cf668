"""ESPO: PPO's clipped objective on whole completions, with the ELBO as the log-likelihood (arXiv 2512.03759).

A completion is one action: its ratio is ``exp((ELBO - ELBO_old) / n)`` over its n tokens, with the same coupled masks
for both, and the divergence from the reference is k2 on the ELBOs, ``(ELBO - ELBO_ref)^2 / 2n``.

Metrics: ``elbo`` in nats per token; ``clip_fraction`` of completions; ``kl`` to the reference (k2, per token).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from dllm_gym.agents.trainers.denoiser import ratio, trainer
from dllm_gym.agents.trainers.denoiser.objective import Batch, CorruptionConfig, required
from dllm_gym.decoding import likelihood
from dllm_gym.types import Score


@dataclass
class ESPOConfig(ratio.RatioConfig):
    """Train the denoiser with ESPO."""

    corruption: CorruptionConfig = field(default_factory=lambda: CorruptionConfig("coupled"))
    """How completions are masked."""


def espo_loss(batch: Batch, config: ESPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """``-sum(weight * clipped(ratio, A)) + kl_weight * kl``."""

    def elbo(of: Score) -> Tensor:  # [B]
        return likelihood.elbo(of.log_prob, batch.corruption.weight).sum(dim=1)

    new = elbo(batch.new)
    objective, outside = ratio.clipped((new - elbo(required(batch.old))) / batch.length, batch.advantage, config.clip)
    loss = -(batch.weight * objective).sum()
    metrics = {"elbo": (batch.weight * new / batch.length).sum(), "clip_fraction": (batch.weight * outside).sum()}
    if config.kl_weight:
        kl = (batch.weight * 0.5 * (new - elbo(required(batch.reference))).square() / batch.length).sum()
        loss, metrics["kl"] = loss + config.kl_weight * kl, kl
    return loss, metrics


def train(config: ESPOConfig) -> Path:
    """Train; see `trainer.train`."""
    return trainer.train("espo", config, espo_loss)
