"""What bad completions teach: ``python -m dllm_gym.eval.benchmarks.negatives``.

One batch of completions, a few updates with SPG's surrogates for the bad ones, and then: by how many nats did the
likelihood of good, bad and unseen completions change, and what are confidences worth now? Likelihoods are those of the
trajectories that the denoiser took before (`dllm_gym.decoding.trajectory`), which are exact. Confidences are those of
the argmax on the canvases of unseen completions that turned out right, whose tokens are the truth.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from dllm_gym import decoding
from dllm_gym.agents.environment import EnvConfig, make_envs
from dllm_gym.agents.samplers.rollout import collect
from dllm_gym.agents.samplers.spec import make_stepwise
from dllm_gym.agents.terminal import console
from dllm_gym.agents.trainers.denoiser.learner import Learner
from dllm_gym.agents.trainers.denoiser.objective import CorruptionConfig
from dllm_gym.agents.trainers.denoiser.spg import SPGConfig, spg_loss
from dllm_gym.agents.trainers.denoiser.trainer import load_trainable, trajectories
from dllm_gym.agents.trainers.seeding import seeded
from dllm_gym.denoisers.base import Denoiser
from dllm_gym.eval.command import run
from dllm_gym.types import Canvas, Rollout

SURROGATES = {
    "mixture": {},
    "EUBO": {"negative": "eubo"},
    "ELBO": {"negative": "elbo"},
    "left out": {"negative_scale": 0.0},
    "mixture, a quarter": {"negative_scale": 0.25},
    "mixture, floor 0.1": {"negative_floor": 0.1},
    "ELBO, floor 0.1": {"negative": "elbo", "negative_floor": 0.1},
}
"""Settings of `SPGConfig`."""


@dataclass
class NegativesConfig:
    """Measure what updates with bad completions change."""

    env: EnvConfig = field(
        default_factory=lambda: EnvConfig(
            id="MaskedDiffusion-Sudoku-v0", denoiser="embedded-early", temperature=1.0, alpha=0.0, num_envs=256
        )
    )
    """The environment."""
    sampler: str = "threshold:threshold=0.9"
    """Sampler to decode with."""
    problems: int = 32
    """Number of problems in the batch, and of unseen ones."""
    group: int = 8
    """Number of completions per problem."""
    updates: int = 10
    """Number of updates on the batch."""
    learning_rate: float = 1e-4
    """Of AdamW."""
    maskings: tuple[int, ...] = (1, 2, 8)
    """Numbers of maskings per completion and update."""
    threshold: float = 0.9
    """Confidences above it are looked at."""
    seed: int = 0
    """Random seed."""


@dataclass
class Steps:
    """N steps of a rollout as canvases, in the order of its episodes."""

    canvas: Canvas
    token: Tensor
    """``[N, L]`` int64: what would be written."""
    written: Tensor
    """``[N, L]`` bool: what was."""
    final: Tensor
    """``[N, L]`` int64: what the completion has there in the end."""
    episode: Tensor
    """``[N]`` int64."""


def steps_of(rollout: Rollout, prompts: list[Tensor], mask_token_id: int, empty_action: str) -> Steps:
    """The canvases of a rollout, whose E prompts are 1-D int64."""
    taken, seen = trajectories(rollout, empty_action), rollout.observation
    canvas = decoding.before(seen, [prompts[n] for n in rollout.episode.tolist()], mask_token_id)
    return Steps(canvas, seen.token, taken.written, rollout.tokens[rollout.episode], rollout.episode)


@torch.no_grad()
def log_likelihood(denoiser: Denoiser, steps: Steps, temperature: float) -> Tensor:
    """``[E]`` float64, nats: of the trajectories, given the sampler's choices."""
    total = torch.zeros(int(steps.episode.max()) + 1, dtype=torch.float64)
    for rows in torch.arange(len(steps.episode)).split(512):
        score = denoiser.score(steps.canvas[rows], steps.token[rows], steps.written[rows], temperature)
        total.index_add_(0, steps.episode[rows], score.log_prob.double().sum(dim=1))
    return total


def calibration(denoiser: Denoiser, steps: Steps, right: Tensor, threshold: float) -> tuple[float, float]:
    """Of the masked positions of completions that are ``right`` ``[E]`` bool: the share with a confidence above the
    threshold, and how many of these have the right token as argmax."""
    above = hits = masked = 0
    for rows in right[steps.episode].nonzero()[:, 0].split(512):
        canvas = steps.canvas[rows]
        said = denoiser.predict(canvas)
        sure = canvas.masked & (said.confidence[..., 0] > threshold)
        hits += int((sure & (said.token == steps.final[rows])).sum())
        above, masked = above + int(sure.sum()), masked + int(canvas.masked.sum())
    return above / max(1, masked), hits / max(1, above)


def measure(config: NegativesConfig) -> None:
    """Print the table, a row for each surrogate and number of maskings."""
    from rich.table import Table

    device = torch.device("cpu")
    original = load_trainable(config.env, device)
    envs = make_envs(config.env, denoiser=original)
    episodes = envs[0].episodes
    chosen = np.random.default_rng(config.seed).permutation(len(episodes.task))[: 2 * config.problems]
    parts: list[Rollout] = []
    prompts: list[list[Tensor]] = []
    for part in (chosen[: config.problems], chosen[config.problems :]):
        own = np.repeat(part, config.group)
        parts.append(collect(envs, make_stepwise(config.sampler), own, seed=config.seed, explore=False))
        prompts.append([episodes.encode_prompt(problem) for problem in parts[-1].problems])
    seen, unseen = (
        steps_of(rollout, texts, original.mask_token_id, episodes.empty_action)
        for rollout, texts in zip(parts, prompts, strict=True)
    )
    before = [log_likelihood(original, steps, config.env.temperature) for steps in (seen, unseen)]
    table = Table(
        title=f"{config.env.id}, {config.problems} x {config.group} completions, {config.updates} updates at "
        f"{config.learning_rate:g}: change of the log-likelihood in nats per completion; confidence above "
        f"{config.threshold:g}"
    )
    columns = "bad completions", "maskings", "good", "bad", "unseen right", "unseen wrong", "share above", "right there"
    for name in columns:
        table.add_column(name)
    share, right = calibration(original, unseen, parts[1].correct, config.threshold)
    table.add_row("before", "", "", "", "", "", f"{100 * share:.1f} %", f"{100 * right:.1f} %")
    for name, settings in SURROGATES.items():
        for maskings in config.maskings:
            denoiser = load_trainable(config.env, device)
            corruption = CorruptionConfig(maskings=maskings)
            objective = SPGConfig(env=config.env, inner_iterations=1, corruption=corruption, **settings)
            advantage = objective.advantages(parts[0].reward.view(-1, config.group)).flatten()
            scaled = objective.scaled(advantage)
            learner = Learner(denoiser, objective, spg_loss, Accelerator(cpu=True))
            weight = torch.full_like(advantage, 1 / len(advantage))
            generator = torch.Generator().manual_seed(config.seed)
            with seeded(config.seed):
                for _ in range(config.updates):
                    learner.update(parts[0].tokens, prompts[0], scaled, weight, generator, config.learning_rate)
            after = [log_likelihood(denoiser, steps, config.env.temperature) for steps in (seen, unseen)]
            change, other = (new - old for new, old in zip(after, before, strict=True))
            share, right = calibration(denoiser, unseen, parts[1].correct, config.threshold)
            means = (change[advantage > 0], change[advantage < 0], other[parts[1].correct], other[~parts[1].correct])
            figures = [f"{part.mean():+.2f}" for part in means]
            table.add_row(name, str(maskings), *figures, f"{100 * share:.1f} %", f"{100 * right:.1f} %")
    console().print(table)


if __name__ == "__main__":
    sys.exit(run("dllm_gym.eval.benchmarks.negatives", NegativesConfig, measure, None))
