"""Learning-rate schedules."""

from __future__ import annotations

import math
from typing import Protocol

WAITING = 0.1
"""Factor on the learning rate of a network that waits."""


class Scheduled(Protocol):
    """A config of a training that ends after iterations, or with a budget of forward passes."""

    iterations: int
    forwards: int | None
    warmup: int


def rate_factor(config: Scheduled, iteration: int, forwards: float) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine to zero at the end of the training.

    ``forwards`` are those of the iterations before; they are read where the config has a budget of them.
    """
    if config.forwards is None:
        return cosine(iteration, config.iterations, config.warmup)
    return min(1.0, (iteration + 1) / max(1, config.warmup)) * decay(forwards / config.forwards)


def delayed_factor(config: Scheduled, iteration: int, forwards: float, after: float) -> float:
    """Factor on the learning rate of a network that waits for another: `WAITING`, then 1 and a cosine to zero.

    ``after`` is the share of the training at which it begins in earnest. Warm-up as in `rate_factor`.
    """
    done = iteration / config.iterations if config.forwards is None else forwards / config.forwards
    warm = min(1.0, (iteration + 1) / max(1, config.warmup))
    return warm * (WAITING if done < after else decay((done - after) / (1 - after)))


def cosine(iteration: int, iterations: int, warmup: int) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine to zero."""
    if iteration < warmup:
        return (iteration + 1) / warmup
    return decay((iteration - warmup) / max(1, iterations - warmup))


def decay(progress: float) -> float:
    """A cosine from 1 to 0, for a progress from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
