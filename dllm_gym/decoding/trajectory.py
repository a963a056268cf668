"""The trajectory of an episode: at each step a canvas, and the tokens that were written on it.

``sum over steps and written tokens of log p(token | canvas of the step)`` is the exact log-probability of what the
denoiser drew, given the positions that the sampler chose. No bound is needed, and no consistency of the denoiser.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_gym.decoding.corruption import Corruption


@dataclass
class Trajectories:
    """N steps of E episodes, those of an episode together and in order."""

    masked: Tensor
    """``[N, L]`` bool: masked before the step."""
    written: Tensor
    """``[N, L]`` bool: written in the step by a draw of the denoiser; not what is filled in after an end."""
    episode: Tensor
    """``[N]`` int64 in 0..E-1, ascending."""


def draw_steps(counts: Tensor, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Some steps of each episode: of T, k = min(steps, T) are drawn, all subsets alike, and each weighs T / k.

    Args:
        counts: ``[E]`` int64, T of each episode.
        steps: number per episode.
        generator: all that is drawn comes from it.

    Returns:
        Numbers of the steps, ``[m, E]`` int64 with m = min(steps, the largest T), and their weights, ``[m, E]``
        float32; where an episode has fewer, step 0 with weight 0.
    """
    place = torch.arange(int(counts.max()), device=counts.device)
    ranks = torch.rand(len(counts), len(place), generator=generator, device=counts.device)
    chosen = ranks.masked_fill(place >= counts[:, None], torch.inf).argsort(dim=1)[:, :steps].T
    drawn = counts.clamp(max=steps)
    is_drawn = torch.arange(len(chosen), device=counts.device)[:, None] < drawn
    return torch.where(is_drawn, chosen, 0), is_drawn * (counts / drawn)


def sample_steps(
    trajectories: Trajectories, prompt_mask: Tensor, steps: int, generator: torch.Generator, merge: int = 1
) -> Corruption:
    """Some steps of each episode as maskings of its completion: what was written there is scored.

    ``mean over maskings of sum(weight * log p)`` estimates the log-probability of the trajectory without bias if
    ``merge`` is 1; `draw_steps` draws.

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
    chosen, step_weight = draw_steps(-(-counts // merge), steps, generator)
    start, scoring = chosen * merge, step_weight > 0
    scored = torch.zeros((*start.shape, length), dtype=torch.bool, device=device)
    for step in range(merge):
        within = scoring & (start + step < counts)
        row = first + torch.where(within, start + step, 0)
        scored |= trajectories.written[row] & within[..., None]
    weight = scored * (steps * step_weight)[..., None]
    masked = trajectories.masked[first + start]
    if lacking := steps - len(chosen):  # no episode has so many steps
        scored, weight, masked = (torch.cat([x, x.new_zeros(lacking, *x.shape[1:])]) for x in (scored, weight, masked))
    prompt_masked = torch.zeros((steps, *prompt_mask.shape), dtype=torch.bool, device=device)
    return Corruption(masked, scored, weight, prompt_masked)
