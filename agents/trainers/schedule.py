"""Learning-rate schedules."""

from __future__ import annotations

import math


def cosine(iteration: int, iterations: int, warmup: int) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine to zero."""
    if iteration < warmup:
        return (iteration + 1) / warmup
    return decay((iteration - warmup) / max(1, iterations - warmup))


def decay(progress: float) -> float:
    """A cosine from 1 to 0, for a progress from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
