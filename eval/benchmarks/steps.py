"""How well a few steps stand for an episode: ``python -m dllm_gym.eval.benchmarks.steps``.

The gradient of the trajectory's likelihood, weighted with advantages, of one batch of completions: from all steps, and
from a few of each episode, drawn all alike or in proportion to the denoiser's doubt (`dllm_gym.decoding.trajectory`).
The error is the squared distance between the two, over the squared norm of the first; both ways are unbiased.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dllm_gym import decoding
from dllm_gym.agents.environment import EnvConfig, make_envs
from dllm_gym.agents.samplers.rollout import collect
from dllm_gym.agents.samplers.spec import make_stepwise
from dllm_gym.agents.terminal import console
from dllm_gym.agents.trainers.advantages import group_advantages, scale_negatives
from dllm_gym.agents.trainers.denoiser.trainer import load_trainable, trajectories
from dllm_gym.decoding import likelihood
from dllm_gym.decoding.corruption import Corruption, corrupted_canvas
from dllm_gym.decoding.trajectory import Trajectories, sample_steps
from dllm_gym.eval.command import run


@dataclass
class StepsConfig:
    """Measure the noise of gradients from a few steps of each episode."""

    tasks: tuple[str, ...] = ("Sudoku", "GSM8K", "Countdown")
    """Names between "MaskedDiffusion-" and "-v0"."""
    denoiser: str = "embedded-early"
    """Denoiser to decode with."""
    sampler: str = "threshold:threshold=0.9"
    """Sampler to decode with."""
    temperature: float = 0.5
    """Of the tokens that are drawn."""
    negative_scale: float = 0.0
    """Advantages below 0 are multiplied by this."""
    problems: int = 32
    """Number of problems."""
    group: int = 8
    """Number of completions per problem."""
    steps: tuple[int, ...] = (1, 2, 4)
    """Numbers of steps of each episode."""
    draws: int = 10
    """Number of estimates whose error is averaged."""
    seed: int = 0
    """Random seed."""


def measure(config: StepsConfig) -> None:
    """Print a row for each task and number of steps."""
    from rich.table import Table

    table = Table(title=f"Squared error of the gradient, {config.problems} x {config.group} completions")
    for heading in ("task", "steps of an episode", "certain", "steps drawn", "all alike", "in proportion"):
        table.add_column(heading)
    for task in config.tasks:
        length, certain, errors = figures(task, config)
        for number, found in zip(config.steps, errors, strict=True):
            both = (f"{values.mean():.2f} +- {values.std() / len(values) ** 0.5:.2f}" for values in found)
            table.add_row(task, f"{length:.1f}", f"{100 * certain:.0f} %", str(number), *both)
    console().print(table)


def figures(task: str, config: StepsConfig) -> tuple[float, float, list[tuple[Tensor, Tensor]]]:
    """Of a task: mean steps of an episode; share of steps that write nothing less likely than 0.98; and for each number
    of steps the errors ``[draws]`` of estimates from steps drawn all alike, and in proportion.

    Raises:
        ValueError: an unknown task; completions that are all worth the same.
    """
    env = EnvConfig(
        f"MaskedDiffusion-{task}-v0", denoiser=config.denoiser, temperature=config.temperature, alpha=0.0, num_envs=256
    )
    denoiser = load_trainable(env, "cpu")
    denoiser.model.requires_grad_(True)
    envs = make_envs(env, denoiser=denoiser)
    episodes = envs[0].episodes
    problems = np.random.default_rng(config.seed).integers(len(episodes.task), size=config.problems)
    own = np.repeat(problems, config.group)
    rollout = collect(envs, make_stepwise(config.sampler), own, seed=config.seed, explore=False)
    advantage = group_advantages(rollout.reward.view(-1, config.group), "leave-one-out").flatten()
    advantage = scale_negatives(advantage, config.negative_scale)
    if not advantage.any():
        raise ValueError(f"problems={config.problems}, group={config.group}: all are worth the same; give more.")
    taken = trajectories(rollout, episodes.empty_action, config.temperature)
    prompt, prompt_mask = decoding.pad_left([episodes.encode_prompt(problem) for problem in rollout.problems])
    parameters = list(denoiser.model.parameters())

    def gradient(drawn: Corruption) -> Tensor:
        total = [torch.zeros_like(p) for p in parameters]
        for rows in advantage.nonzero()[:, 0].split(64):
            part, tokens = drawn[rows], rollout.tokens[rows]
            n = len(part.masked)
            canvas = corrupted_canvas(prompt[rows], prompt_mask[rows], tokens, part, denoiser.mask_token_id)
            score = denoiser.score(canvas, tokens.repeat(n, 1), part.scored.flatten(0, 1), config.temperature)
            log_p = likelihood.elbo(score.log_prob.unflatten(0, (n, -1)), part.weight).sum(dim=1)
            gradients = torch.autograd.grad((advantage[rows] * log_p).sum(), parameters)
            total = [one + other for one, other in zip(total, gradients, strict=True)]
        return torch.cat([part.flatten() for part in total])

    counts = torch.bincount(taken.episode)
    generator = torch.Generator().manual_seed(config.seed)
    whole = gradient(sample_steps(taken, prompt_mask, int(counts.max()), generator))
    alike = replace(taken, doubt=torch.ones_like(taken.doubt))

    def errors_of(steps: Trajectories, number: int) -> Tensor:
        estimates = (gradient(sample_steps(steps, prompt_mask, number, generator)) for _ in range(config.draws))
        return torch.stack([(one - whole).square().sum() for one in estimates]) / whole.square().sum()

    errors = [(errors_of(alike, number), errors_of(taken, number)) for number in config.steps]
    return counts.float().mean().item(), (taken.doubt < 0.02).float().mean().item(), errors


if __name__ == "__main__":
    sys.exit(run("dllm_gym.eval.benchmarks.steps", StepsConfig, measure, None))
