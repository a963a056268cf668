"""A sampler from text, as it is written on a command line."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import torch

from dllm_gym.agents.heuristics import HEURISTICS, make_policy
from dllm_gym.agents.policy import UnmaskingPolicy, load_policy
from dllm_gym.agents.rollout import Policy


def make_sampler(text: str, seed: int = 0, device: torch.device | str = "cpu") -> Policy:
    """A heuristic's name with arguments (``threshold:threshold=0.9``), or the folder of a trained policy, for a device.

    Raises:
        ValueError: neither a heuristic's name nor a policy's folder, or arguments that the heuristic does not take.
    """
    name, _, rest = text.partition(":")
    if name not in HEURISTICS:
        if not Path(text).is_dir():
            raise ValueError(
                f"sampler={text!r}: must be one of {sorted(HEURISTICS)}, with arguments as in threshold:threshold=0.9, "
                f"or the folder of a trained policy."
            )
        return load_policy(text).to(device).seed(seed)
    arguments = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            equals = ""
        if not equals or not isinstance(arguments[key], int | float):
            raise ValueError(f"sampler={text!r}: {part!r} is not of the form argument=number.")
    if "seed" in HEURISTICS[name].__dataclass_fields__:
        arguments = {"seed": seed} | arguments
    return make_policy(name, **arguments)


def reseeded(sampler: Policy, seed: int) -> Policy:
    """The same sampler, what it draws following from ``seed``; one that draws nothing as it is."""
    if isinstance(sampler, UnmaskingPolicy):
        return sampler.seed(seed)
    fields = {field.name for field in dataclasses.fields(sampler)}
    return dataclasses.replace(sampler, seed=seed) if "seed" in fields else sampler
