"""Weights, gradients and optimiser states spread over the processes, with torch's FSDP2 (`fully_shard`).

Decoding takes whole weights: rows end at different times, so the processes forward different numbers of times, and a
sharded forward would have to be in lockstep. So a denoiser in training exists twice: whole, in its own dtype, for
decoding and for scores without gradients; and sharded, in float32, for the update. After an update the whole weights
are gathered from the shards.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from safetensors import safe_open
from torch import Tensor, nn

if TYPE_CHECKING:  # torch's sharding takes seconds to import, and most runs do without
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    from dllm_gym.denoisers.pretrained import PretrainedDenoiser


def sharded_copy(denoiser: PretrainedDenoiser, mesh: DeviceMesh) -> PretrainedDenoiser:
    """A copy whose decoder layers are sharded, each by itself; `shard_rest` does it to what is around them.

    Weights in training are float32; they are gathered and computed with in the denoiser's dtype.
    """
    twin = copy.copy(denoiser)
    twin.model = copy.deepcopy(denoiser.model)
    for layer in twin.causal_lm.model.layers:  # one by one: the float32 copy of all never stands
        _shard(layer, denoiser, mesh)
    return twin


def shard_rest(module: nn.Module, twin: PretrainedDenoiser, mesh: DeviceMesh) -> nn.Module:
    """Shard a module around a `sharded_copy`: embedding, norm and head."""
    _shard(module, twin, mesh)
    return module


def _shard(module: nn.Module, denoiser: PretrainedDenoiser, mesh: DeviceMesh) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for parameter in module.parameters():
        if parameter.requires_grad and not is_sharded(parameter):
            parameter.data = parameter.data.float()
    policy = MixedPrecisionPolicy(param_dtype=denoiser.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(module, mesh=mesh, mp_policy=policy)


def is_sharded(value: Any) -> TypeGuard[DTensor]:
    """Whether a value is a tensor of which each process has a part."""
    return hasattr(value, "full_tensor")


def gathered(value: Tensor) -> Tensor:
    """A whole tensor; of a sharded one all processes must ask."""
    return value.full_tensor() if is_sharded(value) else value


def shard_file(rank: int, count: int) -> str:
    """Name of the file with a process's part of the sharded tensors of a checkpoint."""
    return f"shard-{rank + 1:05d}-of-{count:05d}.safetensors"


class ShardFiles:
    """The sharded tensors of a checkpoint, whatever number of processes wrote it.

    Args:
        folder: of the checkpoint.
        count: number of processes that wrote it.
        mesh: of the processes that read it.

    Raises:
        FileNotFoundError: a file is missing.
    """

    def __init__(self, folder: Path, count: int, mesh: DeviceMesh):
        self.mesh = mesh
        missing = [name for name in (shard_file(i, count) for i in range(count)) if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{len(missing)} of {count} shards are missing: {', '.join(missing[:4])}")
        self._files = [safe_open(folder / shard_file(i, count), framework="pt") for i in range(count)]

    def read(self, name: str, shape: list[int]) -> DTensor:
        """This process's rows of a tensor, as a `DTensor`."""
        from torch.distributed.tensor import DTensor, Shard

        local = self.rows(name, shape[0], self.mesh.get_local_rank(), self.mesh.size())
        whole = torch.empty(shape, device="meta")
        return DTensor.from_local(
            local.to(self.mesh.device_type), self.mesh, [Shard(0)], shape=whole.shape, stride=whole.stride()
        )

    def rows(self, name: str, total: int, rank: int, count: int) -> Tensor:
        """The rows that process ``rank`` of ``count`` has of a tensor with ``total`` rows, as FSDP2 deals them out."""
        size = -(-total // count)
        start, stop = min(rank * size, total), min((rank + 1) * size, total)
        parts, before = [], 0
        for file in self._files:
            part = file.get_slice(name)
            rows = part.get_shape()[0]
            low, high = max(start - before, 0), min(stop - before, rows)
            if low < high:
                parts.append(part[low:high])
            before += rows
        return torch.cat(parts) if parts else self._files[0].get_tensor(name)[:0]
