"""What trainers' configs have in common: checks of their values, and how a run stores them and reads them again."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHARED = ("env", "report", "forwards", "seed", "threads", "checkpoint_every", "run_dir", "resume")
"""Fields of a nested trainer's config that joint training gives."""


def at_least_one(config: Any, *names: str) -> None:
    """Raise ValueError where a field of the config is below 1; for the top of `train`, before there is a folder."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}: must be 1 or more.")


def refuse_given(part: Any, name: str, fields: Sequence[str]) -> None:
    """Raise ValueError where a nested config, which its owner calls ``name``, gives a field that is the owner's."""
    default = type(part)()
    for field in fields:
        if getattr(part, field) != getattr(default, field):
            raise ValueError(f"{name}.{field}: is set by the joint training; give --{field.replace('_', '-')}...")


def check_budget(forwards: int | None, episodes: int) -> None:
    """Refuse a budget of forward passes that ends in the first iteration. Raises ValueError."""
    if forwards is not None and forwards < episodes:
        raise ValueError(f"forwards={forwards}: the first step of {episodes} completions needs more.")


def refuse_nan(settings: dict[str, Any], prefix: str = "") -> None:
    """Raise ValueError where a setting, or one of a nested config's, is not a number."""
    for name, value in settings.items():
        if isinstance(value, dict):
            refuse_nan(value, f"{prefix}{name}.")
        elif any(
            isinstance(v, float) and math.isnan(v) for v in (value if isinstance(value, (list, tuple)) else [value])
        ):
            raise ValueError(f"{prefix}{name}={value}: must be a number.")


def read_config(folder: str | Path) -> dict[str, Any]:
    """A run's config.json. Raises ValueError where there is none or it is not one."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
        if "algorithm" not in config:
            raise KeyError("algorithm")
        return config
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{str(folder)!r}: not the folder of a run (config.json: {error!r}).") from None


def stored_settings(config: Any) -> dict[str, Any]:
    """A config as JSON gives it back, without where the run lies."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("run_dir", "resume")}
    return json.loads(json.dumps(settings))


def completed(stored: dict[str, Any], config: Any) -> dict[str, Any]:
    """Stored settings with the defaults of fields that did not exist yet when they were written."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            stored[field.name] = completed(stored.get(field.name, {}), value)
        elif field.name not in ("run_dir", "resume") and field.default is not dataclasses.MISSING:
            stored.setdefault(field.name, json.loads(json.dumps(field.default)))
    return stored
