"""The threads and processes of a training."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


class Processes:
    """The processes of a training: this one alone, or all that a launcher has started.

    Args:
        accelerator: accelerate's; None for one process alone.

    Attributes:
        rank: number of this process, from 0.
        count: number of processes.
        main: whether this is the one that writes and prints.
    """

    def __init__(self, accelerator: Accelerator | None = None):
        self._accelerator = accelerator
        self.rank = accelerator.process_index if accelerator else 0
        self.count = accelerator.num_processes if accelerator else 1
        self.main = self.rank == 0

    def own(self, items: np.ndarray) -> np.ndarray:
        """This process's share of what all of them have drawn alike."""
        return items[self.rank :: self.count]

    def rng(self, seed: int, step: int) -> np.random.Generator:
        """This process's generator, which follows from (seed, step, rank): a resumed run needs no generator state."""
        return np.random.default_rng([seed, step, self.rank])

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all must ask."""
        if self._accelerator is None:
            return flag
        return bool(self._accelerator.reduce(torch.tensor(float(flag), device=self._accelerator.device)) > 0)

    def sum(self, values: dict[str, Tensor]) -> dict[str, float]:
        """The sums over all processes of scalar tensors; all must ask, for the same names."""
        stacked = torch.stack([value.float() for value in values.values()])
        if self._accelerator:
            stacked = self._accelerator.reduce(stacked, reduction="sum")
        return dict(zip(values, stacked.tolist(), strict=True))

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes; all must ask."""
        return self._accelerator.reduce(values, reduction="mean") if self._accelerator else values

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self._accelerator:
            self._accelerator.wait_for_everyone()


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
