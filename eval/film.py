"""A picture of a canvas being unmasked: ``python -m dllm_gym.eval.film --sampler runs/... --output film.png``.

A .png shows one row of the canvas per step; a .gif plays the steps.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dllm_gym import rendering
from dllm_gym.agents.environment import EnvConfig, make_env
from dllm_gym.agents.samplers.base import Sampler
from dllm_gym.agents.samplers.spec import make_stepwise
from dllm_gym.envs.episodes import Episodes, Finished
from dllm_gym.envs.trace import Trace
from dllm_gym.eval.command import run
from dllm_gym.rendering import Frame
from dllm_gym.types import Action


@dataclass
class FilmConfig:
    """Draw one episode."""

    output: Path
    """A .png or a .gif file."""
    sampler: str = "threshold:threshold=0.9"
    """A sampler, as in dllm-eval."""
    env: EnvConfig = field(default_factory=EnvConfig)
    """The environment."""
    problem: int = 0
    """Index of the problem in the split."""
    split: str = "test"
    """"test" or "train"."""
    seed: int = 0
    """Random seed for a sampler that draws."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 2 for a mistake in what was given."""
    return run("dllm_gym.eval.film", FilmConfig, draw, argv)


def draw(config: FilmConfig) -> None:
    """Play the episode and write the picture."""
    if config.output.suffix not in (".png", ".gif"):
        raise ValueError(f"output={str(config.output)!r}: must be a .png or a .gif.")
    confidences = max(config.env.confidence_k, make_stepwise(config.sampler).confidence_k)
    episodes = make_env(config.env, config.split, num_envs=1, confidence_k=confidences).unwrapped.episodes
    sampler = make_stepwise(config.sampler, config.seed, episodes.device)
    frames, _ = play(episodes, sampler, config.problem, [config.seed, 0])
    if config.output.suffix == ".gif":
        rendering.save_gif(frames, config.output)
    else:
        from PIL import Image

        Image.fromarray(rendering.film(frames)).save(config.output)
    print(f"{frames[-1].prompt}\n{' '.join(frames[-1].tokens)}\n{frames[-1].note}\npicture: {config.output}")


def play(episodes: Episodes, sampler: Sampler, problem: int, seed: list[int]) -> tuple[list[Frame], Finished]:
    """One episode in row 0: what it looked like before each step and at its end, and how it ended.

    Args:
        episodes: its rows are taken over.
        problem: index into the task.
        seed: of the tokens drawn.
    """
    episodes.clear()
    episodes.rngs[0] = np.random.default_rng(seed)
    episodes.begin([0], [problem])
    observation = episodes.observe()
    trace = Trace(episodes)
    finished: list[Finished] = []
    trace.begin([0])
    frames = [trace.frame(0)]
    while not finished:
        unmask = torch.zeros_like(observation.masked)
        picks, _ = sampler.choose(observation[:1])
        unmask[:1] = picks > 0
        finished = episodes.commit(Action.unmasking(unmask))
        trace.step(finished)
        observation = episodes.observe()
        frames.append(trace.frame(0))
    return frames, finished[0]


if __name__ == "__main__":
    sys.exit(main())
