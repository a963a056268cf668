"""A sampler from text, as it is written on a command line."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any, cast

import torch

from dllm_gym.agents.samplers.base import Sampler
from dllm_gym.agents.samplers.heuristics import HEURISTICS, Heuristic, make_policy
from dllm_gym.agents.samplers.metropolis import Metropolis
from dllm_gym.agents.samplers.policy import load_policy
from dllm_gym.hub import is_hub_id
from dllm_gym.names import find, hint

SAMPLERS: dict[str, type[Heuristic] | type[Metropolis]] = HEURISTICS | {"metropolis": Metropolis}


def make_sampler(text: str, seed: int = 0, device: torch.device | str = "cpu") -> Sampler | Metropolis:
    """A heuristic's name with arguments (``threshold:threshold=0.9``), or the folder or hub id of a trained policy.

    Also ``metropolis:alpha=4,steps=16``, which makes whole completions.

    Raises:
        ValueError: neither a heuristic's name nor a policy's folder, or arguments that the heuristic does not take.
    """
    text = canonical(text)
    name, _, rest = text.partition(":")
    if name not in SAMPLERS:
        return load_policy(text, device).seeded(seed)
    fields = {field.name: field for field in dataclasses.fields(cast(Any, SAMPLERS[name]))}
    arguments: dict[str, Any] = {"seed": seed} if "seed" in fields else {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        arguments[key] = _number(value)
        words = key in fields and "str" in fields[key].type
        if not equals or (arguments[key] is None and not words):
            raise ValueError(f"sampler={text!r}: {part!r} is not of the form argument=number.")
        if arguments[key] is None:
            arguments[key] = value
    if name == "metropolis" and (unknown := sorted(arguments.keys() - fields.keys())):
        takes = f"it takes {', '.join(fields)}.{hint(unknown[0], fields)}"
        raise ValueError(f"sampler={text!r}: metropolis does not take {', '.join(unknown)}; {takes}")
    return Metropolis(**arguments) if name == "metropolis" else make_policy(name, **arguments)


def canonical(text: str) -> str:
    """A sampler as text in its usual spelling. Raises ValueError: neither a heuristic's name, a folder nor a hub id."""
    name, colon, rest = text.partition(":")
    if name not in SAMPLERS and (Path(text).is_dir() or is_hub_id(text)):
        return text
    others = ", with arguments as in threshold:threshold=0.9, or the folder or hub id of a trained policy"
    return find(name, SAMPLERS, "sampler", others) + colon + rest


def make_stepwise(text: str, seed: int = 0, device: torch.device | str = "cpu") -> Sampler:
    """`make_sampler`, for where a canvas is unmasked step by step. Raises ValueError: for metropolis as well."""
    sampler = make_sampler(text, seed, device)
    if not sampler.stepwise:
        raise ValueError(f"sampler={text!r}: proposes whole completions; give one that unmasks step by step.")
    return cast(Sampler, sampler)


def _number(text: str) -> int | float | None:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    return value if isinstance(value, int | float) else None


def is_random(text: str) -> bool:
    """Whether a sampler, as text, draws: what it does follows from its seed."""
    kind = SAMPLERS.get(canonical(text).partition(":")[0])
    return kind is None or kind.draws
