"""``dllm-eval``: samplers side by side on the same problems; ``dllm-eval compare | experiment | report`` beside it."""

from __future__ import annotations

import argparse
import importlib
import sys
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated

from dllm_gym.agents.environment import EnvConfig
from dllm_gym.eval.command import Failed, one_line, run
from dllm_gym.eval.evaluate import CellConfig, evaluate_cell
from dllm_gym.eval.presets import load_preset
from dllm_gym.eval.results import ResultsFile
from dllm_gym.eval.tables import print_cells
from dllm_gym.extras import needs

with needs("train"):
    import tyro

COMMANDS = {
    "compare": ("dllm_gym.eval.compare", "CompareConfig", "compare"),
    "experiment": ("dllm_gym.eval.experiments.run", "ExperimentConfig", "experiment"),
    "report": ("dllm_gym.eval.report.page", "ReportConfig", "report"),
}
"""Subcommand -> module, its config and its function."""
EVERY_PROBLEM = 1_000_000
"""More than any test split has: published scores are means over the whole of it."""


@dataclass
class EvalConfig(CellConfig):
    """Evaluate samplers on the same problems; with two or more, compare each with the first.

    Other commands: ``dllm-eval compare A B`` (two results, paired), ``dllm-eval report RESULTS...`` (a page to look
    at), ``dllm-eval experiment FILE.yaml`` (a grid of samplers, denoisers, tasks and settings). Each has ``--help``.
    """

    sampler: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # type: ignore[assignment]
    """A heuristic with its arguments, for example ``threshold:threshold=0.9``; Metropolis-Hastings, for example
    ``metropolis:alpha=4,steps=16`` with ``--env.temperature 1``; or the folder of a trained policy. Repeat the flag for
    each sampler."""
    preset: str | None = None
    """A published setting, which the other flags change; docs/published-settings.md lists them."""
    output: Path | None = None
    """Results file (.jsonl). An existing one is continued: its finished problems are not evaluated again."""


def main(argv: list[str] | None = None) -> int:
    """``dllm-eval [COMMAND] [flags]``. Returns the exit code: 2 for a mistake in what was given, 1 if a part failed."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in COMMANDS:
        name, config, function = COMMANDS[arguments[0]]
        module = importlib.import_module(name)
        return run(f"dllm-eval {arguments[0]}", getattr(module, config), getattr(module, function), arguments[1:])
    return run("dllm-eval", EvalConfig, _evaluate, arguments, partial(_default, arguments))


def _default(flags: list[str]) -> EvalConfig:
    """What flags that are not given mean: the settings of ``--preset``, if there is one."""
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    known.add_argument("--preset", nargs="?")
    name = known.parse_known_args(flags)[0].preset
    if name is None:
        return EvalConfig()
    preset = load_preset(name)
    return EvalConfig(sampler=(preset.sampler,), env=EnvConfig(**preset.env), problems=EVERY_PROBLEM, preset=name)


def _evaluate(config: EvalConfig) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    if not config.sampler:
        raise ValueError("no sampler: give --sampler, for example --sampler threshold:threshold=0.9.")
    if config.output and config.output.is_dir():
        raise IsADirectoryError(f"output={str(config.output)!r}: a folder, must be a file.")
    shared = {f.name: getattr(config, f.name) for f in fields(CellConfig) if f.name != "sampler"}
    requests = [CellConfig(sampler, **shared) for sampler in config.sampler]
    for request in requests:
        request.check()
    cells, errors = [], {}
    with (
        ResultsFile(config.output) if config.output else nullcontext() as file,
        Progress(console=Console(stderr=True), transient=True) as bars,
    ):
        for request in requests:
            bar = bars.add_task(escape(request.sampler), total=None)
            show = partial(_show, bars, bar)
            try:
                cells.append(evaluate_cell(request, file, show))
            except (ValueError, RuntimeError, FloatingPointError) as error:  # the others may do better
                errors[request.sampler] = error
    if not cells:
        raise next(iter(errors.values()))
    print_cells(cells)
    if config.preset:
        preset = load_preset(config.preset)
        print(f"published: {preset.scores}\nsource: {preset.source}\npublished otherwise: {preset.differs}")
    if config.output:
        print(f"results: {config.output}")
    if errors:
        raise Failed([f"{sampler}: {one_line(error)}" for sampler, error in errors.items()], len(requests))


def _show(bars, bar, done: int, of: int) -> None:
    bars.update(bar, completed=done, total=of)
