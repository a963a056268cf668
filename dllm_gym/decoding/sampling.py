"""Drawing tokens from logits: tempered, filtered, and read off the inverse distribution function."""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_gym.types import TokenSampling


def drawing_logits(logits: Tensor, sampling: TokenSampling) -> Tensor:
    """Logits ``[N, V]`` of the distribution that tokens are drawn from: tempered, minus infinity at what is left out.

    ``top_k`` and ``top_p`` are both read off the tempered distribution, and a token must pass both, as in Dream's
    published code. At temperature 0 nothing is tempered.
    """
    tempered = logits / (sampling.temperature or 1.0)
    if sampling.top_k is None and sampling.top_p == 1:
        return tempered
    ordered, order = tempered.sort(dim=-1, descending=True, stable=True)
    left_out = torch.zeros_like(ordered, dtype=torch.bool)
    if sampling.top_k is not None:
        left_out[:, sampling.top_k :] = True
    if sampling.top_p < 1:
        probability = ordered.softmax(dim=-1)
        before = probability.cumsum(dim=-1) - probability  # the mass of more probable tokens: 0 for the first
        left_out |= before >= sampling.top_p
    return tempered.masked_fill(torch.zeros_like(left_out).scatter(1, order, left_out), -torch.inf)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens ``[N]`` int64 from logits ``[N, V]``, by one uniform number in [0, 1) for each, ``[N]`` float32."""
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Rounding may reach the total, where no token is left that can be.
    drawn = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, drawn, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)  # NaN: V
