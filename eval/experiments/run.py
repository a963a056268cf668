"""``dllm-eval experiment FILE.yaml``: an experiment as a file: what is trained, what is evaluated, what is compared.

The file's keys: `dllm_gym.eval.experiments.file`. Everything lies in one folder; what is finished there is not done
again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro

from dllm_gym.agents.environment import EnvConfig
from dllm_gym.agents.terminal import console
from dllm_gym.agents.trainers.run import handled
from dllm_gym.eval.command import Failed, one_line
from dllm_gym.eval.evaluate import CellConfig, evaluate_cell
from dllm_gym.eval.experiments.file import Experiment, Training, draws, only, read_experiment, trained
from dllm_gym.eval.experiments.tables import cell_table, comparison_table, tries_table
from dllm_gym.eval.metrics import summary
from dllm_gym.eval.results import Cell, ResultsFile
from dllm_gym.eval.tables import fronts
from dllm_gym.files import held, write_text


@dataclass
class ExperimentConfig:
    """Run an experiment file, or what of it is not finished."""

    file: Annotated[Path, tyro.conf.Positional]
    """A .yaml file."""
    folder: Path | None = None
    """Folder for runs, results and tables; None takes runs/experiments/ and the file's name."""
    seeds: int | None = None
    """Number of seeds, in place of the file's."""
    problems: int | None = None
    """Number of problems, in place of the cells'."""
    only: tuple[str, ...] = ()
    """Do only the cells with names like one of these, and what they need: "sudoku-*"."""
    workers: int = 2
    """Number of worker processes, each with one thread."""


TRY_SEED = 1000
"""Seed of what is trained to be chosen from, other than those that are reported."""


class Point(NamedTuple):
    """One evaluation: a variant of a cell, from one seed."""

    name: str
    variant: int
    seed: int
    validation: bool
    """Whether it is on the problems on which the best variant is chosen."""

    @property
    def file(self) -> str:
        """Name of its results file."""
        return f"{self.name}-{self.variant}-seed{self.seed}{'-validation' * self.validation}"

    def __str__(self) -> str:
        return f"{self.name} {self.variant}, seed {self.seed}{', validation' * self.validation}"


def experiment(config: ExperimentConfig) -> None:
    """Train, evaluate, compare; prints the tables and writes them to ``table.md``.

    Raises:
        ValueError: what `read_experiment` refuses, or a folder that another process is working in.
        Failed: of trainings or evaluations; the tables have what the others gave.
    """
    whole = read_experiment(config.file)
    if config.only:
        whole = only(whole, config.only)
    folder = config.folder or Path("runs/experiments") / config.file.stem
    folder.mkdir(parents=True, exist_ok=True)
    ended = handled(lambda number, _: sys.exit(128 + number), signal.SIGTERM)  # so that workers can save
    with ended, held(folder / ".lock", f"folder={str(folder)!r}"):
        _run(whole, folder, config)


def _run(whole: Experiment, folder: Path, config: ExperimentConfig) -> None:
    seeds = range(config.seeds or whole.seeds)
    trainings = [(name, seed) for name in whole.train for seed in seeds]
    cells = [
        Point(name, i, seed, validation)
        for name, grid in whole.cells.items()
        for i, variant in enumerate(grid.variants())
        for seed in (seeds if draws(*variant) else [0])
        for validation in ([False, True] if grid.validation else [False])
    ]
    spawn = multiprocessing.get_context("spawn")
    failures: list[str] = []
    lost = set()
    with ProcessPoolExecutor(config.workers, mp_context=spawn, initializer=_end_with_parent) as pool:
        try:
            chosen, accuracies = _choose(pool, whole, folder, failures)
            lost |= {(name, seed) for name, seed in trainings if name not in chosen}
            trainings = [entry for entry in trainings if entry not in lost]
            jobs = [pool.submit(_train, chosen[n], folder / f"{n}-seed{seed}", seed) for n, seed in trainings]
            for training, job in zip(trainings, jobs, strict=True):
                if (folder_of := _result(job, "training {}, seed {}".format(*training), failures)) is None:
                    lost.add(training)
                else:
                    print(f"trained {folder_of}", flush=True)
            needs = {point: trained(*whole.cells[point.name].variants()[point.variant]) for point in cells}
            possible = [point for point in cells if not lost & {(text, point.seed) for text in needs[point]}]
            evaluations = [pool.submit(_evaluate, whole, point, folder, config) for point in possible]
            found: dict[tuple[str, int], list[Cell]] = {(point.name, point.variant): [] for point in cells}
            choosing: dict[tuple[str, int], list[Cell]] = {}
            for point, evaluation in zip(possible, evaluations, strict=True):
                if cell := _result(evaluation, f"evaluation {point}", failures):
                    of = choosing if point.validation else found
                    of.setdefault((point.name, point.variant), []).append(cell)
                    print(f"evaluated {point}", flush=True)
        except BaseException:
            for worker in multiprocessing.active_children():  # a training saves what it has
                worker.terminate()
            pool.shutdown(cancel_futures=True)
            raise
    # Means over some of the seeds would not be comparable.
    wanted = Counter((point.name, point.variant) for point in cells if not point.validation)
    found = {key: cells for key, cells in found.items() if len(cells) == wanted[key]}
    if not found:
        raise Failed(failures, len(trainings) + len(cells))
    variants = {name: grid.variants() for name, grid in whole.cells.items()}
    whole_cells = {name for name, points in variants.items() if all((name, i) in found for i in range(len(points)))}
    for name, grid in whole.cells.items():  # nothing is chosen from a part of the validation
        keys = [(name, i) for i in range(len(variants[name]))]
        if grid.validation and any(len(choosing.get(key, [])) < wanted[key] for key in keys):
            whole_cells.discard(name)
    compared = [entry for entry in whole.compare if {entry.first, entry.second} <= whole_cells]
    parts = [
        whole.claim,
        tries_table(whole, accuracies),
        cell_table(found, variants),
        comparison_table(compared, found, choosing, variants),
    ]
    parallelism = fronts([cell for cells in found.values() for cell in cells])
    parts.append("\n".join(f"Accuracy under parallelism, {name}: {value:.1f}" for name, value in parallelism.items()))
    text = "\n\n".join(filter(None, parts)) + "\n"
    write_text(folder / "table.md", text)
    console().print(text, markup=False, highlight=False, soft_wrap=True)
    if failures:
        raise Failed(failures, len(trainings) + len(cells))


def _choose(
    pool: ProcessPoolExecutor, whole: Experiment, folder: Path, failures: list[str]
) -> tuple[dict[str, Training], dict[str, list[float | None]]]:
    """What is trained with the seeds, by name, and the accuracies of all tries; nothing where every try failed."""
    tried = {
        name: [pool.submit(_try, whole, name, i, folder) for i in range(len(whole.tries(name)))]
        for name, training in whole.train.items()
        if training.tries
    }
    chosen = {name: training for name, training in whole.train.items() if not training.tries}
    accuracies = {}
    for name, tries in tried.items():
        found = [_result(job, f"try {i} of {name}", failures) for i, job in enumerate(tries)]
        accuracies[name] = found
        judged = [(accuracy, -i) for i, accuracy in enumerate(found) if accuracy is not None]
        if judged:
            chosen[name] = whole.train[name].variants()[-max(judged)[1]]
            print(f"chose {', '.join(f'{key} {chosen[name].settings[key]}' for key in whole.train[name].tries)} "
                  f"for {name}", flush=True)  # fmt: skip
    return chosen, accuracies


def _result(job: Future, what: str, failures: list[str]):
    """What a job returned; None where it failed, which is put down."""
    try:
        return job.result()
    except BrokenExecutor:  # a worker is gone, and no other will begin anything
        raise
    except Exception as error:
        failures.append(f"{what}: {one_line(error)}")
        return None


def _end_with_parent() -> None:
    """A worker whose experiment was killed ends, instead of training on for nobody."""

    def watch():
        wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _train(training: Training, folder: Path, seed: int) -> str:
    """One run through the trainers' own command line; continued where it was interrupted."""
    import torch

    from dllm_gym.agents.cli import main

    torch.set_num_threads(1)
    asked = json.dumps({"algorithm": training.algorithm, "settings": training.settings}, sort_keys=True)
    record = folder.with_name(f"{folder.name}.json")
    if record.exists() and record.read_text() != asked:
        raise ValueError(f"{folder}: trained with other settings, {record.read_text()}; give another --folder.")
    write_text(record, asked)
    if not (folder / "summary.json").exists():
        if list(folder.glob("checkpoint-*")):
            flags = ["--resume", str(folder)]
        else:
            for name in ("config.json", "metrics.jsonl"):  # stopped before its first checkpoint
                (folder / name).unlink(missing_ok=True)
            flags = training.flags(seed=seed, run_dir=folder)
        try:
            failed = main([training.algorithm, *flags])
        except SystemExit as error:
            if error.code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
                os._exit(1)  # stopped, and saved: this worker begins nothing else
            raise
        if failed:
            raise RuntimeError(f"{training.algorithm} {' '.join(flags)}: failed, see above.")
    return str(folder)


def _try(whole: Experiment, name: str, i: int, folder: Path) -> float:
    """Train with one of the combinations of ``tries``; the accuracy that it is judged by."""
    training, choice = whole.tries(name)[i], whole.choose
    assert choice is not None
    run = _train(training, folder / f"{name}-try{i}", TRY_SEED)
    id_, dtype = (training.settings.get(f"env.{key}") for key in ("id", "dtype"))
    known = {key: value for key, value in {"id": id_, "dtype": dtype}.items() if value}
    env = EnvConfig(denoiser=f"{run}/denoiser", **known)
    problems = choice.problems
    requests = [CellConfig(s, env, problems, first=-problems, split="train", films=0) for s in choice.samplers]
    with ResultsFile(folder / "results" / f"{name}-try{i}.jsonl") as file:
        return float(np.mean([summary(evaluate_cell(request, file))["accuracy"] for request in requests]))


def _evaluate(whole: Experiment, point: Point, folder: Path, config: ExperimentConfig) -> Cell:
    import torch

    torch.set_num_threads(1)
    grid = whole.cells[point.name]
    sampler, env = grid.variants()[point.variant]
    path = folder / "results" / f"{point.file}.jsonl"
    runs = {text: folder / f"{text}-seed{point.seed}" for text in trained(sampler, env)}
    for run in runs.values():  # what was trained again is evaluated again
        if path.exists() and path.stat().st_mtime < (run / "summary.json").stat().st_mtime:
            path.unlink()
    if sampler.startswith("{"):
        sampler = str(runs[sampler.strip("{}")])
    if str(env.get("denoiser")).startswith("{"):
        env = env | {"denoiser": str(runs[env["denoiser"].strip("{}")] / "denoiser")}
    problems = config.problems or grid.problems
    request = CellConfig(sampler, EnvConfig(**env), problems, samples=grid.samples, split=grid.split, seed=point.seed)
    if point.validation:
        request = replace(request, problems=grid.validation, first=-grid.validation, split="train", films=0)
    with ResultsFile(path) as file:
        return evaluate_cell(request, file)
