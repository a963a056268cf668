"""The command line: one subcommand an algorithm, every field of its config a flag."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
from typing import Any

from dllm_gym.agents.trainers.denoiser import OBJECTIVES
from dllm_gym.extras import needs

with needs("train"):
    import tyro

ALGORITHMS = {
    "grpo": ("dllm_gym.agents.trainers.policy.grpo", "GRPOConfig"),
    "ppo": ("dllm_gym.agents.trainers.policy.ppo", "PPOConfig"),
    "sb3-ppo": ("dllm_gym.agents.trainers.policy.sb3_ppo", "SB3PPOConfig"),
    **{
        name: (f"dllm_gym.agents.trainers.denoiser.{module}", config)
        for name, (module, config, _) in OBJECTIVES.items()
    },
    "joint": ("dllm_gym.agents.trainers.joint", "JointConfig"),
    "joint-trace": ("dllm_gym.agents.trainers.joint_trace", "JointTraceConfig"),
    "sft": ("dllm_gym.agents.trainers.sft", "SFTConfig"),
}
"""Subcommand -> module with `train(config)`, and its config."""
USAGE = f"""usage: train_policy.py {{{",".join(ALGORITHMS)}}} [--help] [flags]
       train_policy.py push RUN OWNER/NAME"""


def main(argv: list[str] | None = None) -> int:
    """``dllm-train ALGORITHM [flags]``, or ``dllm-train push RUN owner/name``.

    Returns the exit code: 2 for a mistake in what was given.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] not in (*ALGORITHMS, "push"):
        wanted = arguments and arguments[0] not in ("-h", "--help")
        print(f"error: unknown algorithm {arguments[0]!r}.\n" if wanted else "", end="", file=sys.stderr)
        print(USAGE)
        return 2 if wanted or not arguments else 0
    name, flags = arguments[0], arguments[1:]
    try:
        if name == "push":
            module = importlib.import_module("dllm_gym.agents.push")
            module.push(tyro.cli(module.PushConfig, prog="train_policy.py push", args=flags))
        else:
            importlib.import_module(ALGORITHMS[name][0]).train(parse(name, flags))
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        if os.environ.get("DLLM_GYM_TRACEBACK"):
            raise
        print(f"error: {error}\n(DLLM_GYM_TRACEBACK=1 shows where)", file=sys.stderr)
        return 2
    return 0


def parse(name: str, flags: list[str]):
    """The config of an algorithm from flags; a resumed run's own is the default, so that ``--resume DIR`` is enough.

    Raises:
        ValueError: ``--resume`` names no run of this algorithm. SystemExit: flags it does not have, said on stderr.
    """
    module_name, config_name = ALGORITHMS[name]
    config_type = getattr(importlib.import_module(module_name), config_name)
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    known.add_argument("--resume", nargs="?")
    known.add_argument("--objective", nargs="?")
    given = known.parse_known_args(flags)[0]
    folder, objective, stored = given.resume, given.objective, {}
    if folder:
        from dllm_gym.agents.trainers.configs import read_config

        stored = read_config(folder)
    chooses = "objective" in config_type.__dataclass_fields__  # decides which flags there are
    objective = stored.get("objective", objective)
    default = config_type(objective=objective) if chooses and objective else config_type()
    if folder:
        algorithm = stored.pop("algorithm")
        if algorithm != name:
            raise ValueError(f"resume={folder!r}: a run of {algorithm!r}, not of {name!r}.")
        try:
            default = _as_typed(stored, default)
        except TypeError as error:
            raise ValueError(f"resume={folder!r}: config.json does not fit {name} ({error}).") from None
    return tyro.cli(config_type, prog=f"train_policy.py {name}", args=flags, default=default)


def flag(name: str, value: Any) -> list[str]:
    """The flag that sets a config's field, by its dotted name, to a value: a word, and its values after it."""
    option, _, last = name.rpartition(".")
    if isinstance(value, bool):
        last = last if value else f"no-{last}"
        return [f"--{option}.{last}" if option else f"--{last}"]
    return [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]


def _as_typed(stored, default):
    """What JSON has kept, in the types of the config's default: nested configs and tuples."""
    if dataclasses.is_dataclass(default):
        fields = {key: _as_typed(value, getattr(default, key, None)) for key, value in stored.items()}
        return dataclasses.replace(default, **fields)
    return tuple(stored) if isinstance(default, tuple) else stored
