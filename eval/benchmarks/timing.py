"""What the benchmarks measure with."""

from __future__ import annotations

import time

import numpy as np
import torch


def now(device: torch.device) -> float:
    """Seconds, after all that the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median(values: np.ndarray, form: str, unit: str = "") -> str:
    """The median, and the least and the most in brackets."""
    return f"{np.median(values):{form}}{unit} [{values.min():{form}}, {values.max():{form}}]"
