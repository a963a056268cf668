"""Tasks: problems and their verifiers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dllm_gym.names import find
from dllm_gym.tasks.base import Task
from dllm_gym.tasks.code import MBPP, HumanEval
from dllm_gym.tasks.countdown import Countdown
from dllm_gym.tasks.gsm8k import GSM8K
from dllm_gym.tasks.math import AIME24, AIME25, MATH500
from dllm_gym.tasks.mixture import Mixture, read_mix
from dllm_gym.tasks.oracle import Oracle
from dllm_gym.tasks.sudoku import Sudoku

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (GSM8K, MATH500, AIME24, AIME25, HumanEval, MBPP, Countdown, Sudoku, Oracle)
}


def make_task(
    name: str | Sequence[str] | Mapping[str, int], dataset: str | None = None, split: str = "train", **options
) -> Task:
    """A task by name, in any case; see `dllm_gym.tasks.base.Task` for ``dataset``, ``split`` and the options.

    Several names make a `Mixture`, whose tasks get the same dataset, split and options: ``["gsm8k", "countdown"]``,
    ``{"gsm8k": 2, "countdown": 1}``, or ``"gsm8k:2,countdown:1"``. An environment's id stands for its task.

    Raises:
        TypeError: an option that the task does not have, with the one that is spelt most like it.
        ValueError: an unknown name or split, an option out of range, or a data file with a broken line.
        FileNotFoundError: a local file that is not there.
        RuntimeError: a hub data set that cannot be reached.
    """
    several = set(name) & {",", ":"} if isinstance(name, str) else isinstance(name, Sequence | Mapping)
    if not several:
        return TASKS[find(_task_name(name), TASKS, "task")](dataset, split, **options)
    weights = read_mix(name)
    if dataset not in (None, "embedded", "hub"):
        raise ValueError(
            f"dataset={dataset!r}: the tasks of a mixture need sets of their own; give 'hub' or 'embedded'."
        )
    tasks = [make_task(one, dataset, split, **options) for one in weights]
    return Mixture(tasks, list(weights.values()))


def _task_name(name: Any) -> Any:
    """The task of an environment's id; any other name as it is."""
    found = re.fullmatch(r"maskeddiffusion-(\w+)-v0", str(name), re.IGNORECASE)
    return found[1] if found else name
