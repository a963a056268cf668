"""Randomness that follows from a seed, and leaves the process's own generators as they were."""

from __future__ import annotations

import random
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int):
    """Seed torch's global generator inside: weight initialisers accept no other generator. All are restored after."""
    python, legacy = random.getstate(), np.random.get_state()  # Stable-Baselines3 seeds them too
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
