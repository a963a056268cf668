"""Playing episodes: `collect` for training and `evaluate` for tables, both on the environment's own rows.

Finished rows are refilled at once, so every denoiser forward is as full as the problems allow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dllm_gym.envs.episodes import Finished
from dllm_gym.types import Action, Observation, Rollout

Policy = Callable[[Observation], Tensor]
"""A sampler: observation of B rows -> the set to unmask, ``[B, L]`` bool."""


def collect(
    env,
    policy: Policy,
    problems: Sequence[int],
    *,
    seed: int | Sequence[int] = 0,
    explore: bool = True,
    keep_steps: bool = True,
    numbers: Sequence[int] | None = None,
    ended: Callable[[int, Finished], None] | None = None,
) -> Rollout:
    """Play one episode for each problem index; the n-th entry of the rollout is that of ``problems[n]``.

    Args:
        env: an `UnmaskingVectorEnv` (or a single environment); its rows are taken over, reset it afterwards.
        policy: a learned policy or a heuristic.
        problems: indices into the environment's task, repeated for groups.
        seed: episode n draws its tokens (at temperature > 0) from a generator seeded by (seed, n), whatever the
            number of rows.
        numbers: the n of each episode in its seed; None: 0, 1, ... For one part of many episodes.
        explore: sample as in training (`act`): an empty set stays empty, for the environment to deal with. Otherwise
            the policy is called, as at evaluation. Heuristics are always called.
        keep_steps: keep observations, picks and log-probabilities.
        ended: called with n and its `Finished` for each episode that has ended, in the order in which they end.

    Raises:
        ValueError: no problems. IndexError: a problem that the task does not have.
    """
    if not len(problems):
        raise ValueError("problems is empty: give the index of at least one problem.")
    episodes = env.unwrapped.episodes
    # Longest prompts first: rows that are decoded together are padded to the longest of them.
    lengths = {index: len(episodes.encode_prompt(episodes.task[index])) for index in set(problems)}
    queue = sorted(enumerate(problems), key=lambda item: (lengths[item[1]], -item[0]))
    owner = np.full(episodes.num_rows, -1)
    finished: list = [None] * len(problems)
    steps: list[tuple[Observation, Tensor, Tensor, Tensor]] = []
    acts = explore and hasattr(policy, "act")
    episodes.clear()
    left = len(problems)
    while left:
        free = np.flatnonzero(~episodes.active)[: len(queue)]
        if len(free):
            taken = [queue.pop() for _ in free]
            for row, (n, _) in zip(free, taken, strict=True):
                owner[row] = n
                number = n if numbers is None else numbers[n]
                episodes.rngs[row] = np.random.default_rng([*np.atleast_1d(seed), number])
            episodes.begin(free, [index for _, index in taken])
        observation = episodes.observe()
        rows = torch.as_tensor(np.flatnonzero(episodes.active), device=episodes.device)
        seen = observation[rows]
        if acts:
            picks, log_prob = policy.act(seen)
        else:
            picks = policy(seen).long()
            log_prob = torch.zeros(len(picks), device=picks.device)
        if keep_steps:
            steps.append((seen, picks, log_prob, torch.as_tensor(owner, device=episodes.device)[rows]))
        unmask = torch.zeros_like(observation.masked).index_copy(0, rows, picks > 0)
        for end in episodes.commit(Action.unmasking(unmask)):
            n = int(owner[end.row])
            finished[n] = (episodes.problems[end.row], end, episodes.canvas.tokens[end.row])
            left -= 1
            if ended:
                ended(n, end)

    device = episodes.device
    ends = [end for _, end, _ in finished]
    parts = list(zip(*steps, strict=True)) if keep_steps else None
    return Rollout(
        problems=[problem for problem, _, _ in finished],
        completions=[end.info["completion"] for end in ends],
        tokens=torch.stack([tokens for _, _, tokens in finished]),
        score=torch.tensor([end.info["score"] for end in ends], device=device),
        correct=torch.tensor([end.info["correct"] for end in ends], device=device),
        undecided=[end.info["undecided"] for end in ends],
        nfe=torch.tensor([end.info["nfe"] for end in ends], device=device),
        reward=torch.tensor([end.reward for end in ends], device=device),
        observation=Observation.cat(parts[0]) if parts else None,
        picks=torch.cat(parts[1]) if parts else None,
        log_prob=torch.cat(parts[2]) if parts else None,
        episode=torch.cat(parts[3]) if parts else None,
    )
