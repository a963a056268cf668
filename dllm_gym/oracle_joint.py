"""The default joint distribution of the oracle: what its denoiser decodes and what its task judges both come from here.

Five sentences of four words, each word once. Taken one by one, the likeliest words of the four positions spell
"a a d d", which is none of them: unmasking in parallel goes wrong here, also at temperature 0.
"""

from __future__ import annotations

import string
from collections.abc import Mapping

import numpy as np

WORDS = string.ascii_lowercase
"""Token v of a joint is the v-th letter."""
PROMPT = "make one :"
"""The prompt of every problem; the joint does not depend on it."""
SENTENCES = {"a b c d": 0.30, "c a d b": 0.24, "b a d c": 0.19, "a c b d": 0.15, "d a b c": 0.12}
"""The support proper, with its weights."""
SMOOTHING = 0.02
"""Share of the probability that is spread evenly over all sequences, so that every conditional exists."""


def mixture(sentences: Mapping[str, float] = SENTENCES, smoothing: float = SMOOTHING) -> np.ndarray:
    """The joint ``(1 - smoothing) * sentences + smoothing * uniform``.

    Args:
        sentences: weights of sentences of L space-separated letters, the first V of the alphabet; need not sum to 1.
        smoothing: in [0, 1].

    Returns:
        ``[V] * L`` float64: entry ``[v_1, ..., v_L]`` is the probability of that sequence.

    Raises:
        ValueError: sentences of different lengths or with other words, a weight below 0, smoothing out of range.
    """
    rows = [sentence.split() for sentence in sentences]
    if len({len(row) for row in rows}) != 1 or not {word for row in rows for word in row} <= set(WORDS):
        raise ValueError(f"sentences={list(sentences)}: must be lower-case letters between spaces, all equally many.")
    weights = np.array(list(sentences.values()), dtype=np.float64)
    if not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
        raise ValueError(f"weights={weights.tolist()}: must be 0 or more, not all of them 0.")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing={smoothing}: must be from 0 to 1.")
    tokens = np.array([[WORDS.index(word) for word in row] for row in rows])
    joint = np.zeros((tokens.max() + 1,) * tokens.shape[1])
    joint[tuple(tokens.T)] = weights / weights.sum()
    return (1 - smoothing) * joint + smoothing / joint.size
