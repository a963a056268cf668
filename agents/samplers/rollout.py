"""Playing episodes on the environment's own rows.

Finished rows are refilled at once, so every denoiser forward pass is as full as the problems allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dllm_gym.agents.samplers.base import Sampler, as_sampler
from dllm_gym.agents.workers import side_by_side
from dllm_gym.envs.episodes import Episodes, Finished
from dllm_gym.transfer import onto
from dllm_gym.types import Action, Indices, Observation, Problem, Rollout


@dataclass
class Ended:
    """One finished episode."""

    number: int
    """Index among the episodes that were asked for."""
    problem: Problem
    end: Finished
    tokens: Tensor
    """``[L]`` int64: the final canvas."""


@dataclass
class StepLog:
    """The steps of running episodes, in the order in which they are taken."""

    observations: list[Observation] = field(default_factory=list)
    picks: list[Tensor] = field(default_factory=list)
    log_probs: list[Tensor] = field(default_factory=list)
    episodes: list[Tensor] = field(default_factory=list)
    """Number of the episode that took each step."""


def play(
    env,
    sampler: Sampler | Callable[[Observation], Tensor],
    problems: Indices,
    *,
    seed: int | Sequence[int] = 0,
    explore: bool = False,
    numbers: Indices | None = None,
    log: StepLog | None = None,
) -> Iterator[Ended]:
    """Play one episode for each problem index, and yield them as they end.

    Args:
        env: an `UnmaskingVectorEnv`, a single environment, or the `Episodes` of one; its rows are taken over, reset it
            afterwards.
        sampler: a learned policy, a heuristic, or a function ``Observation -> [B, L] bool``.
        problems: indices into the environment's task, repeated for groups.
        seed: episode n draws its tokens (at temperature > 0) from a generator seeded by (seed, n), and the sampler
            draws what it does there from another one. So nothing depends on the number of rows, or of environments.
        explore: choose as in training, where an empty set is left to the environment's ``empty_action``.
        numbers: the n of each episode in its seed; None means 0, 1, ... Give it to play one part of many episodes.
        log: where the steps are kept.

    Raises:
        ValueError: no problems. IndexError: a problem that the task does not have.
    """
    if not len(problems):
        raise ValueError("problems is empty: give the index of at least one problem.")
    episodes = env if isinstance(env, Episodes) else env.unwrapped.episodes
    sampler = as_sampler(sampler)
    draws = getattr(sampler, "draws", False)
    # Longest prompts first: rows that are decoded together are padded to the longest of them.
    lengths = {index: len(episodes.encode_prompt(episodes.task[index])) for index in set(problems)}
    queue = sorted(enumerate(problems), key=lambda item: (lengths[item[1]], -item[0]))
    owner = np.full(episodes.num_rows, -1)
    choosing: list[Any] = [None] * episodes.num_rows  # the sampler's generator in each row
    episodes.clear()
    while queue or episodes.active.any():
        free = np.flatnonzero(~episodes.active)[: len(queue)]
        if len(free):
            taken = [queue.pop() for _ in free]
            for row, (n, _) in zip(free, taken, strict=True):
                owner[row] = n
                number = n if numbers is None else numbers[n]
                episodes.rngs[row] = np.random.default_rng([*np.atleast_1d(seed), number])
                if draws:
                    choosing[row] = np.random.default_rng([*np.atleast_1d(seed), number, 1 + sampler.seed])
            episodes.begin(free, [index for _, index in taken])
        observation = episodes.observe(check=False)
        running = np.flatnonzero(episodes.active)
        (rows,) = onto(episodes.device, torch.as_tensor(running))
        seen = observation[rows]
        drawn: tuple[Tensor, ...] = ()
        if draws:
            uniforms = [choosing[row].random(episodes.gen_length + 1, dtype=np.float32) for row in running]
            drawn = onto(episodes.device, torch.as_tensor(np.stack(uniforms)))
        try:
            picks, log_prob = sampler.choose(seen, explore, *drawn)
        except FloatingPointError:
            episodes.observe()  # is it the denoiser's fault?
            raise
        if log:
            log.observations.append(seen)
            log.picks.append(picks)
            log.log_probs.append(log_prob)
            log.episodes.append(torch.as_tensor(owner[running]))
        unmask = torch.zeros_like(observation.masked).index_copy(0, rows, picks > 0)
        for end in episodes.commit(Action.unmasking(unmask)):
            yield Ended(int(owner[end.row]), episodes.problems[end.row], end, episodes.canvas.tokens[end.row])


def shares(envs, count: int) -> list[tuple[Any, range]]:
    """The numbers of ``count`` episodes dealt out to one or several environments: those with one, and which."""
    envs = list(envs) if isinstance(envs, Sequence) else [envs]
    return [(env, range(i, count, len(envs))) for i, env in enumerate(envs) if i < count]


def collect(
    envs,
    sampler: Sampler | Callable[[Observation], Tensor],
    problems: Indices,
    *,
    seed: int | Sequence[int] = 0,
    explore: bool = True,
    numbers: Indices | None = None,
) -> Rollout:
    """Play one episode for each problem index; the n-th entry of the rollout is that of ``problems[n]``.

    The steps of an episode stand together, in the order of the episodes.

    Args:
        envs: an environment, as in `play`; or several, as `dllm_gym.agents.environment.make_envs` gives them, which
            play their shares side by side. The rollout is the same.
        sampler, problems, seed, explore, numbers: as in `play`.

    Raises:
        ValueError, IndexError: as `play`.
    """

    def played_by(env, share: range) -> tuple[StepLog, list[Ended]]:
        log = StepLog()
        own = [problems[n] for n in share]
        own_numbers = share if numbers is None else [numbers[n] for n in share]
        ended = list(play(env, sampler, own, seed=seed, explore=explore, numbers=own_numbers, log=log))
        log.episodes = [episode * share.step + share.start for episode in log.episodes]
        return log, [replace(one, number=share[one.number]) for one in ended]

    if not len(problems):
        raise ValueError("problems is empty: give the index of at least one problem.")
    logs, parts = zip(*side_by_side([partial(played_by, *share) for share in shares(envs, len(problems))]), strict=True)
    played = sorted((one for part in parts for one in part), key=lambda one: one.number)
    ends, device = [one.end for one in played], played[0].tokens.device
    episode = torch.cat([episode for log in logs for episode in log.episodes]).to(device)
    order = episode.argsort(stable=True)  # an episode's steps come in order, among those of other rows
    return Rollout(
        problems=[one.problem for one in played],
        completions=[end.info["completion"] for end in ends],
        tokens=torch.stack([one.tokens for one in played]),
        score=torch.tensor([end.info["score"] for end in ends], device=device),
        correct=torch.tensor([end.info["correct"] for end in ends], device=device),
        undecided=[end.info["undecided"] for end in ends],
        nfe=torch.tensor([end.info["nfe"] for end in ends], device=device),
        reward=torch.tensor([end.reward for end in ends], device=device),
        observation=Observation.cat([seen for log in logs for seen in log.observations])[order],
        picks=torch.cat([picks for log in logs for picks in log.picks])[order],
        log_prob=torch.cat([log_prob for log in logs for log_prob in log.log_probs])[order],
        episode=episode[order],
    )
