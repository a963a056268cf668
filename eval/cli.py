"""``dllm-eval``: samplers side by side on the same problems."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from dllm_gym.agents.config import EnvConfig
from dllm_gym.agents.samplers import make_sampler
from dllm_gym.eval.evaluate import evaluate_samplers, print_results, write_results


@dataclass
class EvalConfig:
    """Evaluate samplers on the same problems; with two or more, compare each with the first."""

    sampler: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A heuristic with its arguments (``threshold:threshold=0.9``, ``random:k=2,seed=1``), or the folder of a trained
    policy. Repeat the flag for each sampler."""
    env: EnvConfig = field(default_factory=EnvConfig)
    """The environment."""
    problems: int = 1000
    """Problems: the first of the split."""
    split: str = "test"
    """"test" or "train"."""
    seed: int = 0
    """Of everything drawn: tokens at a temperature, samplers that draw."""
    output: Path | None = None
    """A .jsonl file: one line a sampler with every setting and the result of every problem."""
    overwrite: bool = False
    """Replace the output file where it exists."""


def main(argv: list[str] | None = None) -> int:
    """``dllm-eval [flags]``. Returns the exit code: 2 for a mistake in what was given."""
    return run("dllm-eval", EvalConfig, _evaluate, argv)


def run(prog: str, config_type: type, function: Callable, argv: list[str] | None) -> int:
    """Call a function with the config that the flags give; a mistake in them is one line and exit code 2."""
    try:
        function(tyro.cli(config_type, prog=prog, args=argv))
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("DLLM_GYM_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}\n(DLLM_GYM_TRACEBACK=1 shows where)", file=sys.stderr)
        return 2
    return 0


def _evaluate(config: EvalConfig) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    if not config.sampler:
        raise ValueError("no sampler: give --sampler, for example --sampler threshold:threshold=0.9.")
    if config.output and config.output.exists() and (config.output.is_dir() or not config.overwrite):
        raise FileExistsError(f"output={str(config.output)!r} exists: name another file, or give --overwrite.")
    samplers = {text: make_sampler(text, config.seed) for text in config.sampler}
    with Progress(console=Console(stderr=True), transient=True) as bars:
        rows = {}

        def progress(label: str, ended: int, total: int) -> None:
            if label not in rows:
                rows[label] = bars.add_task(escape(label), total=total)
            bars.update(rows[label], completed=ended)

        results, settings = evaluate_samplers(
            samplers, config.env, problems=config.problems, split=config.split, seed=config.seed, progress=progress
        )
    print_results(results, settings)
    if config.output:
        write_results(config.output, results, settings, samplers)
        print(f"results: {config.output}")
