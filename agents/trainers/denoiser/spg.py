"""SPG, the sandwiched policy gradient (arXiv 2510.09541).

Raise a lower bound of the likelihood where a completion did better than its group, lower an upper bound where it did
worse: ``-A * ELBO`` for A > 0, ``-A * (omega * EUBO + (1 - omega) * ELBO)`` otherwise. Lowering the ELBO of a bad
completion is easy and need not lower its likelihood: the bound has no floor, and a few large negative terms destroy a
denoiser. The EUBO's gradient weighs a token's maskings by how likely they make it, and so vanishes where it should.
No ratio, no clip, no KL.

Deviations: surrogates are divided by the canvas length L, one constant for all completions (the published code
normalises by scored tokens, then weights by length, which comes to the same up to the batch's mean length).

Metrics: ``elbo``, ``surrogate`` in nats per token of the completion, of the completions that are learned from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dllm_gym.agents.trainers.denoiser import trainer
from dllm_gym.agents.trainers.denoiser.objective import Batch, TrainerConfig
from dllm_gym.decoding import likelihood

NEGATIVES = ("mixture", "eubo", "elbo")


@dataclass
class SPGConfig(TrainerConfig):
    """Train the denoiser with SPG."""

    learning_rate: float = 1e-4
    """Peak learning rate; linear warm-up, then a cosine to zero."""
    negative: str = "mixture"
    """Surrogate for completions of advantage below 0: "mixture", "eubo" or "elbo"."""
    beta: float = 1.5
    """Rényi order of the EUBO, at least 1."""
    omega: float = 0.5
    """Share of the EUBO in the mixture."""

    def check(self) -> None:
        super().check()
        if self.negative not in NEGATIVES:
            raise ValueError(
                f"negative={self.negative!r}: must be one of {', '.join(NEGATIVES)}. negative_scale=0 leaves these "
                f"completions out."
            )
        if self.beta < 1 or not 0 <= self.omega <= 1:
            raise ValueError(f"beta={self.beta}, omega={self.omega}: beta must be 1 or more, omega in [0, 1].")

    def learns_from(self, advantage: Tensor) -> Tensor:
        return super().learns_from(advantage) & (advantage != 0)


def spg_loss(batch: Batch, config: SPGConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """``-sum(weight * A * surrogate / L)``; the surrogate of `likelihood.elbo` or of ``config.negative``."""
    log_prob, corruption = batch.new.log_prob, batch.corruption
    lower = likelihood.elbo(log_prob, corruption.weight).sum(dim=1)
    upper = {
        "mixture": lambda: likelihood.mixture(
            log_prob, corruption.weight, corruption.scored, config.beta, config.omega
        ).sum(dim=1),
        "eubo": lambda: likelihood.eubo(log_prob, corruption.weight, corruption.scored, config.beta).sum(dim=1),
        "elbo": lambda: lower,
    }[config.negative]()
    surrogate = torch.where(batch.advantage > 0, lower, upper)
    loss = -(batch.weight * batch.advantage * surrogate).sum() / log_prob.shape[-1]
    per_token = batch.weight / batch.length
    return loss, {
        "elbo": (per_token * lower).sum(),
        "surrogate": (per_token * surrogate).sum(),
    }


def train(config: SPGConfig) -> Path:
    """Train; see `trainer.train`."""
    return trainer.train("spg", config, spg_loss)
