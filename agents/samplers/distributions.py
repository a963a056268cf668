"""Distributions over sets of positions, given one logit per position (arXiv 2512.09106, section 4).

A draw is a tensor ``picks`` ``[B, L]`` int64: 0 where a position is not picked, n where it is the n-th pick (a
Bernoulli draw has no order: all its picks are 1). Logits are ``[B, L]`` float, ``eligible`` ``[B, L]`` bool; nothing
outside ``eligible`` is ever picked or counted, and rows with nothing eligible have log-probability and entropy 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FAR = -1e9
"""Logit of what cannot be picked: finite, so that gradients stay finite."""


class Bernoulli:
    """Every eligible position on its own, with probability sigmoid(logit). The set may be empty."""

    def sample(self, logits: Tensor, eligible: Tensor, uniforms: Tensor) -> Tensor:
        """Draw ``picks`` with uniform numbers ``[B, L + 1]`` in [0, 1)."""
        return ((uniforms[:, :-1] < logits.sigmoid()) & eligible).long()

    def log_prob(self, logits: Tensor, eligible: Tensor, picks: Tensor) -> Tensor:
        """Log-probability ``[B]`` of the sets, in nats."""
        signed = torch.where(picks > 0, logits, -logits)
        return (F.logsigmoid(signed) * eligible).sum(dim=1)

    def entropy(self, logits: Tensor, eligible: Tensor, picks: Tensor) -> Tensor:
        """Exact entropy ``[B]`` in nats; ``picks`` is not needed."""
        p = logits.sigmoid()
        return (-(p * F.logsigmoid(logits) + (1 - p) * F.logsigmoid(-logits)) * eligible).sum(dim=1)


class DPLS:
    """Dynamic Plackett-Luce: a first pick by softmax, then picks without replacement against STOP, whose logit is 0.

    The set is never empty, unless nothing is eligible.
    """

    def sample(self, logits: Tensor, eligible: Tensor, uniforms: Tensor) -> Tensor:
        """Draw ordered ``picks`` with uniform numbers ``[B, L + 1]`` in [0, 1), all at once.

        Picks without replacement are a race of exponential clocks.

        Position i rings after Exp(rate exp(logit_i)); STOP starts its clock (rate 1) when the first position rings,
        as the other clocks have no memory.
        """
        # The logarithm of the ringing times, so that large logits stay distinct.
        clocks = (-torch.log1p(-uniforms)).clamp(min=1e-30).log()
        rings = torch.where(eligible, clocks[:, :-1] - logits, torch.inf)
        stop = torch.logaddexp(rings.amin(dim=1, keepdim=True), clocks[:, -1:])
        order = rings.argsort(dim=1).argsort(dim=1) + 1
        return torch.where(eligible & ((rings < stop) | (order == 1)), order, 0)

    def log_prob(self, logits: Tensor, eligible: Tensor, picks: Tensor) -> Tensor:
        """Log-probability ``[B]`` of the ordered picks and the STOP after them, in nats."""
        chosen, log_total, count = self._race(logits, eligible, picks)
        steps = torch.arange(chosen.shape[1], device=logits.device)
        total = torch.where(steps == 0, log_total[:, :-1], F.softplus(log_total[:, :-1]))
        picked = ((chosen - total) * (steps < count)).sum(dim=1)
        stop = F.softplus(log_total.gather(1, count))[:, 0]
        return (picked - stop) * (count[:, 0] > 0)

    def entropy(self, logits: Tensor, eligible: Tensor, picks: Tensor) -> Tensor:
        """Sum ``[B]`` over the path of ``picks`` of the entropy of each choice, in nats.

        Its mean over sampled picks is the entropy of the ordered draw (chain rule); no closed form is known.
        """
        chosen, log_total, count = self._race(logits, eligible, picks)
        weight = chosen.exp() * chosen
        rest = torch.cat([weight.flip(1).cumsum(1).flip(1), weight.new_zeros(len(weight), 1)], dim=1)
        total = F.softplus(log_total)
        entropy = total - rest / total.exp()
        first = log_total[:, :1] - rest[:, :1] / log_total[:, :1].exp()
        entropy = torch.cat([first, entropy[:, 1:]], dim=1)
        steps = torch.arange(entropy.shape[1], device=logits.device)
        return torch.where((steps <= count) & (count > 0), entropy, 0.0).sum(dim=1)

    @staticmethod
    def _race(logits: Tensor, eligible: Tensor, picks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits in the order of the picks ``[B, L]``, log-total of what is not yet picked ``[B, L + 1]``, count."""
        logits = logits.masked_fill(~eligible, FAR)
        order = torch.where(picks > 0, picks, logits.shape[1] + 1).argsort(dim=1, stable=True)
        ordered = logits.gather(1, order)
        log_total = ordered.flip(1).logcumsumexp(dim=1).flip(1)
        log_total = torch.cat([log_total, ordered.new_full((len(ordered), 1), FAR)], dim=1)
        return ordered, log_total, (picks > 0).sum(dim=1, keepdim=True)


DISTRIBUTIONS: dict[str, type[Bernoulli] | type[DPLS]] = {"bernoulli": Bernoulli, "dpls": DPLS}
