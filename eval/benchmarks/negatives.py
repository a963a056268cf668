"""What bad completions teach: ``python -m dllm_gym.eval.benchmarks.negatives``.

One batch of completions, a few updates with one way to treat the bad ones, and then: by how many nats did the
likelihood of good, bad and unseen completions change, and what are confidences worth now? Likelihoods are those of the
trajectories that the denoiser took before (`dllm_gym.decoding.trajectory`), which are exact. Confidences are those of
the argmax on the canvases of unseen completions that turned out right, whose tokens are the truth. Figures are means
over seeds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from dllm_gym import decoding
from dllm_gym.agents.cli import flag, parse
from dllm_gym.agents.environment import EnvConfig, make_envs
from dllm_gym.agents.samplers.rollout import collect
from dllm_gym.agents.samplers.spec import make_stepwise
from dllm_gym.agents.terminal import console
from dllm_gym.agents.trainers.advantages import scale_negatives
from dllm_gym.agents.trainers.denoiser import load_objective
from dllm_gym.agents.trainers.denoiser.learner import Learner
from dllm_gym.agents.trainers.denoiser.trainer import load_trainable, trajectories
from dllm_gym.agents.trainers.seeding import seeded
from dllm_gym.decoding.trajectory import Trajectories
from dllm_gym.denoisers.base import Denoiser
from dllm_gym.envs.episodes import Episodes
from dllm_gym.eval.command import run
from dllm_gym.types import Canvas, Rollout

WAYS = {
    "mixture": ("spg", {}),
    "EUBO": ("spg", {"negative": "eubo"}),
    "ELBO": ("spg", {"negative": "elbo"}),
    "left out": ("spg", {"negative-scale": 0}),
    "mixture, a quarter": ("spg", {"negative-scale": 0.25}),
    "mixture, floor 0.1": ("spg", {"negative-floor": 0.1}),
    "ELBO, floor 0.1": ("spg", {"negative": "elbo", "negative-floor": 0.1}),
    "mixture, coupled maskings": ("spg", {"corruption.kind": "coupled"}),
    "EUBO, coupled maskings": ("spg", {"negative": "eubo", "corruption.kind": "coupled"}),
    "ELBO, coupled maskings": ("spg", {"negative": "elbo", "corruption.kind": "coupled"}),
    "ELBO, clipped ratio": ("espo", {}),
    "mixture, LoRA": ("spg", {"lora.rank": 16}),
    "GDSD": ("gdsd", {}),
    "GDSD, k2 to the reference": ("gdsd", {"kl-weight": 1}),
    "GDSD, left out": ("gdsd", {"negative-scale": 0}),
    "trajectory": ("trace-pg", {}),
    "trajectory, clipped ratio": ("trace-grpo", {}),
    "trajectory, floor 0.1": ("trace-pg", {"negative-floor": 0.1}),
    "trajectory, left out": ("trace-pg", {"negative-scale": 0}),
}
"""Name -> an objective and flags of its."""


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
    ways: tuple[str, ...] = tuple(WAYS)
    """Ways to treat bad completions, by name."""
    problems: int = 32
    """Number of problems in the batch, and of unseen ones."""
    group: int = 8
    """Number of completions per problem."""
    updates: int = 10
    """Number of updates on the batch."""
    learning_rate: float = 1e-4
    """Of AdamW."""
    maskings: tuple[int, ...] = (2,)
    """Numbers of maskings per completion and update; for the trajectory, of its steps."""
    threshold: float = 0.9
    """Confidences above it are looked at."""
    seeds: int = 3
    """Number of seeds, 0, 1, ...: of problems, completions and maskings."""


@dataclass
class Steps:
    """N steps of a rollout as canvases, in the order of its episodes."""

    canvas: Canvas
    token: Tensor
    """``[N, L]`` int64: what would be written."""
    taken: Trajectories
    """What was."""
    final: Tensor
    """``[N, L]`` int64: what the completion has there in the end."""


def steps_of(rollout: Rollout, prompts: list[Tensor], episodes: Episodes, temperature: float) -> Steps:
    """The canvases of a rollout, whose E prompts are 1-D int64."""
    taken, seen = trajectories(rollout, episodes.empty_action, temperature), rollout.observation
    canvas = decoding.before(seen, [prompts[n] for n in rollout.episode.tolist()], episodes.denoiser.mask_token_id)
    return Steps(canvas, seen.token, taken, rollout.tokens[rollout.episode])


@torch.no_grad()
def log_likelihood(denoiser: Denoiser, steps: Steps, temperature: float) -> Tensor:
    """``[E]`` float64, nats: of the trajectories, given the sampler's choices."""
    taken = steps.taken
    total = torch.zeros(int(taken.episode.max()) + 1, dtype=torch.float64)
    for rows in torch.arange(len(taken.episode)).split(512):
        score = denoiser.score(steps.canvas[rows], steps.token[rows], taken.written[rows], temperature)
        total.index_add_(0, taken.episode[rows], score.log_prob.double().sum(dim=1))
    return total


def calibration(denoiser: Denoiser, steps: Steps, right: Tensor, threshold: float) -> tuple[float, float]:
    """Of the masked positions of completions that are ``right`` ``[E]`` bool: the share with a confidence above the
    threshold, and how many of these have the right token as argmax."""
    above = hits = masked = 0
    for rows in right[steps.taken.episode].nonzero()[:, 0].split(512):
        canvas = steps.canvas[rows]
        said = denoiser.predict(canvas)
        sure = canvas.masked & (said.confidence[..., 0] > threshold)
        hits += int((sure & (said.token == steps.final[rows])).sum())
        above, masked = above + int(sure.sum()), masked + int(canvas.masked.sum())
    return above / max(1, masked), hits / max(1, above)


@dataclass
class Sample:
    """Completions of E episodes before the updates."""

    rollout: Rollout
    prompts: list[Tensor]
    steps: Steps
    log_likelihood: Tensor
    """``[E]`` float64, nats."""


def sample(config: NegativesConfig, denoiser: Denoiser, seed: int) -> tuple[Sample, Sample]:
    """A batch, and completions of as many other problems."""
    envs = make_envs(config.env, denoiser=denoiser)
    episodes = envs[0].episodes
    chosen = np.random.default_rng(seed).permutation(len(episodes.task))[: 2 * config.problems]

    def play(problems: np.ndarray) -> Sample:
        own = np.repeat(problems, config.group)
        rollout = collect(envs, make_stepwise(config.sampler), own, seed=seed, explore=False)
        prompts = [episodes.encode_prompt(problem) for problem in rollout.problems]
        steps = steps_of(rollout, prompts, episodes, config.env.temperature)
        return Sample(rollout, prompts, steps, log_likelihood(denoiser, steps, config.env.temperature))

    return play(chosen[: config.problems]), play(chosen[config.problems :])


def figures(config: NegativesConfig, way: str, maskings: int, batch: Sample, unseen: Sample, seed: int) -> list[float]:
    """After the updates: changes for good, bad, unseen right and unseen wrong completions in nats, and calibration."""
    algorithm, settings = WAYS[way]
    kind, loss = load_objective(algorithm)
    number = "trace.steps" if kind.uses_trajectory else "corruption.maskings"
    flags = [part for item in (settings | {number: maskings}).items() for part in flag(*item)]
    objective = replace(parse(algorithm, flags), env=config.env, inner_iterations=config.updates)
    objective.check()
    with seeded(seed):
        denoiser = load_trainable(config.env, torch.device("cpu"))
        learner = Learner(denoiser, objective, loss, Accelerator(cpu=True))
    rollout = batch.rollout
    advantage = objective.advantages(rollout.reward.view(-1, config.group)).flatten()
    weight = torch.full_like(advantage, 1 / len(advantage))
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):
        learner.update(
            rollout.tokens,
            batch.prompts,
            scale_negatives(advantage, objective.negative_scale),
            weight,
            generator,
            config.learning_rate,
            batch.steps.taken if objective.uses_trajectory else None,
        )
    own, other = (
        log_likelihood(denoiser, sample.steps, config.env.temperature) - sample.log_likelihood
        for sample in (batch, unseen)
    )
    right = unseen.rollout.correct
    changes = (own[advantage > 0], own[advantage < 0], other[right], other[~right])
    return [*(part.mean().item() for part in changes), *calibration(denoiser, unseen.steps, right, config.threshold)]


def measure(config: NegativesConfig) -> None:
    """Print the table, a row for each way and number of maskings.

    Raises:
        ValueError: an unknown way, or a sample where nothing is right, or nothing wrong.
    """
    from rich.table import Table

    if unknown := sorted(set(config.ways) - set(WAYS)):
        raise ValueError(f"ways={unknown}: must be of {', '.join(WAYS)}.")
    original = load_trainable(config.env, torch.device("cpu"))
    samples = [sample(config, original, seed) for seed in range(config.seeds)]
    for seed, pair in enumerate(samples):
        if any(part.rollout.correct.all() or not part.rollout.correct.any() for part in pair):
            raise ValueError(f"problems={config.problems}: with seed {seed} all are right, or none; give more.")
    table = Table(
        title=f"{config.env.id}, {config.problems} x {config.group} completions, {config.seeds} seeds, "
        f"{config.updates} updates at {config.learning_rate:g}: change of the log-likelihood in nats per completion; "
        f"confidence above {config.threshold:g}"
    )
    columns = "bad completions", "maskings", "good", "bad", "unseen right", "unseen wrong", "share above", "right there"
    for name in columns:
        table.add_column(name)

    def percent(values) -> list[str]:
        return [f"{100 * value:.1f} %" for value in values]

    of = [calibration(original, unseen.steps, unseen.rollout.correct, config.threshold) for _, unseen in samples]
    table.add_row("before", *[""] * 5, *percent(np.mean(of, axis=0)))
    for way, maskings in product(config.ways, config.maskings):
        by_seed = [figures(config, way, maskings, *pair, seed) for seed, pair in enumerate(samples)]
        *changes, share, right = np.mean(by_seed, axis=0)
        table.add_row(way, str(maskings), *(f"{change:+.2f}" for change in changes), *percent([share, right]))
    console().print(table)


if __name__ == "__main__":
    sys.exit(run("dllm_gym.eval.benchmarks.negatives", NegativesConfig, measure, None))
