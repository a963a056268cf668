"""Every episode that a policy and a denoiser can have in a small world, and what they earn in expectation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations, permutations, product

import torch
from torch import Tensor

from dllm_gym import decoding
from dllm_gym.agents.samplers.policy import PolicyConfig, UnmaskingPolicy
from dllm_gym.agents.trainers.joint_trace import EpisodeSteps, step_log_probs
from dllm_gym.agents.trainers.seeding import seeded
from dllm_gym.denoisers.oracle import TabularDenoiser
from dllm_gym.types import Action, Canvas

TEMPERATURE = 0.8
"""At which the denoiser's tokens are drawn."""


def tiny_policy(distribution: str, seed: int = 0) -> UnmaskingPolicy:
    """A policy of a few random weights, large enough that what it sees matters."""
    with seeded(seed):
        policy = UnmaskingPolicy(PolicyConfig(hidden_dim=8, mlp_dim=8, initial_bias=0.0, distribution=distribution))
        for p in policy.parameters():
            torch.nn.init.normal_(p, std=0.6)
    return policy


def blank(denoiser: TabularDenoiser) -> Canvas:
    """The canvas at which every episode begins."""
    return decoding.blank([torch.zeros(1, dtype=torch.int64)], denoiser.length, denoiser.mask_token_id)


def choices(eligible: list[int], length: int, distribution: str) -> list[Tensor]:
    """All picks ``[L]`` of the eligible positions: sets, or for "dpls" ordered sets that are not empty."""
    found = []
    for size in range(len(eligible) + 1):
        if distribution == "bernoulli":
            chosen = [dict.fromkeys(one, 1) for one in combinations(eligible, size)]
        else:
            orders = permutations(eligible, size) if size else []
            chosen = [{position: n + 1 for n, position in enumerate(order)} for order in orders]
        found += [torch.tensor([one.get(i, 0) for i in range(length)]) for one in chosen]
    return found


def steps_from(
    denoiser: TabularDenoiser, policy: UnmaskingPolicy, canvas: Canvas
) -> Iterator[tuple[EpisodeSteps, Canvas]]:
    """Every step from a canvas of one row, with the canvas after it."""
    words, length = denoiser.num_words, denoiser.length
    with torch.no_grad():
        seen = decoding.observe(canvas, denoiser.predict(canvas), length)
    for picks in choices(canvas.masked[0].nonzero()[:, 0].tolist(), length, policy.config.distribution):
        written = decoding.with_best(picks[None] > 0, seen) & seen.eligible
        places = written[0].nonzero()[:, 0].tolist()
        for drawn in product(range(words), repeat=len(places)):
            token = canvas.tokens.clone()
            token[0, places] = torch.tensor(drawn)
            seen_here = replace(seen, token=torch.where(canvas.masked & ~written, 0, token))
            after = decoding.commit(
                canvas, replace(seen, token=token), Action.unmasking(written), mask_token_id=denoiser.mask_token_id,
                eos_token_id=denoiser.eos_token_id, eos_token_ids=None,
            )  # fmt: skip
            yield EpisodeSteps(canvas, seen_here, picks[None], written), after


def expected_reward(
    denoiser: TabularDenoiser,
    policy: UnmaskingPolicy,
    reward: Callable[[Canvas], float],
    canvas: Canvas,
    known: dict[tuple, Tensor] | None = None,
) -> Tensor:
    """``sum over episodes of p(episode) * R`` from a canvas on, a scalar with a gradient.

    Args:
        denoiser: of V words and L positions, both small.
        policy: sees the denoiser's confidences.
        reward: of a complete canvas of one row.
        canvas: one row, L tokens.
        known: takes the same scalar of every canvas on the way, by `key`.

    Returns:
        float64.
    """
    known = {} if known is None else known
    if key(canvas) not in known:
        if canvas.masked.any():
            total = torch.zeros((), dtype=torch.float64)
            for step, after in steps_from(denoiser, policy, canvas):
                probability = sum(step_log_probs(denoiser, policy, step, TEMPERATURE))[0].exp()
                total = total + probability * expected_reward(denoiser, policy, reward, after, known)
        else:
            total = torch.tensor(reward(canvas), dtype=torch.float64)
        known[key(canvas)] = total
    return known[key(canvas)]


def key(canvas: Canvas) -> tuple:
    """What tells a canvas of one row from others: its tokens and the number of steps that led to it."""
    return (*canvas.tokens[0].tolist(), int(canvas.steps[0]))


def policy_gradient_surrogate(
    denoiser: TabularDenoiser,
    policy: UnmaskingPolicy,
    reward: Callable[[Canvas], float],
    canvas: Canvas,
    *,
    positions: bool = True,
    through_confidences: bool = True,
) -> Tensor:
    """``E[R * log p(episode)]``, a float64 scalar of whose factors only log p is differentiated: REINFORCE, expected.

    Episodes that share a canvas are added up: ``sum over canvases and steps of p(canvas) * p(step) * E[R | after it] *
    log p(step)``.

    Args:
        denoiser, policy, reward, canvas: as for `expected_reward`.
        positions: whether the factor of the policy is in log p, beside that of the tokens.
        through_confidences: as for `step_log_probs`.
    """
    known: dict[tuple, Tensor] = {}
    with torch.no_grad():
        expected_reward(denoiser, policy, reward, canvas, known)
    total = torch.zeros((), dtype=torch.float64)
    reached = {key(canvas): (canvas, 1.0)}
    while reached:
        later: dict[tuple, tuple[Canvas, float]] = {}
        for before, probability in reached.values():
            for step, after in steps_from(denoiser, policy, before) if before.masked.any() else ():
                of_positions, of_tokens = step_log_probs(denoiser, policy, step, TEMPERATURE, through_confidences)
                both = (of_positions + of_tokens)[0]
                taken = probability * both.exp().item()
                total = total + taken * known[key(after)].item() * (both if positions else of_tokens[0])
                later[key(after)] = (after, later.get(key(after), (after, 0.0))[1] + taken)
        reached = later
    return total
