"""Figures of a finished evaluation: pure functions of arrays with one row per problem and one column a sample."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import comb, exp

import numpy as np

from dllm_gym.agents.evaluation import summarise


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """Probability that one of k samples is right, unbiased: ``1 - C(n - c, k) / C(n, k)`` (arXiv 2107.03374).

    Args:
        correct: ``[N, n]`` bool.
        k: 1 to n.

    Returns:
        ``[N]`` float64, one per problem.

    Raises:
        ValueError: k below 1 or above n.
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k={k}: must be 1 to {n}, the samples of a problem.")
    wrong = n - correct.sum(axis=1)
    return np.array([1 - comb(int(w), k) / comb(n, k) for w in wrong])


def distinct(completions: Sequence[Sequence[str]]) -> np.ndarray:
    """``[N]`` float64: different texts among the samples of a problem, as a share of the samples."""
    return np.array([len({" ".join(text.split()) for text in texts}) / len(texts) for texts in completions])


def aup(tokens_per_forward: Sequence[float], accuracy: Sequence[float], best: float | None = None) -> float:
    """Accuracy under parallelism: one figure for a whole front of accuracy over tokens per forward (arXiv 2601.07568).

    ``p_1 y_1 + sum_i (p_i - p_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2`` in rising order of the tokens per forward
    p, accuracies y in percent, ``W(y) = min(exp(-3 (1 - y / best)), 1)``. Points more than 5 points below that of
    the least parallelism are left out.

    Args:
        tokens_per_forward, accuracy: one entry a setting of the sampler; accuracy in [0, 1].
        best: accuracy that counts in full; None: the highest of these. Samplers that are compared need a common one.

    Raises:
        ValueError: no points, or unequally many.
    """
    if not len(accuracy) or len(accuracy) != len(tokens_per_forward):
        raise ValueError(
            f"{len(tokens_per_forward)} and {len(accuracy)} values: must be equal in number, and 1 or more."
        )
    points = sorted((p, 100 * y) for p, y in zip(tokens_per_forward, accuracy, strict=True))
    points = [(p, y) for p, y in points if y >= points[0][1] - 5]
    highest = max(y for _, y in points) if best is None else 100 * best

    def weighed(y: float) -> float:
        return y * min(exp(-3 * (1 - y / highest)), 1) if highest else 0.0

    steps = pairwise(points)
    return points[0][0] * points[0][1] + sum((p - q) * (weighed(y) + weighed(z)) / 2 for (q, z), (p, y) in steps)


def summary(cell) -> dict:
    """Means of a `dllm_gym.eval.results.Cell`, with 95 % bootstrap intervals over problems where they are quoted.

    ``accuracy``, ``nfe``, ``reward`` and their ``*_interval``; ``positions`` forwarded per completion, None in files of
    earlier versions; ``tokens_per_forward`` = response tokens / forwards (the end token is one of them); ``pass_at_k``
    for k = 1, 2, 4, ... and n; ``entropy`` in nats, the mean of minus the log-likelihood (that of whole completions at
    temperature 1 and one token per step, elsewhere not quite an entropy);
    ``distinct`` texts per sample; ``undecided``, how many verdicts were not reached, by reason;
    ``tokens_per_second`` of response, None where the evaluation has not come to its end.
    """
    by_problem = {"accuracy": cell.correct, "nfe": cell.nfe, "reward": cell.reward}
    figures = summarise({name: values.mean(axis=1) for name, values in by_problem.items()})
    samples = cell.correct.shape[1]
    ks = sorted({2**i for i in range(samples.bit_length())} | {samples})
    end = cell.end or {}
    return figures | {
        "positions": None if cell.positions is None else float(cell.positions.mean()),
        "tokens_per_forward": float(cell.length.sum() / cell.nfe.sum()),
        "pass_at_k": {str(k): float(pass_at_k(cell.correct, k).mean()) for k in ks},
        "entropy": float(-cell.log_likelihood.mean()),
        "distinct": float(distinct([record["completion"] for record in cell.problems]).mean()),
        "undecided": cell.undecided,
        "tokens_per_second": end["tokens"] / end["seconds"] if end.get("seconds") else None,
    }


def interquartile_mean(values: np.ndarray) -> float:
    """The mean of what is left without the lowest and the highest quarter (arXiv 2108.13264)."""
    cut = len(values) // 4
    return float(np.sort(values)[cut : len(values) - cut].mean())


def probability_of_improvement(first: np.ndarray, second: np.ndarray) -> float:
    """How often a run of the first is above one of the second, over all pairs; equal ones count half."""
    difference = np.subtract.outer(first, second)
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())
