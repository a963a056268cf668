"""What a checkpoint holds as JSON and safetensors: nested dicts, lists, numbers and tensors. Nothing is pickled."""

from __future__ import annotations

from typing import Any

import torch

from dllm_gym.agents.trainers.sharding import ShardFiles, is_sharded


def pack(value: Any, name: str, tensors: dict[str, torch.Tensor], shards: dict[str, torch.Tensor]) -> Any:
    """``value`` as JSON, its tensors moved into ``tensors`` under their path, this process's part of sharded ones into
    ``shards``."""
    if is_sharded(value):
        shards[name] = value.to_local().detach().clone().contiguous()
        return {"sharded": [name, list(value.shape)]}
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, pack(item, f"{name}/{key}", tensors, shards)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [pack(item, f"{name}/{i}", tensors, shards) for i, item in enumerate(value)]}
    return value


def unpack(value: Any, tensors: dict[str, torch.Tensor], shards: ShardFiles | None) -> Any:
    """What `pack` was given, from its JSON and the tensors; sharded ones are read from the files of their shards."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "sharded":
        assert shards is not None
        return shards.read(*content)
    if kind == "dict":
        return {key: unpack(item, tensors, shards) for key, item in content}
    return [unpack(item, tensors, shards) for item in content]
