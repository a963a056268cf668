"""Learning-rate schedules."""

from __future__ import annotations

import math


def cosine(iteration: int, iterations: int, warmup: int) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine to zero."""
    if iteration < warmup:
        return (iteration + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (iteration - warmup) / max(1, iterations - warmup)))
