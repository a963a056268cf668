"""Evaluating samplers: episodes on a set of problems, and their means with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dllm_gym.agents.samplers.rollout import Policy, collect
from dllm_gym.envs.episodes import require_rewards


@dataclass
class Evaluation:
    """A policy on a set of N problems."""

    correct: np.ndarray
    """``[N]`` bool."""
    nfe: np.ndarray
    """``[N]`` int64: denoiser forwards."""
    reward: np.ndarray
    """``[N]`` float32."""
    score: np.ndarray
    """``[N]`` float32: the verifier's."""
    problem_ids: list[str]
    completions: list[str]
    undecided: list[str | None]
    """``[N]``: None, or why there was no verdict, which counts as wrong."""

    def summary(self) -> dict[str, float | list[float] | dict[str, int]]:
        """Means with 95 % bootstrap intervals over problems: ``accuracy``, ``nfe``, ``reward``, and ``*_interval``.

        ``undecided``: how many verdicts were not reached, by reason.
        """
        values = {"accuracy": self.correct, "nfe": self.nfe, "reward": self.reward}
        means = {name: float(np.mean(v)) for name, v in values.items()}
        intervals = {f"{name}_interval": list(bootstrap_interval(v)) for name, v in values.items()}
        return means | intervals | {"undecided": count_reasons(self.undecided)}


def evaluate(env, policy: Policy, problems: Sequence[int], *, seed: int = 0) -> Evaluation:
    """Play each problem once, the policy called as at evaluation, and keep what a table needs. As `collect`.

    Raises:
        FloatingPointError: a reward is no number.
    """
    given = {"seed": seed, "explore": False, "keep_steps": False}
    rollout = collect(env, policy, problems, **given, ended=lambda _, end: require_rewards([end]))
    return Evaluation(
        correct=rollout.correct.cpu().numpy(),
        nfe=rollout.nfe.cpu().numpy(),
        reward=rollout.reward.cpu().numpy(),
        score=rollout.score.cpu().numpy(),
        problem_ids=[problem.id for problem in rollout.problems],
        completions=rollout.completions,
        undecided=rollout.undecided,
    )


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
