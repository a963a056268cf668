"""ELBO policy gradient: the plain baseline. ``-A * ELBO`` for good and bad completions alike.

SPG (arXiv 2510.09541) with the lower bound on both sides; what it shows is why SPG bounds bad completions from above.

Metrics: ``elbo`` in nats per token of the completion, of the completions that are learned from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dllm_gym.agents.trainers.denoiser import trainer
from dllm_gym.agents.trainers.denoiser.objective import Batch, TrainerConfig
from dllm_gym.decoding import likelihood


@dataclass
class ELBOPGConfig(TrainerConfig):
    """Train the denoiser with the ELBO policy gradient."""

    learning_rate: float = 3e-5
    """Peak learning rate; linear warm-up, then a cosine to zero."""

    def learns_from(self, advantage: Tensor) -> Tensor:
        return super().learns_from(advantage) & (advantage != 0)


def elbo_pg_loss(batch: Batch, config: ELBOPGConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """``-sum(weight * A * ELBO / L)``."""
    elbo = likelihood.elbo(batch.new.log_prob, batch.corruption.weight).sum(dim=1)
    loss = -(batch.weight * batch.advantage * elbo).sum() / batch.new.log_prob.shape[-1]
    return loss, {"elbo": (batch.weight * elbo / batch.length).sum()}


def train(config: ELBOPGConfig) -> Path:
    """Train; see `trainer.train`."""
    return trainer.train("elbo-pg", config, elbo_pg_loss)
