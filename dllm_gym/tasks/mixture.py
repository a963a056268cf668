"""Several tasks as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dllm_gym.tasks.base import Task
from dllm_gym.types import Problem, Verdict


class Mixture(Task):
    """Problems of several tasks in fixed proportions, on one canvas.

    Problem ids begin with the name of their task, which is also how the verifier is found. The proportions hold exactly
    in every run of ``sum(weights)`` problems, and no problem comes twice: the mixture ends with the task that ends
    first.

    Args:
        tasks: whole tasks, each of another name.
        weights: of the tasks, whole numbers; None: all 1.

    Raises:
        ValueError: fewer than two tasks, two of one name, a weight below 1, or tasks that cannot share a canvas.
    """

    name, columns = "mixture", "what its tasks need"

    def __init__(self, tasks: Sequence[Task], weights: Sequence[int] | None = None):
        self.tasks = {task.name: task for task in tasks}
        weights = [1] * len(tasks) if weights is None else list(weights)
        if len(tasks) < 2 or len(self.tasks) < len(tasks):
            raise ValueError(f"task={[task.name for task in tasks]}: a mixture needs two or more different tasks.")
        if len(weights) != len(tasks) or any(type(weight) is not int or weight < 1 for weight in weights):
            raise ValueError(f"task: the weights {weights} must be whole numbers of 1 or more, one for each task.")
        self.weights = dict(zip(self.tasks, weights, strict=True))
        self.gen_length = max(task.gen_length for task in tasks)
        for task in tasks:
            if task.fills_canvas and task.gen_length != self.gen_length:
                lengths = ", ".join(f"{one.name} {one.gen_length}" for one in tasks)
                raise ValueError(
                    f"task: {lengths} cannot share a canvas: completions of {task.name} have exactly "
                    f"{task.gen_length} tokens and no end token; mix tasks of at most this length with it."
                )
        self.split = tasks[0].split
        self.dataset = ", ".join(dict.fromkeys(task.dataset for task in tasks))
        self.parts = tuple(self.tasks)
        self._period = [(name, i) for name, weight in self.weights.items() for i in range(weight)]
        self._periods = min(len(task) // self.weights[name] for name, task in self.tasks.items())
        if not self._periods:
            short = {name: len(task) for name, task in self.tasks.items()}
            raise ValueError(f"task: the weights {self.weights} ask for more problems than there are: {short}.")

    def __len__(self) -> int:
        return self._periods * len(self._period)

    def __getitem__(self, index: int) -> Problem:
        self._check_index(index)
        period, place = divmod(index, len(self._period))
        name, i = self._period[place]
        return self.tasks[name][period * self.weights[name] + i]

    def read_row(self, row: dict) -> tuple[str, None]:
        raise ValueError("a mixture has no rows of its own")

    def verify(self, problem: Problem, completion: str) -> Verdict:
        return self.tasks[task_of(problem.id)].verify(problem, completion)


def task_of(problem_id: str) -> str:
    """The name of the task that a problem's id begins with."""
    return problem_id.partition("/")[0]


def read_mix(mix: str | Sequence[str] | Mapping[str, int]) -> dict[str, int]:
    """Names and weights of a mixture: ``"gsm8k:2,countdown:1"``, ``["gsm8k", "countdown"]`` or ``{"gsm8k": 2, ...}``.

    Raises:
        ValueError: a weight that is not a whole number, or a name twice.
    """
    if isinstance(mix, Mapping):
        return dict(mix)
    found: dict[str, int] = {}
    for part in mix.split(",") if isinstance(mix, str) else mix:
        name, _, weight = part.strip().partition(":")
        if name in found:
            raise ValueError(f"task={mix!r}: {name} is there twice.")
        if not (weight or "1").isdigit():
            raise ValueError(f"task={mix!r}: the weight {weight!r} of {name} must be a whole number.")
        found[name] = int(weight or 1)
    return found
