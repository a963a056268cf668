"""``dllm-eval experiment FILE.yaml``: an experiment as a file: what is trained, what is evaluated, what is compared.

Keys of the file (`Experiment`, an unknown one is refused with the nearest known):

- ``claim``: the sentence that is put to the test;
- ``train``: name -> ``{algorithm, settings}``, trained once a seed; ``settings`` are the flags of ``train_policy.py``;
- ``cells``: name -> ``{sampler, env, problems, samples, split}``; a list of samplers, or a list in ``env``, is an axis,
  all combinations are evaluated. ``{name}`` in a sampler or in ``env.denoiser`` stands for what was trained;
- ``seeds``: of trainings and evaluations, 0, 1, ...;
- ``compare``: ``{first, second, metric}``, by names of cells. Equally many variants are compared one by one; otherwise
  the best of each is taken, on the problems that it is reported on: for a ``second`` that is the harder opponent.

Everything lies in one folder; what is finished there is not done again.
"""

from __future__ import annotations

import difflib
import json
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields
from itertools import product
from multiprocessing.connection import wait
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from filelock import FileLock, Timeout

from dllm_gym.agents.config import EnvConfig
from dllm_gym.agents.rollout import bootstrap_interval
from dllm_gym.agents.samplers import SAMPLERS, make_sampler
from dllm_gym.eval.command import console
from dllm_gym.eval.evaluate import CellConfig, evaluate_cell
from dllm_gym.eval.metrics import summary
from dllm_gym.eval.results import Cell, ResultsFile
from dllm_gym.eval.tables import check_metric, fronts, ids, unit, values, with_interval


@dataclass
class ExperimentConfig:
    """Run an experiment file, or what of it is not finished."""

    file: Annotated[Path, tyro.conf.Positional]
    """A .yaml file."""
    folder: Path | None = None
    """Where runs, results and tables lie; None: runs/experiments/ and the file's name."""
    seeds: int | None = None
    """Instead of the file's."""
    problems: int | None = None
    """Instead of the cells'."""
    workers: int = 2
    """Processes, each with one thread."""


@dataclass
class Training:
    """One entry of ``train``."""

    algorithm: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Grid:
    """One entry of ``cells``."""

    sampler: str | list[str]
    env: dict[str, Any] = field(default_factory=dict)
    problems: int = 1000
    samples: int = 1
    split: str = "test"

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
    for name, grid in whole.cells.items():
        _refuse_unknown(grid.env, [f.name for f in fields(EnvConfig)], f"{path}, cells.{name}.env")
        for sampler, env in grid.variants():
            _refuse_unknown(_trained(sampler, env), list(whole.train), f"{path}, cells.{name}")
            if not sampler.startswith("{"):
                make_sampler(sampler)
    for entry in whole.compare:
        _refuse_unknown([entry.first, entry.second], list(whole.cells), f"{path}, compare")
        check_metric(entry.metric, min(whole.cells[name].samples for name in (entry.first, entry.second)))
    return whole


def _refuse_unknown(given, known: list[str], where: str) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"must be one of {', '.join(known)}."
            raise ValueError(f"{where}: unknown {name!r}; {hint}")


def experiment(config: ExperimentConfig) -> None:
    """Train, evaluate, compare; prints the tables and writes them to ``table.md``.

    Raises:
        ValueError: what `read_experiment` refuses, or a folder that another process is working in.
    """
    whole = read_experiment(config.file)
    folder = config.folder or Path("runs/experiments") / config.file.stem
    folder.mkdir(parents=True, exist_ok=True)
    handler = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that workers can save
    try:
        with FileLock(folder / ".lock", timeout=0):
            _run(whole, folder, config)
    except Timeout:
        raise ValueError(f"{folder}: another process is at work in it; wait, or give another --folder.") from None
    finally:
        signal.signal(signal.SIGTERM, handler)


def _run(whole: Experiment, folder: Path, config: ExperimentConfig) -> None:
    seeds = range(config.seeds or whole.seeds)
    trainings = [(name, seed) for name in whole.train for seed in seeds]
    cells = [
        (name, i, seed)
        for name, grid in whole.cells.items()
        for i, variant in enumerate(grid.variants())
        for seed in (seeds if draws(*variant) else [0])
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.workers, mp_context=spawn, initializer=_end_with_parent) as pool:
        try:
            jobs = [pool.submit(_train, whole.train[n], folder / f"{n}-seed{seed}", seed) for n, seed in trainings]
            for job in jobs:
                print(f"trained {job.result()}", flush=True)
            jobs = [pool.submit(_evaluate, whole, cell, folder, config) for cell in cells]
            found = {(name, i): [] for name, i, _ in cells}
            for (name, i, seed), job in zip(cells, jobs, strict=True):
                found[name, i].append(job.result())
                print(f"evaluated {name} {i}, seed {seed}", flush=True)
        except BaseException:
            for worker in multiprocessing.active_children():  # a training saves what it has
                worker.terminate()
            pool.shutdown(cancel_futures=True)
            raise
    variants = {name: grid.variants() for name, grid in whole.cells.items()}
    parts = [whole.claim, _cell_table(found, variants), _comparison_table(whole.compare, found, variants)]
    parallelism = fronts([cell for cells in found.values() for cell in cells])
    parts.append("\n".join(f"Accuracy under parallelism, {name}: {value:.1f}" for name, value in parallelism.items()))
    text = "\n\n".join(filter(None, parts)) + "\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    console().print(text, markup=False, highlight=False, soft_wrap=True)


def _end_with_parent() -> None:
    """A worker whose experiment was killed ends, instead of training on for nobody."""

    def watch():
        wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def draws(sampler: str, env: dict[str, Any]) -> bool:
    """Whether a seed makes a difference to a variant of a cell: nothing is evaluated twice for nothing."""
    if _trained(sampler, env) or env.get("temperature"):
        return True
    kind = SAMPLERS.get(sampler.partition(":")[0])
    return kind is None or "seed" in kind.__dataclass_fields__


def _trained(sampler: str, env: dict[str, Any]) -> list[str]:
    """Names of the trainings that a variant of a cell needs."""
    return [text.strip("{}") for text in (sampler, str(env.get("denoiser"))) if text.startswith("{")]


def _train(training: Training, folder: Path, seed: int) -> str:
    """One run through the trainers' own command line; continued where it was interrupted."""
    import torch

    from dllm_gym.agents.cli import main

    torch.set_num_threads(1)
    asked = json.dumps({"algorithm": training.algorithm, "settings": training.settings}, sort_keys=True)
    record = folder.with_name(f"{folder.name}.json")
    if record.exists() and record.read_text() != asked:
        raise ValueError(f"{folder}: trained with other settings, {record.read_text()}; give another --folder.")
    record.write_text(asked)
    if not (folder / "summary.json").exists():
        if list(folder.glob("checkpoint-*")):
            flags = ["--resume", str(folder)]
        else:
            for name in ("config.json", "metrics.jsonl"):  # stopped before its first checkpoint
                (folder / name).unlink(missing_ok=True)
            settings = {"threads": 1} | training.settings | {"seed": seed, "run-dir": folder}
            flags = [part for name, value in settings.items() for part in _flag(name, value)]
        try:
            failed = main([training.algorithm, *flags])
        except SystemExit as error:
            if error.code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
                os._exit(1)  # stopped, and saved: this worker begins nothing else
            raise
        if failed:
            raise RuntimeError(f"{training.algorithm} {' '.join(flags)}: failed, see above.")
    return str(folder)


def _flag(name: str, value: Any) -> list[str]:
    option, _, last = name.rpartition(".")
    if isinstance(value, bool):
        last = last if value else f"no-{last}"
        return [f"--{option}.{last}" if option else f"--{last}"]
    return [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]


def _evaluate(whole: Experiment, cell: tuple[str, int, int], folder: Path, config: ExperimentConfig) -> Cell:
    import torch

    torch.set_num_threads(1)
    name, i, seed = cell
    grid = whole.cells[name]
    sampler, env = grid.variants()[i]
    path = folder / "results" / f"{name}-{i}-seed{seed}.jsonl"
    runs = {text: folder / f"{text}-seed{seed}" for text in _trained(sampler, env)}
    for run in runs.values():  # what was trained again is evaluated again
        if path.exists() and path.stat().st_mtime < (run / "summary.json").stat().st_mtime:
            path.unlink()
    if sampler.startswith("{"):
        sampler = str(runs[sampler.strip("{}")])
    if str(env.get("denoiser")).startswith("{"):
        env = env | {"denoiser": str(runs[env["denoiser"].strip("{}")] / "denoiser")}
    problems = config.problems or grid.problems
    request = CellConfig(sampler, EnvConfig(**env), problems, grid.samples, grid.split, seed)
    return evaluate_cell(request, ResultsFile(path))


def _variant(name: str, variants: list, i: int) -> str:
    """The name of a cell and what is particular about one of its variants."""
    if len(variants) == 1:
        return name
    (sampler, env), points = variants[i], [env for _, env in variants]
    axes = [f"{key} {env[key]}" for key in env if any(point[key] != env[key] for point in points)]
    named = [sampler] if len({text for text, _ in variants}) > 1 else []
    return f"{name}: {', '.join(named + axes)}"


def _cell_table(found: dict[tuple[str, int], list[Cell]], variants: dict[str, list]) -> str:
    """Means over seeds, and accuracy and reward of each."""
    lines = ["| cell | accuracy % | by seed | NFE | reward | pass@k % |", "| --- | --- | --- | --- | --- | --- |"]
    for (name, i), cells in found.items():
        rows = [summary(cell) for cell in cells]
        accuracy = [100 * row["accuracy"] for row in rows]
        passes = [f"{k}: {100 * np.mean([row['pass_at_k'][k] for row in rows]):.1f}" for k in rows[0]["pass_at_k"]]
        figures = [
            f"{np.mean(accuracy):.1f}",
            ", ".join(f"{a:.1f}" for a in accuracy),
            f"{np.mean([row['nfe'] for row in rows]):.2f}",
            f"{np.mean([row['reward'] for row in rows]):.3f}",
            ", ".join(passes) if len(passes) > 1 else "",
        ]
        lines.append(f"| {' | '.join([_variant(name, variants[name], i), *figures])} |")
    return "\n".join(lines)


def _comparison_table(comparisons: list[Comparison], found: dict, variants: dict[str, list]) -> str:
    """Paired by problem, seeds averaged; 95 % bootstrap intervals over problems."""
    lines = ["| first | second | metric | first minus second [95 %] | by seed |", "| --- | --- | --- | --- | --- |"]
    for entry in comparisons:
        for (first, a, mine), (second, b, theirs) in _pairs(entry, found, variants):
            if mine != theirs:
                raise ValueError(f"compare {first} and {second}: different problems, nothing can be paired.")
            difference = a.mean(axis=0) - b.mean(axis=0)
            scale, digits = unit(entry.metric)
            text = with_interval(difference.mean(), bootstrap_interval(difference), digits, scale, "+")
            by_seed = ", ".join(f"{scale * d:+.{digits}f}" for d in a.mean(axis=1) - b.mean(axis=1))
            lines.append(f"| {first} | {second} | {entry.metric} | {text} | {by_seed} |")
    return "\n".join(lines) if comparisons else ""


def _pairs(entry: Comparison, found: dict, variants: dict[str, list]) -> list[tuple]:
    """What is compared: label, ``[seeds, N]`` figures and problem ids of a first and a second, once or more."""

    def options(name: str) -> list[tuple[str, np.ndarray, list[str]]]:
        return [
            (_variant(name, variants[name], i), np.stack([values(cell, entry.metric) for cell in cells]), ids(cells[0]))
            for (of, i), cells in found.items()
            if of == name
        ]

    first, second = options(entry.first), options(entry.second)
    if len(first) == len(second):
        return list(zip(first, second, strict=True))
    best = min if entry.metric == "nfe" else max
    best = [best(either, key=lambda option: option[1].mean()) for either in (first, second)]
    return [tuple(best)]
