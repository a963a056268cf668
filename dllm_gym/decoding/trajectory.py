"""The trajectory of an episode: at each step a canvas, and the tokens that were written on it.

``sum over steps and written tokens of log p(token | canvas of the step)`` is the exact log-probability of what the
denoiser drew, given the positions that the sampler chose. No bound is needed, and no consistency of the denoiser.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_gym.decoding.corruption import Corruption

BASE = 0.1
"""Share of the mean size that is added to every step's; it bounds the weight of one that is drawn all the same."""


@dataclass
class Trajectories:
    """N steps of E episodes, those of an episode together and in order."""

    masked: Tensor
    """``[N, L]`` bool: masked before the step."""
    written: Tensor
    """``[N, L]`` bool: written in the step by a draw of the denoiser; not what is filled in after an end."""
    episode: Tensor
    """``[N]`` int64 in 0..E-1, ascending."""
    doubt: Tensor
    """``[N]`` float32, 0 or more: how far from sure the denoiser was of what it wrote, see `doubt`."""


def doubt(probability: Tensor, written: Tensor, temperature: float) -> Tensor:
    """The sum over written tokens of 1 - p, which bounds how long the gradient of their log p can be.

    p is a token's probability at the temperature, as if one other token had all the rest.

    Args:
        probability: ``[N, L]`` float32, untempered. written: ``[N, L]`` bool. temperature: above 0.

    Returns:
        ``[N]`` float32.
    """
    return (torch.sigmoid(-torch.logit(probability, eps=1e-6) / temperature) * written).sum(dim=1)


def draw_steps(size: Tensor, counts: Tensor, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Some steps of each episode, in proportion to their size, each weighted by 1 / its probability of being drawn.

    A weighted sum over drawn steps estimates the sum over all without bias (Horvitz and Thompson, 1952). Of T steps,
    min(steps, T) are drawn, by systematic sampling: one random offset places equal distances over the steps in order.

    Args:
        size: ``[E, T]`` float32, 0 or more. A `BASE` of their mean is added, so that every step can be drawn.
        counts: ``[E]`` int64, the number of steps of each episode; later columns of ``size`` are ignored.
        steps: number per episode.
        generator: all that is drawn comes from it.

    Returns:
        Numbers of the steps, ``[m, E]`` int64 with m = min(steps, T), and their weights, ``[m, E]`` float32; where an
        episode has fewer, weight 0.
    """
    exists = torch.arange(size.shape[1], device=size.device) < counts[:, None]
    share = torch.where(exists, size.double(), 0.0)
    share = torch.where(exists, share + BASE * share.sum(dim=1, keepdim=True) / counts[:, None] + 1e-9, 0.0)
    number = counts.clamp(max=steps)
    probability, certain = torch.zeros_like(share), torch.zeros_like(exists)
    for _ in range(steps):  # what would be drawn more than once is certain, and the others share what is left
        rest = share.masked_fill(certain, 0.0)
        left = (number - certain.sum(dim=1))[:, None]
        probability = torch.where(certain, 1.0, rest * left / rest.sum(dim=1, keepdim=True).clamp(min=1e-12))
        certain = probability >= 1
    offset = torch.rand(len(counts), 1, generator=generator, device=counts.device, dtype=torch.float64)
    ends = torch.cat([offset, offset + probability.cumsum(dim=1)], dim=1).floor()
    drawn = ends[:, 1:] > ends[:, :-1]
    chosen = (~drawn).long().argsort(dim=1, stable=True)[:, :steps]
    weight = (drawn / probability.clamp(min=1e-12)).gather(1, chosen)
    return chosen.T, weight.T.float()


def of_episodes(values: Tensor, counts: Tensor) -> Tensor:
    """Values ``[N]`` of steps as ``[E, T]``, zeros where an episode has fewer; ``counts`` ``[E]`` sum to N."""
    exists = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
    return values.new_zeros(exists.shape).masked_scatter(exists, values)


def sample_steps(
    trajectories: Trajectories, prompt_mask: Tensor, steps: int, generator: torch.Generator, merge: int = 1
) -> Corruption:
    """Some steps of each episode as maskings of its completion: what was written there is scored.

    ``mean over maskings of sum(weight * log p)`` estimates the log-probability of the trajectory without bias if
    ``merge`` is 1; `draw_steps` draws, in proportion to the doubt.

    Args:
        trajectories: of E episodes.
        prompt_mask: ``[E, P]`` bool.
        steps: n, the number of maskings. Where an episode has fewer steps, the last maskings score nothing.
        generator: all that is drawn comes from it.
        merge: so many consecutive steps are scored as one, on the canvas of the first; the estimate is then biased.

    Returns:
        n maskings of E completions.
    """
    device, length = trajectories.masked.device, trajectories.masked.shape[1]
    counts = torch.bincount(trajectories.episode, minlength=len(prompt_mask))
    first = counts.cumsum(0) - counts
    by_step = of_episodes(trajectories.doubt, counts)
    by_group = F.pad(by_step, (0, -by_step.shape[1] % merge)).unflatten(1, (-1, merge)).sum(dim=2)
    chosen, step_weight = draw_steps(by_group, -(-counts // merge), steps, generator)
    start, scoring = chosen * merge, step_weight > 0
    scored = torch.zeros((*start.shape, length), dtype=torch.bool, device=device)
    for after in range(merge):
        within = scoring & (start + after < counts)
        row = first + torch.where(within, start + after, 0)
        scored |= trajectories.written[row] & within[..., None]
    weight = scored * (steps * step_weight)[..., None]
    masked = trajectories.masked[first + torch.where(scoring, start, 0)]
    if lacking := steps - len(chosen):  # no episode has so many steps
        scored, weight, masked = (torch.cat([x, x.new_zeros(lacking, *x.shape[1:])]) for x in (scored, weight, masked))
    prompt_masked = torch.zeros((steps, *prompt_mask.shape), dtype=torch.bool, device=device)
    return Corruption(masked, scored, weight, prompt_masked)
