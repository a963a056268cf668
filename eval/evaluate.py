"""Evaluate a sampler: every setting stated, every problem's result kept, an interrupted evaluation continued."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import cast

import numpy as np

import dllm_gym
from dllm_gym.agents.environment import EnvConfig, env_spec, make_envs
from dllm_gym.agents.evaluation import finished
from dllm_gym.agents.samplers.metropolis import Metropolis
from dllm_gym.agents.samplers.rollout import shares
from dllm_gym.agents.samplers.spec import canonical, is_random, make_sampler, make_stepwise
from dllm_gym.agents.workers import merged
from dllm_gym.denoisers.base import Denoiser
from dllm_gym.denoisers.loading import load_denoiser
from dllm_gym.envs.episodes import Finished
from dllm_gym.envs.vector import UnmaskingVectorEnv
from dllm_gym.eval.film import play
from dllm_gym.eval.results import PER_SAMPLE, PER_SAMPLE_LATER, Cell, ResultsFile
from dllm_gym.names import find
from dllm_gym.rendering import Frame
from dllm_gym.rewards import REWARDS
from dllm_gym.types import Problem


@dataclass
class CellConfig:
    """What one cell of a results file is: a sampler on an environment."""

    sampler: str
    """A heuristic or "metropolis" with its arguments, or the folder of a trained policy."""
    env: EnvConfig = field(default_factory=EnvConfig)
    """The environment."""
    problems: int = 1000
    """Number of problems, or all if the split has fewer."""
    first: int = 0
    """Index of the first problem; a negative one counts from the end of the split."""
    samples: int = 1
    """Number of completions per problem, for Pass@k."""
    split: str = "test"
    """"test" or "train"."""
    seed: int = 0
    """Random seed for tokens and for samplers that draw."""
    films: int = 3
    """Number of problems to record for the report's player; they are decoded once more."""

    def check(self) -> None:
        """Refuse what cannot be. Raises ValueError."""
        for name, least in (("problems", 1), ("samples", 1), ("films", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be {least} or more.")
        if self.samples > 1 and not (self.env.temperature or is_random(self.sampler)):
            raise ValueError(
                f"samples={self.samples}: {self.sampler} draws nothing, so all samples would be equal; set "
                "env.temperature above 0."
            )


def evaluate_cell(
    config: CellConfig, file: ResultsFile | None = None, progress: Callable[[int, int], None] | None = None
) -> Cell:
    """Evaluate the cell's missing problems, and add them to the file.

    Args:
        config: ``env.confidence_k`` is raised to what the sampler reads.
        file: None: nothing is written.
        progress: called with (completions so far, all of them).

    Returns:
        The whole cell; one that is finished in the file is not played again.

    Raises:
        ValueError: a sampler, environment or number that cannot be, named with its value.
    """
    config.check()
    sampler = make_sampler(config.sampler, config.seed)
    env = replace(
        config.env,
        id=env_spec(config.env.id).id,
        reward=find(config.env.reward, REWARDS, "env.reward"),
        confidence_k=max(config.env.confidence_k, sampler.confidence_k),
    )
    request = {
        "sampler": canonical(config.sampler),
        "policy": type(sampler).__name__,
        "policy_settings": sampler.settings(),
        "env": env_settings(env),
        **{name: getattr(config, name) for name in ("problems", "samples", "split", "seed", "films")},
        "version": dllm_gym.__version__,
    }
    if config.first:
        request["first"] = config.first
    key = key_of(request)
    if file and (cell := file.cells.get(key)) and cell.end:
        return cell
    envs = make_envs(env, config.split, denoiser=_denoiser(env.denoiser_name, **env.loading))
    episodes = envs[0].episodes
    if not sampler.stepwise:
        cast(Metropolis, sampler).check(episodes)
    first = max(0, len(episodes.task) + config.first) if config.first < 0 else config.first
    count = min(config.problems, len(episodes.task) - first)
    if count < 1:
        raise ValueError(f"first={config.first}: the split has {len(episodes.task)} problems.")
    used = {"gen_length": episodes.gen_length, "dataset": episodes.task.dataset, "device": str(episodes.device)}
    settings = request | {"env": request["env"] | used, "problems": count}
    cell = file.open(key, settings) if file else Cell(key, settings)

    def keep(kind: str, record: dict) -> None:
        cell.add(kind, record)
        if file:
            file.write(key, kind, record)

    known = {record["index"] for record in cell.problems}
    numbers = [
        n for n in range(first * config.samples, (first + count) * config.samples) if n // config.samples not in known
    ]
    totals: dict = {"seconds": 0.0, "tokens": 0, "forwards": 0}
    done: dict[int, dict[int, Finished]] = {}
    chains: list[dict] = []
    left, start = len(numbers), time.perf_counter()
    parts = [partial(_share, config, own, [numbers[i] for i in share]) for own, share in shares(envs, len(numbers))]
    for number, end in merged(parts) if numbers else ():
        left -= 1
        index, sample = divmod(number, config.samples)
        ends = done.setdefault(index, {})
        ends[sample] = end
        totals["tokens"] += end.info["length"]
        totals["forwards"] += end.info["nfe"]
        if "chain" in end.info:
            chains.append(end.info["chain"])
        if len(ends) == config.samples:
            keep("problem", _record(index, episodes.task[index], [ends[i] for i in range(config.samples)]))
            del done[index]
        if progress:
            progress(count * config.samples - left, count * config.samples)
    if numbers:
        totals["seconds"] = time.perf_counter() - start
    if chains:
        totals["chain"] = {name: np.mean([chain[name] for chain in chains], axis=0).tolist() for name in chains[0]}
    if sampler.stepwise:
        for index in range(first + len(cell.films), first + min(config.films, count)):
            player = make_stepwise(config.sampler, config.seed, episodes.device)
            frames, end = play(episodes, player, index, [config.seed, index * config.samples])
            keep("film", _film(frames[-1], end))
    keep("end", totals)
    cell.sort()
    return cell


def _share(config: CellConfig, env: UnmaskingVectorEnv, numbers: list[int]) -> Iterator[tuple[int, Finished]]:
    """A worker's completions as they end; number n is sample ``n % samples`` of problem ``n // samples``."""
    problems = [n // config.samples for n in numbers]
    sampler = make_sampler(config.sampler, config.seed, env.episodes.device)
    for i, end in finished(env, sampler, problems, seed=config.seed, numbers=numbers):
        yield numbers[i], end


def env_settings(env: EnvConfig) -> dict:
    """An environment's settings as a results file keeps them; the split stands beside them."""
    return {name: value for name, value in asdict(env).items() if name != "split"} | {"denoiser": env.denoiser_name}


def key_of(request: dict) -> str:
    """Twelve hex digits that follow from what is asked for.

    Of the environment only what differs from its default counts, so that a new setting leaves old cells their keys.
    """
    default = env_settings(EnvConfig())
    named = {n: v for n, v in request["env"].items() if n in ("id", "denoiser") or v != default[n]}
    return _digest(request | {"env": named})


def _digest(request: dict) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:12]


def _record(index: int, problem: Problem, ends: list[Finished]) -> dict:
    """The line of a problem."""
    values = [end.info | {"reward": end.reward} for end in ends]
    lists = {name: [value[name] for value in values] for name in (*PER_SAMPLE, *PER_SAMPLE_LATER)}
    return {"index": index, "problem_id": problem.id, "prompt": problem.prompt} | lists


def _film(frame: Frame, end: Finished) -> dict:
    """The line of a film, from its last frame."""
    return {
        "problem_id": frame.title,
        "prompt": frame.prompt,
        "tokens": frame.tokens,
        "step_of": frame.step_of.tolist(),
        "confidence": frame.confidence.tolist(),
        "correct": end.info["correct"],
        "nfe": end.info["nfe"],
    }


_loaded: dict[tuple, Denoiser] = {}


def _denoiser(name: str, **loading) -> Denoiser:
    """`load_denoiser`, the last one kept: the cells of a grid mostly share it, and two large ones do not fit."""
    key = (name, *loading.values())
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = load_denoiser(name, **loading)
    return _loaded[key]
