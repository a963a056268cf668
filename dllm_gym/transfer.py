"""Transfers between the host and a device: the only places where one waits for the other."""

from __future__ import annotations

import torch
from torch import Tensor


def onto(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors on a device. Those that come from the CPU are sent without waiting for the device."""
    return tuple(_send(tensor, device) for tensor in tensors)


def read(tensor: Tensor) -> Tensor:
    """The tensor on the CPU; waits until the device has computed it."""
    return tensor.cpu()


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    pinned = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    return pinned.to(device, non_blocking=True)
