"""The likelihood of the trajectory: policy gradients of the denoiser without a bound.

At each step of an episode the sampler chose positions and the denoiser drew their tokens. The sum of
``log p(token | canvas of the step)`` is the exact log-probability of all that it drew, so ``A * grad`` of it is the
policy gradient of the distribution that was sampled from: for any order of positions that follows from the canvas, for
several tokens a step, and for a denoiser that comes from no joint distribution.

``trace-pg`` follows this gradient (REINFORCE). ``trace-grpo`` clips the ratio of new to old, per token or per step, so
that a batch serves several updates. Some steps of each episode are drawn and weighted
(`dllm_gym.decoding.trajectory`), or consecutive steps are merged, as TraceRL does (arXiv 2509.06949); DCOLT
(arXiv 2505.10446) scores every step.

What improves is the sampler's own distribution at the temperature of the rollouts, which need not be what decoding at
temperature 0 shows.

Metrics: ``trajectory`` log-likelihood in nats per written token, of the completions that are learned from;
``clip_fraction`` of written tokens, or of steps, whose ratio is outside (`trace-grpo`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from dllm_gym.agents.trainers.configs import at_least_one
from dllm_gym.agents.trainers.denoiser import trainer
from dllm_gym.agents.trainers.denoiser.objective import Batch, CorruptionConfig, TrainerConfig, required
from dllm_gym.agents.trainers.denoiser.ratio import clipped
from dllm_gym.decoding import likelihood
from dllm_gym.decoding.corruption import Corruption
from dllm_gym.decoding.trajectory import Trajectories, sample_steps

LEVELS = ("token", "step")


@dataclass
class StepsConfig:
    """Which steps of an episode are scored."""

    steps: int = 2
    """Number of steps of each episode and update, drawn in proportion to how unsure the denoiser was; all where an
    episode has no more."""
    merge: int = 1
    """So many consecutive steps are scored as one, on the canvas of the first; more than 1 is an approximation."""


@dataclass
class TracePGConfig(TrainerConfig):
    """Train the denoiser with the policy gradient of the trajectory."""

    learning_rate: float = 1e-4
    """Peak learning rate; linear warm-up, then a cosine to zero."""
    inner_iterations: int = 1
    """Number of updates per batch; with more than one, later ones are off-policy without a correction."""
    baseline: str = "leave-one-out"
    """Baseline of the advantage: "group-mean" or "leave-one-out"."""
    trace: StepsConfig = field(default_factory=StepsConfig)
    """Which steps of an episode are scored."""
    entropy_weight: float = 0.0
    """Weight of the entropy of what is drawn, in reward per nat, against a denoiser that becomes too sure."""

    uses_trajectory: ClassVar[bool] = True

    def check(self) -> None:
        super().check()
        at_least_one(self.trace, "steps", "merge")
        if not 0 <= self.entropy_weight < math.inf:
            raise ValueError(f"entropy_weight={self.entropy_weight}: must be 0 or more, and finite.")
        if self.corruption != CorruptionConfig():
            raise ValueError(f"corruption={self.corruption}: steps of rollouts are scored; give --trace.steps instead.")
        sampling = self.env.sampling
        if sampling.leaves_out or sampling.end_token_penalty or sampling.end_tokens_last:
            raise ValueError(
                "env.top_p, env.top_k, env.end_token_penalty, env.end_tokens_last: the trajectory's likelihood is that "
                "of softmax(logits / temperature), at positions that do not depend on what is drawn; leave them out."
            )

    def learns_from(self, advantage: Tensor) -> Tensor:
        learned = super().learns_from(advantage)
        return learned if self.entropy_weight else learned & (advantage != 0)

    def maskings(
        self, completion: Tensor, prompt_mask: Tensor, generator: torch.Generator, trajectories: Trajectories | None
    ) -> Corruption:
        """Some steps of each trajectory."""
        if trajectories is None:
            raise ValueError("the objective scores steps of a rollout: give its trajectories.")
        return sample_steps(trajectories, prompt_mask, self.trace.steps, generator, self.trace.merge)


@dataclass
class TraceGRPOConfig(TracePGConfig):
    """Train the denoiser with GRPO on the trajectory."""

    inner_iterations: int = 2
    """Number of updates per batch; each draws its own steps."""
    clip: float = 0.2
    """The ratio is clipped to [1 - clip, 1 + clip]."""
    level: str = "token"
    """Whose ratio is clipped: each "token"'s, or the product over those of a "step"."""

    uses_old: ClassVar[bool] = True

    def check(self) -> None:
        super().check()
        if self.clip <= 0:
            raise ValueError(f"clip={self.clip}: must be above 0.")
        if self.level not in LEVELS:
            raise ValueError(f"level={self.level!r}: must be 'token' or 'step'.")
        if self.level == "step" and self.entropy_weight:
            raise ValueError(f"entropy_weight={self.entropy_weight}: is a token's; give level='token'.")


def trace_pg_loss(batch: Batch, config: TracePGConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """``-sum(weight * (A * log p(trajectory) - entropy_weight * sum(log p^2) / 2) / L)``.

    ``-E[log p * grad log p]`` is the gradient of the entropy of what is drawn.
    """
    log_prob, weight = batch.new.log_prob, batch.corruption.weight
    log_p = likelihood.elbo(log_prob, weight).sum(dim=1)
    squares = likelihood.elbo(log_prob.square(), weight).sum(dim=1)
    surrogate = batch.advantage * log_p - config.entropy_weight * squares / 2
    loss = -(batch.weight * surrogate).sum() / log_prob.shape[-1]
    return loss, {"trajectory": (batch.weight * log_p / written(batch)).sum()}


def trace_grpo_loss(batch: Batch, config: TraceGRPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """``-sum(weight * clipped ratio * A / L)``, summed over written tokens, or over steps.

    With an entropy term, ``A - entropy_weight * log p_old`` is what a token is worth.
    """
    log_ratio = batch.new.log_prob - required(batch.old).log_prob
    weight = batch.corruption.weight
    advantage = batch.advantage[:, None]
    if config.entropy_weight:
        advantage = advantage - config.entropy_weight * required(batch.old).log_prob
    if config.level == "step":  # the gradient at ratio 1 is the same: that of the sum over a step's tokens
        log_ratio, weight = log_ratio.sum(dim=-1, keepdim=True), weight.amax(dim=-1, keepdim=True)
    objective, outside = clipped(log_ratio, advantage, config.clip)
    surrogate = likelihood.elbo(objective, weight).sum(dim=1)
    loss = -(batch.weight * surrogate).sum() / batch.new.log_prob.shape[-1]
    log_p = likelihood.elbo(batch.new.log_prob, batch.corruption.weight).sum(dim=1)
    share = (outside * weight).sum(dim=(0, 2)) / weight.sum(dim=(0, 2)).clamp(min=1e-9)
    return loss, {
        "trajectory": (batch.weight * log_p / written(batch)).sum(),
        "clip_fraction": (batch.weight * share).sum(),
    }


def written(batch: Batch) -> Tensor:
    """``[B]``: an estimate of the number of tokens that a trajectory wrote, at least 1."""
    return likelihood.elbo(torch.ones_like(batch.new.log_prob), batch.corruption.weight).sum(dim=1).clamp(min=1)


def train(config: TracePGConfig) -> Path:
    """Train; see `trainer.train`."""
    if isinstance(config, TraceGRPOConfig):
        return trainer.train("trace-grpo", config, trace_grpo_loss)
    return trainer.train("trace-pg", config, trace_pg_loss)
