"""An experiment file (.yaml): what is trained, what is evaluated, what is compared.

Keys (`Experiment`; an unknown one is refused with the nearest known):

- ``claim``: the sentence that is put to the test;
- ``train``: name -> ``{algorithm, settings, tries}``, trained once per seed; ``settings`` are flags of
  ``train_policy.py``. ``tries`` has lists of further settings: each combination is trained once, from a seed of its
  own, and the best one is trained with the seeds. All have as many tries, and the same ``forwards``;
- ``choose``: ``{sampler, problems, settings}``: the best try is the most accurate one on the last problems of the
  training split, tokens the argmax, averaged over the samplers. Tries are trained with these settings in place of their
  own: with fewer ``forwards``, say;
- ``tasks``: name -> id of an environment. Everything is done for each of them, under names such as ``sudoku-spg``;
- ``cells``: name -> ``{sampler, env, problems, samples, split, validation}``; a list of samplers, or a list in
  ``env``, is an axis: all combinations are evaluated. ``{name}`` in a sampler or in ``env.denoiser`` stands for what
  was trained. A cell with ``*`` in its name, and in ``{*}``, is one cell for each entry of ``train``;
- ``seeds``: of trainings and evaluations, 0, 1, ...;
- ``compare``: ``{first, second, metric}``, by names of cells, ``*`` as there. Equally many variants are compared one by
  one; otherwise the best of each is taken: the best on ``validation`` problems, the last of the training split, where a
  cell says how many; else on the problems that it is reported on, which for a ``second`` is the harder opponent.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

from dllm_gym.agents.cli import ALGORITHMS, flag, parse
from dllm_gym.agents.environment import EnvConfig, env_spec
from dllm_gym.agents.samplers.spec import is_random, make_sampler, make_stepwise
from dllm_gym.agents.trainers.denoiser import OBJECTIVES
from dllm_gym.agents.trainers.denoiser.objective import TrainerConfig
from dllm_gym.eval.tables import check_metric


@dataclass
class Training:
    """One entry of ``train``."""

    algorithm: str
    settings: dict[str, Any] = field(default_factory=dict)
    tries: dict[str, list] = field(default_factory=dict)

    def flags(self, **more: Any) -> list[str]:
        """Flags of ``train_policy.py``, of one thread where the settings say nothing else."""
        return [part for name, value in ({"threads": 1} | self.settings | more).items() for part in flag(name, value)]

    def variants(self) -> list[Training]:
        """The trainings of all combinations of ``tries``; this one alone where there are none."""
        points = product(*self.tries.values())
        return [replace(self, settings=self.settings | dict(zip(self.tries, p, strict=True)), tries={}) for p in points]


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
class Choice:
    """How the best try is chosen."""

    sampler: str | list[str]
    problems: int = 500
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def samplers(self) -> list[str]:
        return self.sampler if isinstance(self.sampler, list) else [self.sampler]


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
    choose: Choice | None = None
    tasks: dict[str, str] = field(default_factory=dict)
    seeds: int = 5

    def tries(self, name: str) -> list[Training]:
        """What is trained for a choice: a training for each combination of ``tries``; none where there is none."""
        training = self.train[name]
        if not training.tries or self.choose is None:
            return []
        return [replace(point, settings=point.settings | self.choose.settings) for point in training.variants()]


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
        for name in [f.name for f in fields(kind) if f.default_factory is dict or f.name == "cells"]:
            if not isinstance(entry.get(name, {}), dict):
                raise ValueError(f"{where}, {name}: {entry[name]!r}, must be names and values.")
        try:
            return kind(**entry)
        except TypeError as error:
            raise ValueError(f"{where}: {str(error).partition(') ')[2]}.") from None

    whole = build(Experiment, content, str(path))
    whole.train = {name: build(Training, entry, f"{path}, train.{name}") for name, entry in whole.train.items()}
    whole.cells = {name: build(Grid, entry, f"{path}, cells.{name}") for name, entry in whole.cells.items()}
    if whole.choose is not None:
        whole.choose = build(Choice, whole.choose, f"{path}, choose")
    whole.compare = [build(Comparison, entry, f"{path}, compare") for entry in whole.compare]
    whole = _for_each_training(whole)
    if whole.tasks:
        whole = _for_each_task(whole)
    for name, training in whole.train.items():
        _refuse_unknown([training.algorithm], list(ALGORITHMS), f"{path}, train.{name}")
        if not all(isinstance(values, list) and values for values in training.tries.values()):
            raise ValueError(f"{path}, train.{name}.tries: {training.tries}, must be names and lists of values.")
        points = training.variants() + whole.tries(name)
        try:
            configs = [parse(training.algorithm, point.flags()) for point in points]
        except SystemExit:
            raise ValueError(f"{path}, train.{name}: not flags of {training.algorithm}, see above.") from None
        for config in configs:
            if isinstance(config, TrainerConfig):
                config.check()
    _check_tries(whole, path)
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


def _for_each_training(whole: Experiment) -> Experiment:
    """The same experiment with ``*`` written out; a ``{*}`` without one in its cell's name stays, to be refused."""

    def filled(value: Any, name: str) -> Any:
        if isinstance(value, list):
            return [filled(part, name) for part in value]
        return value.replace("{*}", f"{{{name}}}") if isinstance(value, str) else value

    cells, compare = {}, []
    for cell, grid in whole.cells.items():
        for name in whole.train if "*" in cell else ["*"]:
            env = {key: filled(value, name) for key, value in grid.env.items()}
            cells[cell.replace("*", name)] = replace(grid, sampler=filled(grid.sampler, name), env=env)
    for entry in whole.compare:
        for name in whole.train if "*" in entry.first + entry.second else ["*"]:
            first, second = (text.replace("*", name) for text in (entry.first, entry.second))
            compare.append(replace(entry, first=first, second=second))
    return replace(whole, cells=cells, compare=compare)


def _for_each_task(whole: Experiment) -> Experiment:
    """The same experiment with everything written out for each of its tasks."""

    def of(task: str, text: str) -> str:
        return f"{{{task}-{text[1:]}" if text.startswith("{") else text

    train, cells, compare = {}, {}, []
    for task, id_ in whole.tasks.items():
        for name, training in whole.train.items():
            train[f"{task}-{name}"] = replace(training, settings={"env.id": id_} | training.settings)
        for name, grid in whole.cells.items():
            samplers = [of(task, text) for text in (grid.sampler if isinstance(grid.sampler, list) else [grid.sampler])]
            env = {"id": id_} | grid.env
            if isinstance(denoiser := env.get("denoiser"), str):
                env["denoiser"] = of(task, denoiser)
            cells[f"{task}-{name}"] = replace(grid, sampler=samplers, env=env)
        compare += [replace(e, first=f"{task}-{e.first}", second=f"{task}-{e.second}") for e in whole.compare]
    return replace(whole, train=train, cells=cells, compare=compare, tasks={})


def only(whole: Experiment, patterns: Sequence[str]) -> Experiment:
    """The part of an experiment whose cells have names like one of these (``*-spg``), and what they need.

    Raises:
        ValueError: no cell has such a name.
    """
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in whole.cells):
            raise ValueError(f"only={pattern!r}: no cell has such a name; they are {', '.join(whole.cells)}.")
    cells = {name: grid for name, grid in whole.cells.items() if any(fnmatch(name, p) for p in patterns)}
    needed = {text for grid in cells.values() for variant in grid.variants() for text in trained(*variant)}
    train = {name: training for name, training in whole.train.items() if name in needed}
    compare = [entry for entry in whole.compare if {entry.first, entry.second} <= cells.keys()]
    return replace(whole, cells=cells, train=train, compare=compare)


def _check_tries(whole: Experiment, path: Path) -> None:
    """Refuse a choice between trainings of other budgets. Raises ValueError."""
    tried = {name: training for name, training in whole.train.items() if training.tries}
    if not tried:
        return
    if whole.choose is None:
        raise ValueError(f"{path}: {', '.join(tried)} have tries; say how the best is chosen, under choose.")
    for text in whole.choose.samplers:
        make_stepwise(text)
    for name, training in tried.items():
        _refuse_unknown([training.algorithm], list(OBJECTIVES), f"{path}, train.{name}.tries")
        if same := [key for key in training.tries if key in whole.choose.settings]:
            raise ValueError(f"{path}, choose.settings: {same[0]!r} is what {name} tries; leave it out.")
    for what, of in (
        ("number of tries", lambda training: len(training.variants())),
        ("forwards", lambda training: training.settings.get("forwards")),
    ):
        budgets = {name: of(training) for name, training in tried.items()}
        if len(set(budgets.values())) > 1:
            raise ValueError(f"{path}: the {what} differs, {budgets}; give all the same budget.")


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
