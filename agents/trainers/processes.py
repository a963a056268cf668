"""The threads and processes of a training."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch


def own_threads(train: Callable) -> Callable:
    """A decorator: ``train`` runs with its config's ``threads`` of torch, and leaves as many as it found."""

    @functools.wraps(train)
    def limited(*args, **kwargs):
        threads = inspect.signature(train).bind(*args, **kwargs).arguments["config"].threads
        before = torch.get_num_threads()
        if threads:
            torch.set_num_threads(threads)
        try:
            return train(*args, **kwargs)
        finally:
            torch.set_num_threads(before)

    return limited
