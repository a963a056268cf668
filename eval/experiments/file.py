"""An experiment file (.yaml): what is trained, what is evaluated, what is compared.

Keys (`Experiment`; an unknown one is refused with the nearest known):

- ``claim``: the sentence that is put to the test;
- ``train``: name -> ``{algorithm, settings}``, trained once per seed; ``settings`` are flags of ``train_policy.py``;
- ``cells``: name -> ``{sampler, env, problems, samples, split, validation}``; a list of samplers, or a list in
  ``env``, is an axis: all combinations are evaluated. ``{name}`` in a sampler or in ``env.denoiser`` stands for what
  was trained;
- ``seeds``: of trainings and evaluations, 0, 1, ...;
- ``compare``: ``{first, second, metric}``, by names of cells. Equally many variants are compared one by one; otherwise
  the best of each is taken: the best on ``validation`` problems, the last of the training split, where a cell says how
  many; else on the problems that it is reported on, which for a ``second`` is the harder opponent.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from dllm_gym.agents.cli import ALGORITHMS, flag, parse
from dllm_gym.agents.environment import EnvConfig, env_spec
from dllm_gym.agents.samplers.spec import is_random, make_sampler
from dllm_gym.eval.tables import check_metric


@dataclass
class Training:
    """One entry of ``train``."""

    algorithm: str
    settings: dict[str, Any] = field(default_factory=dict)

    def flags(self, **more: Any) -> list[str]:
        """Flags of ``train_policy.py``, of one thread where the settings say nothing else."""
        return [part for name, value in ({"threads": 1} | self.settings | more).items() for part in flag(name, value)]


@dataclass
class Grid:
    """One entry of ``cells``."""

    sampler: str | list[str]
    env: dict[str, Any] = field(default_factory=dict)
    problems: int = 1000
    samples: int = 1
    split: str = "test"
    validation: int = 0

    @property
    def problem_set(self) -> tuple:
        """What decides which problems these are."""
        return self.problems, self.split, self.env.get("id", EnvConfig.id), self.env.get("dataset")

    def variants(self) -> list[tuple[str, dict[str, Any]]]:
        """All combinations of samplers and settings of the environment."""
        samplers = self.sampler if isinstance(self.sampler, list) else [self.sampler]
        axes = [value if isinstance(value, list) else [value] for value in self.env.values()]
        return [(s, dict(zip(self.env, point, strict=True))) for s in samplers for point in product(*axes)]


@dataclass
class Comparison:
    """One entry of ``compare``."""

    first: str
    second: str
    metric: str = "reward"


@dataclass
class Experiment:
    """A whole file."""

    claim: str
    cells: dict[str, Grid]
    train: dict[str, Training] = field(default_factory=dict)
    compare: list[Comparison] = field(default_factory=list)
    seeds: int = 5


def read_experiment(path: Path) -> Experiment:
    """An experiment file.

    Raises:
        ValueError: not YAML, an unknown key (with the nearest known one), a missing key, or a name that is nowhere.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({error}).") from None

    def build(kind: type, entry: Any, where: str):
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: {entry!r}, must be keys and values.")
        known = [f.name for f in fields(kind)]
        _refuse_unknown(entry, known, where)
        if empty := [name for name, value in entry.items() if value is None]:
            raise ValueError(f"{where}: {empty[0]} is empty.")
        try:
            return kind(**entry)
        except TypeError as error:
            raise ValueError(f"{where}: {str(error).partition(') ')[2]}.") from None

    whole = build(Experiment, content, str(path))
    for name in ("train", "cells"):
        if not isinstance(getattr(whole, name), dict):
            raise ValueError(f"{path}, {name}: {getattr(whole, name)!r}, must be names and their keys and values.")
    whole.train = {name: build(Training, entry, f"{path}, train.{name}") for name, entry in whole.train.items()}
    whole.cells = {name: build(Grid, entry, f"{path}, cells.{name}") for name, entry in whole.cells.items()}
    whole.compare = [build(Comparison, entry, f"{path}, compare") for entry in whole.compare]
    for name, training in whole.train.items():
        _refuse_unknown([training.algorithm], list(ALGORITHMS), f"{path}, train.{name}")
        try:
            parse(training.algorithm, training.flags())
        except SystemExit:
            raise ValueError(f"{path}, train.{name}: not flags of {training.algorithm}, see above.") from None
    for name, grid in whole.cells.items():
        _refuse_unknown(grid.env, [f.name for f in fields(EnvConfig) if f.name != "split"], f"{path}, cells.{name}.env")
        if not all(isinstance(number, int) and number > 0 for number in (grid.problems, grid.samples)):
            raise ValueError(f"{path}, cells.{name}: problems and samples must be 1 or more.")
        for sampler, env in grid.variants():
            env_spec(env.get("id", EnvConfig.id))
            _refuse_unknown(trained(sampler, env), list(whole.train), f"{path}, cells.{name}")
            if not sampler.startswith("{"):
                make_sampler(sampler)
    for entry in whole.compare:
        _refuse_unknown([entry.first, entry.second], list(whole.cells), f"{path}, compare")
        if whole.cells[entry.first].problem_set != whole.cells[entry.second].problem_set:
            raise ValueError(f"{path}, compare {entry.first} and {entry.second}: other problems, nothing to pair.")
        check_metric(entry.metric, min(whole.cells[name].samples for name in (entry.first, entry.second)))
    return whole


def _refuse_unknown(given, known: list[str], where: str) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"must be one of {', '.join(known)}."
            raise ValueError(f"{where}: unknown {name!r}; {hint}")


def draws(sampler: str, env: dict[str, Any]) -> bool:
    """Whether a seed makes a difference to a variant of a cell: nothing is evaluated twice for nothing."""
    return bool(trained(sampler, env) or env.get("temperature")) or is_random(sampler)


def trained(sampler: str, env: dict[str, Any]) -> list[str]:
    """Names of the trainings that a variant of a cell needs."""
    return [text.strip("{}") for text in (sampler, str(env.get("denoiser"))) if text.startswith("{")]
