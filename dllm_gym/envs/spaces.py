"""Between the project's tensors and Gymnasium's spaces."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from dllm_gym.envs.episodes import Episodes
from dllm_gym.types import Observation

SIGNALS = ("confidence", "entropy", "token", "probability")


def observation_space(episodes: Episodes, observe: tuple[str, ...]) -> spaces.Dict:
    """The space of one row's observation. Raises ValueError for a signal that does not exist."""
    length, vocabulary = episodes.gen_length, episodes.denoiser.vocab_size
    signals: dict[str, spaces.Space] = {
        "confidence": spaces.Box(0.0, 1.0, (length, episodes.confidence_k), np.float32),
        "entropy": spaces.Box(0.0, math.ceil(math.log(vocabulary)), (length,), np.float32),
        "token": spaces.Box(0, vocabulary - 1, (length,), np.int64),
        "probability": spaces.Box(0.0, 1.0, (length,), np.float32),
    }
    unknown = [name for name in observe if name not in signals]
    if unknown or not observe:
        raise ValueError(f"observe={observe!r}: must name one or more of {SIGNALS}.")
    return spaces.Dict(
        {name: signals[name] for name in observe}
        | {
            "masked": spaces.MultiBinary(length),
            "eligible": spaces.MultiBinary(length),
            "progress": spaces.Box(0.0, 1.0, (1,), np.float32),
        }
    )


def observation_dict(observation: Observation, observe: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors that an environment shows, batch first, in the dtypes of its space."""
    return {name: getattr(observation, name) for name in observe} | {
        "masked": observation.masked.to(torch.int8),
        "eligible": observation.eligible.to(torch.int8),
        "progress": observation.progress[:, None].clamp(max=1.0),
    }


def flat_space(space: spaces.Space) -> spaces.Box:
    """The space of `flat` for one row."""
    flat = cast(spaces.Box, spaces.flatten_space(space))
    return spaces.Box(flat.low.astype(np.float32), flat.high.astype(np.float32))


def flat(shown: dict[str, Tensor]) -> Tensor:
    """``[B, n]`` float32: a Dict's entries, batch first, one after the other in alphabetical order of their keys."""
    return torch.cat([shown[name].flatten(1).float() for name in sorted(shown)], dim=1)


def observation_from_dict(shown: dict[str, Tensor], signals: tuple[str, ...]) -> Observation:
    """The way back, for policies that live behind a Gymnasium interface: tensors of an environment's Dict, batch first.

    Signals that the environment does not show are zeros, except those in ``signals``, which are required.

    Raises:
        ValueError: a required signal is not shown.
    """
    lacking = [name for name in signals if name not in shown]
    if lacking:
        raise ValueError(
            f"the policy reads {lacking}, which the environment does not show: make it with observe={signals}."
        )
    masked = shown["masked"].bool()
    zeros = torch.zeros(masked.shape, device=masked.device)
    return Observation(
        confidence=shown.get("confidence", zeros[..., None]).float(),
        entropy=shown.get("entropy", zeros).float(),
        token=shown.get("token", zeros).long(),
        masked=masked,
        eligible=shown["eligible"].bool(),
        progress=shown["progress"][:, 0].float(),
        probability=shown.get("probability", zeros).float(),
    )


def action_to_unmask(action: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A user's action as bool tensor. Raises ValueError for another shape, dtype or value.

    Floats are taken if all are 0 or 1: Stable-Baselines3 samples MultiBinary actions as float32.
    """
    allowed = f"must be {shape}, bool or numbers 0 and 1"
    try:
        tensor = torch.as_tensor(action if isinstance(action, Tensor) else np.array(action), device=device)
    except (TypeError, ValueError):
        raise ValueError(f"action of type {type(action).__name__} is not an array of numbers: {allowed}.") from None
    if tuple(tensor.shape) != shape:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"action of shape {tuple(tensor.shape)} and dtype {dtype}: {allowed}.")
    if tensor.dtype == torch.bool:
        return tensor
    wrong = tensor[(tensor != 0) & (tensor != 1)]
    if len(wrong):
        raise ValueError(f"action with the value {wrong[0].item()}: {allowed}, whether to unmask each position.")
    return tensor != 0
