"""What is otherwise estimated, by enumeration of all canvases: likelihoods, bounds, and what a sampler produces."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import permutations

import torch
from torch import Tensor

from dllm_gym import decoding
from dllm_gym.denoisers.base import Denoiser
from dllm_gym.denoisers.oracle import TabularDenoiser, number
from dllm_gym.types import Action, Observation


def tempered(joint: Tensor, alpha: float, block_length: int | None = None) -> Tensor:
    """``joint**alpha / Z``, ``[V] * L``; with blocks the product of p(block | earlier)**alpha / Z(earlier)."""
    size, result = _block_length(block_length, joint.ndim), torch.ones_like(joint)
    for begin in range(0, joint.ndim, size):
        block, later = tuple(range(begin, begin + size)), tuple(range(begin + size, joint.ndim))
        marginal = joint.sum(dim=later, keepdim=True) if later else joint
        raised = (marginal / marginal.sum(dim=block, keepdim=True)).nan_to_num() ** alpha
        result = result * raised / raised.sum(dim=block, keepdim=True)
    return result.nan_to_num()


def random_order_log_likelihood(denoiser: Denoiser, x: Tensor, block_length: int | None = None) -> Tensor:
    """Log-probability that decoding one position at a time, in uniformly random order, at temperature 1, gives x.

    The log of the mean over all orders of the product of conditionals, by dynamic programming over the 2**L sets of
    masked positions. It is log p(x) for a consistent denoiser, and nowhere below `exact_elbo`.

    Args:
        denoiser: any that needs no prompt. Differentiable with respect to its parameters.
        x: ``[..., L]`` int64, complete sequences, L small.
        block_length: None, or blocks decoded left to right, the order random inside each.

    Returns:
        ``[...]`` float64.

    Raises:
        ValueError: a token of x that is no word, or a block_length that does not divide L.
    """
    length = x.shape[-1]
    masked = _subsets(length, x.device)
    log_prob = _log_prob(denoiser, x, masked)  # [B, 2**L, L]
    active = decoding.eligible(masked, _block_length(block_length, length))
    rest = [log_prob.new_zeros(len(log_prob))]  # log-probability of revealing the set of masked positions n
    for n in range(1, 1 << length):
        positions = active[n].nonzero()[:, 0].tolist()
        ways = [log_prob[:, n, i] + rest[n - (1 << i)] for i in positions]
        rest.append(torch.stack(ways).logsumexp(dim=0) - math.log(len(ways)))
    return rest[-1].view(x.shape[:-1])


def log_likelihood_of_orders(denoiser: Denoiser, x: Tensor) -> Tensor:
    """Log-probability of decoding x one position at a time in each order: ``[..., L!]`` float64.

    What the trajectory's likelihood is for a sampler that unmasks one position a step. Arguments and errors as
    `random_order_log_likelihood`, which is the log of the mean of its exponential.
    """
    length = x.shape[-1]
    log_prob = _log_prob(denoiser, x, _subsets(length, x.device))
    columns = []
    for order in permutations(range(length)):
        masked, steps = (1 << length) - 1, []
        for i in order:
            steps.append(log_prob[:, masked, i])
            masked -= 1 << i
        columns.append(torch.stack(steps).sum(dim=0))
    return torch.stack(columns, dim=-1).view(*x.shape[:-1], -1)


def exact_elbo(denoiser: Denoiser, x: Tensor) -> Tensor:
    """``E[ L/l * sum_{i masked} log p(x_i | y) ]``, l uniform on 1..L and a uniformly random set of l positions masked.

    What the corruptions "uniform" and "coupled" estimate (arXiv 2502.09992): the mean over all orders of the LOG of
    the product of conditionals. Arguments, result and errors as `random_order_log_likelihood`.
    """
    return exact_block_elbo(denoiser, x, x.shape[-1])


def exact_block_elbo(denoiser: Denoiser, x: Tensor, block_length: int) -> Tensor:
    """``E[ L/l * sum_{i masked in the block} log p(x_i | y) ]``: what the corruption "block" estimates.

    A uniformly random block: those before it clean, those after it masked, inside it l uniform on 1..block_length
    positions masked (SPG, arXiv 2510.09541). At most `random_order_log_likelihood` with the same block_length.
    """
    masked, scored, weight = _corruptions(x.shape[-1], block_length, x.device)
    terms = torch.where(scored, weight[:, None] * _log_prob(denoiser, x, masked), 0.0)
    return terms.sum(dim=(1, 2)).view(x.shape[:-1])


def exact_eubo(denoiser: Denoiser, x: Tensor, beta: float, block_length: int | None = None) -> Tensor:
    """``sum_i 1/beta * log E[ w * 1(i scored) * p(x_i | y)**beta ]`` (SPG, arXiv 2510.09541), masks as in the ELBO.

    ``E[ w * 1(i scored) ] = 1`` for every i, so that no constant is left over: it is at or above the ELBO, does not
    fall as beta rises, and is at or above log p(x) for a consistent denoiser (not for any).

    Args:
        denoiser, x, block_length: as `random_order_log_likelihood`.
        beta: more than 0; SPG has 1 or more.

    Returns:
        ``[...]`` float64, nats. Raises ValueError for another beta.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta}: must be more than 0.")
    masked, scored, weight = _corruptions(x.shape[-1], _block_length(block_length, x.shape[-1]), x.device)
    terms = weight.log()[:, None] + beta * _log_prob(denoiser, x, masked)
    return (torch.where(scored, terms, -torch.inf).logsumexp(dim=1) / beta).sum(dim=1).view(x.shape[:-1])


@torch.no_grad()
def sampling_distribution(
    denoiser: TabularDenoiser,
    policy: Callable[[Observation], Tensor],
    block_length: int | None = None,
    confidence_k: int = 1,
) -> Tensor:
    """The exact distribution over final sequences of decoding at temperature 1, without sampling.

    As the environment decodes, with ``empty_action="best"``: all canvases that may stand after n steps are followed at
    once, with their probabilities.

    Args:
        denoiser: of words and positions few enough to enumerate.
        policy: an Observation -> the set to unmask, ``[B, L]`` bool; a deterministic function of canvas, confidence,
            entropy and progress. ``observation.token`` holds the mask where nothing is written: no token is drawn yet.
        block_length: None, or blocks decoded left to right.
        confidence_k: probabilities per position that the policy sees.

    Returns:
        ``[V**L]`` float64, in the order of ``denoiser.sequences()``.

    Raises:
        ValueError: a block_length that does not divide L.
    """
    length, words, mask = denoiser.length, denoiser.num_words, denoiser.mask_token_id
    block_length = _block_length(block_length, length)
    canvas = decoding.blank([torch.zeros(0, dtype=torch.int64, device=denoiser.device)], length, mask)
    mass = torch.ones(1, dtype=torch.float64, device=denoiser.device)
    while canvas.masked.any():
        prediction = denoiser.predict(canvas, confidence_k)
        prediction = dataclasses.replace(prediction, token=torch.full_like(canvas.tokens, mask))
        seen = decoding.observe(canvas, prediction, block_length)
        chosen = decoding.with_best(policy(seen), seen) & seen.eligible
        probability = denoiser.logits(canvas.tokens)[..., :words].double().softmax(dim=-1)
        # One copy of a canvas for every choice of words at its chosen positions, position by position.
        source, drawn = torch.arange(len(canvas), device=denoiser.device), canvas.tokens
        for i in range(length):
            splits = chosen[source, i]
            whole, split = (~splits).nonzero()[:, 0], splits.nonzero()[:, 0]
            word = torch.arange(words, device=denoiser.device).repeat_interleave(len(split))
            rows = torch.cat([whole, split.repeat(words)])
            source, drawn, mass = source[rows], drawn[rows], mass[rows]
            drawn[len(whole) :, i] = word
            mass[len(whole) :] *= probability[source[len(whole) :], i, word]
        canvas = decoding.commit(
            canvas[source],
            dataclasses.replace(seen[source], token=drawn),
            Action.unmasking(chosen[source]),
            mask_token_id=mask,
            eos_token_id=denoiser.eos_token_id,
            eos_token_ids=None,
        )
    return mass.new_zeros(words**length).index_add(0, number(canvas.tokens, words), mass)


def _log_prob(denoiser: Denoiser, x: Tensor, masked: Tensor) -> Tensor:
    """Log-probability ``[B, N, L]`` float64 of the tokens of x ``[..., L]`` on each of N masked canvases ``[N, L]``."""
    mask = denoiser.mask_token_id
    if ((x < 0) | (x >= denoiser.vocab_size) | (x == mask)).any():
        raise ValueError(f"x: tokens must be 0 to {denoiser.vocab_size - 1} and not the mask, {mask}.")
    x = x.reshape(-1, 1, x.shape[-1])
    canvas = torch.where(masked, mask, x)
    logits = denoiser.logits(canvas.flatten(0, 1)).double().unflatten(0, canvas.shape[:2])
    log_prob = logits.index_fill(-1, torch.tensor([mask], device=x.device), -torch.inf).log_softmax(dim=-1)
    return log_prob.gather(-1, x.expand_as(canvas)[..., None])[..., 0]


def _subsets(n: int, device: torch.device) -> Tensor:
    """``[2**n, n]`` bool: bit i of the row's number."""
    return (torch.arange(1 << n, device=device)[:, None] >> torch.arange(n, device=device)) % 2 == 1


def _corruptions(length: int, block_length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """All canvases of the block corruption: masked ``[N, L]``, scored ``[N, L]``, and ``[N]`` probability x weight."""
    size = _block_length(block_length, length)
    subsets = _subsets(size, device)[1:]
    scored = torch.block_diag(*[subsets] * (length // size)).bool()
    block = torch.arange(length, device=device) // size
    later = block > (torch.arange(len(scored), device=device) // len(subsets))[:, None]
    weight = [1 / (n * math.comb(size, n)) for n in subsets.sum(dim=1).tolist()]
    return scored | later, scored, torch.tensor(weight * (length // size), dtype=torch.float64, device=device)


def _block_length(block_length: int | None, length: int) -> int:
    if block_length is None:
        return length
    if block_length < 1 or length % block_length:
        divisors = [n for n in range(1, length + 1) if length % n == 0]
        raise ValueError(f"block_length={block_length}: must divide the length {length}, one of {divisors}.")
    return block_length
