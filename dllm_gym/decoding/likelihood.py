"""Likelihood surrogates of a completion, from the log-probabilities of its masked tokens under n maskings.

Pure functions; shapes as in `dllm_gym.decoding.corruption`: ``log_prob``, ``weight``, ``scored`` are
``[n, B, L]``. Each returns ``[B, L]``, one term a token; the sequence's surrogate is the sum over L.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def elbo(log_prob: Tensor, weight: Tensor) -> Tensor:
    """Evidence lower bound: ``mean_n(w * log p)``, at or below log p(x | c) in expectation (arXiv 2502.09992).

    With the maskings and weights of "full" corruption it is the mean-field surrogate of d1 (arXiv 2504.12216).
    """
    return (weight * log_prob).mean(dim=0)


def eubo(log_prob: Tensor, weight: Tensor, scored: Tensor, beta: float) -> Tensor:
    """Evidence upper bound of Renyi order beta >= 1: ``1 / beta * log mean_n(w * p^beta)`` (SPG, arXiv 2510.09541).

    The mean is inside the log, token by token, over all n maskings; a token that none of them scores drops out. In
    expectation over maskings it is at or above log p(x | c) for a denoiser that comes from a joint distribution, never
    below the ELBO, and non-decreasing in beta; with few maskings neither need hold.

    Raises:
        ValueError: beta below 1.
    """
    if beta < 1:
        raise ValueError(f"beta={beta}: must be 1 or more.")
    counted = scored & (weight > 0)
    terms = torch.where(counted, beta * log_prob + torch.where(counted, weight, 1.0).log(), -torch.inf)
    seen = counted.any(dim=0)
    terms = torch.where(seen, terms, 0.0)  # logsumexp of nothing has no gradient
    return torch.where(seen, (terms.logsumexp(dim=0) - math.log(len(terms))) / beta, 0.0)


def mixture(log_prob: Tensor, weight: Tensor, scored: Tensor, beta: float, omega: float) -> Tensor:
    """``omega * EUBO + (1 - omega) * ELBO``, SPG's surrogate for negative traces."""
    return omega * eubo(log_prob, weight, scored, beta) + (1 - omega) * elbo(log_prob, weight)
