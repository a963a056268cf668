"""A picture of a canvas being unmasked: ``python -m dllm_gym.eval.film --sampler runs/... --output film.png``.

A .png shows one row of the canvas a step; a .gif plays the steps.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import gymnasium as gym

from dllm_gym import rendering
from dllm_gym.agents.config import EnvConfig
from dllm_gym.agents.samplers import make_sampler
from dllm_gym.eval.cli import run


@dataclass
class FilmConfig:
    """Draw one episode."""

    output: Path
    """A .png or a .gif file."""
    sampler: str = "threshold:threshold=0.9"
    """As in dllm-eval."""
    env: EnvConfig = field(default_factory=EnvConfig)
    """The environment."""
    problem: int = 0
    """Index into the split."""
    split: str = "test"
    """"test" or "train"."""
    seed: int = 0
    """Of a sampler that draws."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 2 for a mistake in what was given."""
    return run("dllm_gym.eval.film", FilmConfig, draw, argv)


def draw(config: FilmConfig) -> None:
    """Play the episode and write the picture."""
    if config.output.suffix not in (".png", ".gif"):
        raise ValueError(f"output={str(config.output)!r}: must be a .png or a .gif.")
    policy = make_sampler(config.sampler, config.seed)
    settings = vars(config.env) | {"denoiser": config.env.denoiser_name, "split": config.split}
    settings.pop("num_envs")
    env = gym.make(settings.pop("id"), render_mode="rgb_array", **settings).unwrapped
    env.reset(seed=config.seed, options={"problem": config.problem})
    frames, terminated = [env.trace.frame(0)], False
    while not terminated:
        unmask = policy(env.episodes.observation)[0]
        _, _, terminated, _, _ = env.step(unmask)
        frames.append(env.trace.frame(0))
    if config.output.suffix == ".gif":
        rendering.save_gif(frames, config.output)
    else:
        from PIL import Image

        Image.fromarray(rendering.film(frames)).save(config.output)
    print(f"{frames[-1].prompt}\n{' '.join(frames[-1].tokens)}\n{frames[-1].note}\npicture: {config.output}")


if __name__ == "__main__":
    sys.exit(main())
