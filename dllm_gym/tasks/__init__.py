"""Tasks: problems and their verifiers."""

from __future__ import annotations

from dllm_gym.names import find
from dllm_gym.tasks.base import Task
from dllm_gym.tasks.code import MBPP, HumanEval
from dllm_gym.tasks.countdown import Countdown
from dllm_gym.tasks.gsm8k import GSM8K
from dllm_gym.tasks.math import AIME24, AIME25, MATH500
from dllm_gym.tasks.oracle import Oracle
from dllm_gym.tasks.sudoku import Sudoku

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (GSM8K, MATH500, AIME24, AIME25, HumanEval, MBPP, Countdown, Sudoku, Oracle)
}


def make_task(name: str, dataset: str | None = None, split: str = "train", **options) -> Task:
    """A task by name, in any case; see `dllm_gym.tasks.base.Task` for ``dataset``, ``split`` and the options.

    Raises:
        TypeError: an option that the task does not have, with the one that is spelt most like it.
        ValueError: an unknown name or split, an option out of range, or a data file with a broken line.
        FileNotFoundError: a local file that is not there.
        RuntimeError: a hub data set that cannot be reached.
    """
    return TASKS[find(name, TASKS, "task")](dataset, split, **options)
