"""The evaluation engine: finished problems, and their means with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
from torch import Tensor

from dllm_gym.agents.samplers.base import Sampler
from dllm_gym.agents.samplers.metropolis import Metropolis
from dllm_gym.agents.samplers.rollout import play, shares
from dllm_gym.agents.workers import merged
from dllm_gym.envs.episodes import Finished, require_rewards
from dllm_gym.tasks.mixture import task_of
from dllm_gym.types import Indices, Observation


@dataclass
class Evaluation:
    """A policy on a set of N problems."""

    correct: np.ndarray
    """``[N]`` bool."""
    nfe: np.ndarray
    """``[N]`` int64: number of denoiser forward passes."""
    positions: np.ndarray
    """``[N]`` int64: number of token positions in these forward passes."""
    reward: np.ndarray
    """``[N]`` float32."""
    score: np.ndarray
    """``[N]`` float32: the verifier's score."""
    problem_ids: list[str]
    completions: list[str]
    undecided: list[str | None]
    """``[N]``: None, or the reason why no verdict was reached. Such a completion counts as wrong."""

    def summary(self) -> dict[str, float | list[float] | dict[str, int]]:
        """Means with 95 % bootstrap intervals over problems: ``accuracy``, ``nfe``, ``reward``, and ``*_interval``.

        ``undecided``: how many verdicts were not reached, by reason. ``by_task``: the means of each task of a mixture.
        """
        values = {"accuracy": self.correct, "nfe": self.nfe, "reward": self.reward}
        figures: dict = summarise(values) | {"undecided": count_reasons(self.undecided)}
        parts = by_task(self.problem_ids, values)
        return figures | ({"by_task": parts} if len(parts) > 1 else {})


def evaluate(
    envs, sampler: Sampler | Callable[[Observation], Tensor], problems: Indices, *, seed: int = 0
) -> Evaluation:
    """Play each problem once, the sampler choosing as at evaluation, and keep what a table needs.

    Args:
        envs: as in `dllm_gym.agents.collect`.
        sampler, problems, seed: as in `dllm_gym.agents.samplers.rollout.play`.

    Raises:
        FloatingPointError: a reward is no number.
    """

    def played_by(env, numbers: Sequence[int]) -> Iterator[tuple[int, Finished]]:
        own = [problems[n] for n in numbers]
        for i, end in finished(env, sampler, own, seed=seed, numbers=numbers):
            yield numbers[i], end

    played = dict(merged([partial(played_by, *share) for share in shares(envs, len(problems))]))
    ends = [played[n] for n in range(len(problems))]
    infos = [end.info for end in ends]
    return Evaluation(
        correct=np.array([info["correct"] for info in infos]),
        nfe=np.array([info["nfe"] for info in infos]),
        positions=np.array([info["positions"] for info in infos]),
        reward=np.array([end.reward for end in ends], dtype=np.float32),
        score=np.array([info["score"] for info in infos], dtype=np.float32),
        problem_ids=[info["problem_id"] for info in infos],
        completions=[info["completion"] for info in infos],
        undecided=[info["undecided"] for info in infos],
    )


def finished(
    env,
    sampler: Sampler | Metropolis | Callable[[Observation], Tensor],
    problems: Indices,
    *,
    seed: int = 0,
    numbers: Indices | None = None,
) -> Iterator[tuple[int, Finished]]:
    """Yield n and the end of the episode, or of the chain, on ``problems[n]``, in the order in which they end.

    Args:
        env, problems, seed, numbers: as in `dllm_gym.agents.samplers.rollout.play`.
        sampler: one that chooses step by step, or Metropolis-Hastings.

    Raises:
        FloatingPointError: a reward is no number.
    """
    ends: Iterator[tuple[int, Finished]]
    if getattr(sampler, "stepwise", True):
        played = play(env, cast(Sampler, sampler), problems, seed=seed, numbers=numbers)
        ends = ((one.number, one.end) for one in played)
    else:
        ends = cast(Metropolis, sampler).play(env.unwrapped.episodes, problems, numbers)
    for n, end in ends:
        require_rewards([end])
        yield n, end


def summarise(values: dict[str, np.ndarray]) -> dict[str, float | list[float]]:
    """Means and, as ``*_interval``, 95 % bootstrap intervals over problems of ``[N]`` figures by name."""
    means = {name: float(np.mean(v)) for name, v in values.items()}
    return means | {f"{name}_interval": list(bootstrap_interval(v)) for name, v in values.items()}


def by_task(problem_ids: Sequence[str], values: dict[str, np.ndarray]) -> dict[str, dict]:
    """`summarise` for the problems of each task, by its name."""
    tasks = np.array([task_of(problem_id) for problem_id in problem_ids])
    return {
        str(task): summarise({name: value[tasks == task] for name, value in values.items()})
        for task in dict.fromkeys(tasks)
    }


def describe_tasks(parts: dict[str, dict]) -> str:
    """For a table: "gsm8k 95.0 % [91.0, 98.0] in 4.2 forwards, countdown ..."."""
    texts = []
    for task, row in parts.items():
        low, high = (100 * bound for bound in row["accuracy_interval"])
        texts.append(f"{task} {100 * row['accuracy']:.1f} % [{low:.1f}, {high:.1f}] in {row['nfe']:.1f} forwards")
    return ", ".join(texts)


def count_reasons(undecided: Iterable[str | None]) -> dict[str, int]:
    """How often each reason stands among verdicts, of which most have none."""
    return dict(Counter(reason for reason in undecided if reason))


def describe_undecided(counts: dict[str, int]) -> str:
    """For a table: "3 undecided, counted as wrong (2 timed out, 1 not compared)"; "" where there are none."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    return f"{sum(counts.values())} undecided, counted as wrong ({reasons})" if counts else ""


def bootstrap_interval(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean, resampling problems. For a paired comparison, give the differences."""
    values = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def seeded_interval(first: np.ndarray, second: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the difference of two means, resampling seeds and problems.

    Args:
        first, second: ``[seeds, N]``, trained from seeds that have nothing to do with each other, evaluated on the same
            N problems. One seed, of what is not trained, is kept.
    """
    rng, means = np.random.default_rng(seed), []
    for _ in range(resamples):
        a, b = (x[rng.integers(len(x), size=len(x))].mean(axis=0) for x in (first, second))
        means.append((a - b)[rng.integers(len(a), size=len(a))].mean())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
