"""GDSD and GDSD-TLC: regress the denoiser on the teacher that reward implies (arXiv 2605.29398).

KL-regularised RL has the optimum ``p* ~ p_old^(1-b) * p_ref^b * exp(psi * A)``. Lifted to the denoiser, with s the sum
of a completion's scores at its masked tokens, the loss is the square of

    s_new - (1 - b) * s_old - b * s_ref - psi * A

and needs no partition function. The score is the log-probability in ``gdsd`` and the centred logit (the logit minus the
mean of all tokens' logits) in ``gdsd-tlc``, which fixes the shift without a softmax. The target is finite, so a bad
completion is lowered by psi * |A| nats and no further.

Where the published code differs: it centres the logits and takes a cross-entropy of them, in which the centring cancels
(``--score elbo`` is that: the log-probability, weighted by the mask ratio's inverse); it scores all L
positions, with no regard to the end; it divides the difference by L and clips it to log(1 +- 4e-4), whose gradient is a
policy gradient inside a small trust region (``--clip 4e-4``; here off by default, so that the regression is one).

Metrics: ``residual`` mean square of the difference to the teacher, in nats squared; ``clip_fraction``; ``kl`` to the
reference, half the squared difference of log-probabilities per scored token (k2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from dllm_gym.agents.trainers.denoiser import trainer
from dllm_gym.agents.trainers.denoiser.objective import Batch, CorruptionConfig, TrainerConfig, required
from dllm_gym.agents.trainers.denoiser.ratio import k2
from dllm_gym.types import Score

SCORES = ("log-prob", "elbo", "centred-logit")


@dataclass
class GDSDConfig(TrainerConfig):
    """Train the denoiser with GDSD."""

    learning_rate: float = 6e-4
    """Peak learning rate; linear warm-up, then a cosine to zero."""
    baseline: str = "leave-one-out"
    """Baseline of the advantage: "group-mean" or "leave-one-out"."""
    corruption: CorruptionConfig = field(default_factory=lambda: CorruptionConfig("coupled"))
    """How completions are masked."""
    score: str = "log-prob"
    """Score to regress: "log-prob", "elbo" (weighted as in the ELBO), or "centred-logit"."""
    psi: float = 1.0
    """Number of nats by which a completion's score should move per unit of advantage."""
    reference_share: float = 0.1
    """Share of the reference in the teacher; the rest is the denoiser that sampled."""
    clip: float | None = None
    """Clips the difference to old and reference, divided by L, to [log(1 - clip), log(1 + clip)]; None turns this
    off."""
    kl_weight: float = 0.0
    """Weight of the k2 divergence from the reference."""

    uses_old: ClassVar[bool] = True

    @property
    def uses_reference(self) -> bool:
        return self.reference_share > 0 or self.kl_weight > 0

    def check(self) -> None:
        super().check()
        if self.score not in SCORES:
            raise ValueError(f"score={self.score!r}: must be one of {', '.join(SCORES)}.")
        if self.score == "centred-logit" and self.negative_floor:
            raise ValueError(f"negative_floor={self.negative_floor}: centred logits are no probabilities; give 0.")
        if self.psi <= 0 or self.kl_weight < 0:
            raise ValueError(f"psi={self.psi}, kl_weight={self.kl_weight}: psi must be above 0, kl_weight 0 or more.")
        if not 0 <= self.reference_share <= 1 or not (self.clip is None or 0 < self.clip < 1):
            raise ValueError(
                f"reference_share={self.reference_share}, clip={self.clip}: reference_share must be in "
                "[0, 1], clip in (0, 1) or None."
            )


@dataclass
class GDSDTLCConfig(GDSDConfig):
    """Train the denoiser with GDSD-TLC, on centred logits."""

    score: str = "centred-logit"
    """Score to regress: "log-prob", "elbo" (weighted as in the ELBO), or "centred-logit"."""


def gdsd_loss(batch: Batch, config: GDSDConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """``sum(weight * mean over maskings of residual^2)``, the residual as in the file's docstring."""

    def score(of: Score) -> Tensor:  # [n, B]
        tokens = of.centred_logit if config.score == "centred-logit" else of.log_prob
        return (tokens * batch.corruption.weight if config.score == "elbo" else tokens).sum(dim=2)

    teacher = (1 - config.reference_share) * score(required(batch.old))
    if config.reference_share:
        teacher = teacher + config.reference_share * score(required(batch.reference))
    difference = score(batch.new) - teacher
    outside = torch.zeros_like(difference)
    if config.clip is not None:
        difference = difference / batch.corruption.masked.shape[-1]
        held = difference.clamp(math.log(1 - config.clip), math.log(1 + config.clip))
        outside, difference = (held != difference).float(), held
    square = (difference - config.psi * batch.advantage).square().mean(dim=0)
    loss = (batch.weight * square).sum()
    metrics = {"residual": loss.detach().clone(), "clip_fraction": (batch.weight * outside.mean(dim=0)).sum()}
    if config.kl_weight:
        kl = (batch.weight * k2(batch.new, required(batch.reference), batch.corruption.scored)).sum()
        loss, metrics["kl"] = loss + config.kl_weight * kl, kl
    return loss, metrics


def train(config: GDSDConfig) -> Path:
    """Train; see `trainer.train`."""
    return trainer.train("gdsd-tlc" if isinstance(config, GDSDTLCConfig) else "gdsd", config, gdsd_loss)
