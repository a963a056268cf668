"""The threads and processes of a training."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh

Items = TypeVar("Items", np.ndarray, Tensor)


class Processes:
    """The processes of a training: this one alone, or all that a launcher has started.

    Args:
        accelerator: accelerate's; None for one process alone.
        device: of one process alone: "auto", or as torch names it.

    Attributes:
        device: what was given, or with an accelerator the device that is this process's own.
        rank: number of this process, from 0.
        count: number of processes.
        main: whether this is the one that writes and prints.
    """

    def __init__(self, accelerator: Accelerator | None = None, device: str | torch.device = "cpu"):
        self._accelerator = accelerator
        self.device = accelerator.device if accelerator else device
        self.rank = accelerator.process_index if accelerator else 0
        self.count = accelerator.num_processes if accelerator else 1
        self.main = self.rank == 0

    def own(self, items: Items) -> Items:
        """This process's share of what all of them have drawn alike."""
        return items[self.rank :: self.count]

    def check_share(self, name: str, count: int) -> None:
        """Raise ValueError where there is less than one item for each process."""
        if count < self.count:
            raise ValueError(f"{name}={count}: must be at least the number of processes, {self.count}.")

    def whole(self, values: Tensor, size: int) -> Tensor:
        """What belongs to all ``size`` items, put together from the ``values`` ``[own]`` of each process's `own`."""
        everything = values.new_zeros(size)
        everything[self.rank :: self.count] = values
        return self._accelerator.reduce(everything) if self._accelerator else everything

    def rng(self, seed: int, step: int) -> np.random.Generator:
        """This process's generator, which follows from (seed, step, rank): a resumed run needs no generator state."""
        return np.random.default_rng([seed, step, self.rank])

    @functools.cached_property
    def mesh(self) -> DeviceMesh:
        """All processes, as torch's sharding names them."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(torch.device(self.device).type, (self.count,))

    def most(self, number: int) -> int:
        """The largest of the processes' numbers; all must ask."""
        if self._accelerator is None:
            return number
        return int(self._accelerator.gather(torch.tensor([number], device=self.device)).max())

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all must ask."""
        if self._accelerator is None:
            return flag
        return bool(self._accelerator.reduce(torch.tensor(float(flag), device=self.device)) > 0)

    def sum(self, values: Mapping[str, Tensor | float]) -> dict[str, float]:
        """The sums over all processes of scalars; all must ask, for the same names."""
        if self._accelerator is None:
            return {name: float(value) for name, value in values.items()}
        stacked = torch.stack([torch.as_tensor(value).to(self.device, torch.float64) for value in values.values()])
        return dict(zip(values, self._accelerator.reduce(stacked, reduction="sum").tolist(), strict=True))

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient with its sum over all processes; all must ask. The sums are alike bit for bit."""
        if self._accelerator is None:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = self._accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="sum")
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def moments(self, values: Tensor) -> tuple[float, float]:
        """Mean and standard deviation of the values ``[N]`` of all processes; all must ask."""
        values = values.detach().cpu().double()  # which not every device has
        sums = self.sum({"sum": values.sum(), "count": float(len(values))})
        mean = sums["sum"] / sums["count"]
        squares = self.sum({"squares": (values - mean).square().sum()})["squares"]
        return mean, (squares / max(1.0, sums["count"] - 1)) ** 0.5

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes; all must ask."""
        return self._accelerator.reduce(values, reduction="mean") if self._accelerator else values

    def agree(self, settings: dict[str, Any]) -> None:
        """Raise ValueError in all processes where one has other settings than the main one; all must ask."""
        if self._accelerator is None:
            return
        from accelerate.utils import gather_object

        first, *others = gather_object([settings])
        for rank, other in enumerate(others, start=1):
            for name in first:
                if other.get(name) != first[name]:
                    raise ValueError(
                        f"process {rank} has {name} {other.get(name)!r}, process 0 {first[name]!r}: "
                        "all processes of a training need the same."
                    )

    def lost(self, error: RuntimeError) -> bool:
        """Whether an error says that another process cannot be reached."""
        kinds = (torch.distributed.DistNetworkError, torch.distributed.DistBackendError)
        return self.count > 1 and (isinstance(error, kinds) or "gloo" in str(error))

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self._accelerator:
            self._accelerator.wait_for_everyone()


def launched(device: str) -> Processes:
    """The processes that `torchrun` or `accelerate launch` has started; this one alone where neither has.

    Args:
        device: "auto", "cpu", "cuda" or another of torch's; with several processes, each gets its own GPU.

    Raises:
        ValueError: several processes on one given device.
    """
    if _world_size() == 1:
        return Processes(device=device)
    from accelerate import Accelerator

    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"env.device={device!r}: several processes need 'auto', 'cpu' or 'cuda'.")
    return Processes(Accelerator(cpu=device == "cpu" or not torch.cuda.is_available()))


def alone(algorithm: str) -> None:
    """Raise ValueError where a launcher has started several processes of an algorithm that trains in one."""
    if (count := _world_size()) > 1:
        raise ValueError(f"{algorithm} trains in one process, not in {count}: start it without a launcher.")


def _world_size() -> int:
    """Number of processes, as launchers tell the processes that they start."""
    return int(os.environ.get("WORLD_SIZE", 1))


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
