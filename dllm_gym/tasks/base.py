"""What a task is: problems by split and index, and a verifier. A task knows nothing of denoisers."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dllm_gym.names import refuse_unknown
from dllm_gym.tasks.files import SUFFIXES, first_line, load_hub, read_file
from dllm_gym.types import Problem, Verdict

EMBEDDED = "embedded"
EMBEDDED_SIZE = {"train": 1_000_000, "test": 10_000}
"""Embedded problems are generated from their index; these are the indices that a task offers."""
TEST_SHARE = 10
"""One in this many generated problem contents belongs to the test split."""
QUESTION = "{question}"
"""Where a prompt template takes the question; nothing else in it is replaced, so LaTeX braces are safe."""


class Task(ABC):
    """Problems and their verifier: ``len(task)``, ``task[i] -> Problem``, ``task.verify(problem, completion)``.

    A task of one's own defines `name`, `columns`, `read_row` and `verify`; see ``docs/data.md``.

    Args:
        dataset: None or "embedded" for procedurally generated problems, where the task has them (`GeneratedTask`);
            "hub" for the task's own set on the hub (`hub_id`); another hub id; or a local .jsonl, .csv or .parquet
            file.
        split: "train" or "test"; the embedded splits are disjoint in content. A local file is one split, used as is.
        prompt_template: path of a text file with ``{question}`` in it, which takes the place of `template`.
        few_shot: this many worked examples stand before every question: the first of the training split of the task's
            own hub set, else the first of the same rows, always without the question itself.
        allow_code_execution: needed by tasks whose verifier runs what the denoiser wrote (`runs_code`).

    Raises:
        TypeError: an argument that there is not, with the one that is spelt most like it.
        ValueError: an argument out of range, a broken file, or no such problems.
        FileNotFoundError: a data file or template that is not there.
        RuntimeError: a hub set that cannot be loaded.
    """

    name: str
    gen_length: int = 256
    """Completion length in tokens, where the environment is given none."""
    fills_canvas: bool = False
    """Whether a right completion has exactly `gen_length` tokens, and no end token."""
    parts: tuple[str, ...] = ()
    """Names of the tasks that a mixture has; figures are given for each."""
    hub_id: str | None = None
    """None where there is no standard set on the hub."""
    hub_config: str | None = None
    hub_splits: dict[str, str] = {"train": "train", "test": "test"}
    """Our split -> the set's own; a benchmark without training problems has no "train" here."""
    columns: str
    """The columns that a row needs, for error messages."""
    template: str = QUESTION
    """Prompt of a row of real data: asks for the final answer in the form that `verify` reads."""
    runs_code: bool = False
    """Whether the verifier runs the completion, in a sandbox."""

    def __init__(
        self,
        dataset: str | None = None,
        split: str = "train",
        *,
        prompt_template: str | None = None,
        few_shot: int = 0,
        allow_code_execution: bool = False,
        **unknown: Any,
    ):
        refuse_unknown(unknown, type(self), Task)
        if split not in ("train", "test"):
            raise ValueError(f"split={split!r}: must be 'train' or 'test'.")
        if self.runs_code and not allow_code_execution:
            raise ValueError(
                f"{self.name} runs what the denoiser writes, in a sandbox that limits it (docs/code-tasks.md): "
                f"give allow_code_execution=True to agree."
            )
        self.split = split
        if dataset == "hub" and self.hub_id is None:
            raise ValueError(
                f"dataset='hub': there is no standard {self.name} set on the hub; "
                f"give the path of a local .jsonl, .csv or .parquet file with {self.columns}."
            )
        self.dataset: str = {None: EMBEDDED, "hub": self.hub_id}.get(dataset, dataset)  # type: ignore[assignment]
        self.template = self.template if prompt_template is None else _read_template(prompt_template)
        self.rows = self._load_rows(split)
        self.few_shot = few_shot
        self._shots = self._read_shots(few_shot) if few_shot else []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Problem:
        self._check_index(index)
        question, answer = self._read(self.read_row, self.rows, index)
        shots = [shot for shot in self._shots if shot[0] != question][: self.few_shot]
        examples = [f"{self.template.replace(QUESTION, other)}\n{solution}" for other, solution in shots]
        prompt = "\n\n".join([*examples, self.template.replace(QUESTION, question)])
        return Problem(self._problem_id(index), prompt, answer)

    @abstractmethod
    def read_row(self, row: dict) -> tuple[str, Any]:
        """Question and answer of one row of the real data. KeyError, TypeError or ValueError where it has none."""

    def solve_row(self, row: dict) -> str:
        """A worked solution of one row, in the form that `template` asks for; without it there is no `few_shot`."""
        raise NotImplementedError

    @abstractmethod
    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Judge any text; never raises, hangs or runs it."""

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"problem {index}: {self.name} ({self.dataset}, {self.split}) has 0 to {len(self) - 1}.")

    def _problem_id(self, index: int) -> str:
        return f"{self.name}/{Path(self.dataset).name}/{self.split}/{index}"

    def _read(self, read: Callable[[dict], Any], rows: Sequence[dict], index: int) -> Any:
        """``read(rows[index])``, and what is wrong with the row in one line."""
        try:
            return read(rows[index])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"dataset={self.dataset!r}, row {index}: not a {self.name} problem ({error!r}); "
                f"a row needs {self.columns}."
            ) from error

    def _read_shots(self, count: int) -> list[tuple[str, str]]:
        """The first ``count + 1`` questions that differ, with their solutions: one too many, for a problem's own."""
        if count < 0:
            raise ValueError(f"few_shot={count}: must be 0 or more.")
        if type(self).solve_row is Task.solve_row:
            raise ValueError(f"few_shot={count}: must be 0, {self.name} has no worked solutions (`solve_row`).")
        rows = self.rows
        if self.dataset == self.hub_id and self.split == "test" and "train" in self.hub_splits:
            rows = self._load_rows("train")
        shots = {}
        for index in range(len(rows)):
            question, _ = self._read(self.read_row, rows, index)
            if question not in shots:
                shots[question] = self._read(self.solve_row, rows, index)
            if len(shots) > count:
                return list(shots.items())
        raise ValueError(
            f"few_shot={count}: must be 0 to {len(shots) - 1}, dataset={self.dataset!r} has {len(shots)} problems "
            f"and none is shown its own solution."
        )

    def _load_rows(self, split: str) -> Sequence[dict]:
        if self.dataset == EMBEDDED:
            on_hub = f"dataset='hub' ({self.hub_id}), another hub id or " if self.hub_id else "dataset="
            raise ValueError(
                f"dataset='embedded': {self.name} has no embedded problems; give {on_hub}the path of a local "
                f".jsonl, .csv or .parquet file with {self.columns}, and a denoiser that can read them."
            )
        path = Path(self.dataset)
        if path.suffix in SUFFIXES:
            return read_file(path)
        if path.suffix[1:].isalpha() or path.exists():  # a hub id may have a dot, as in "owner/set-v1.1"
            raise ValueError(f"dataset={self.dataset!r}: a local file must be .jsonl, .csv or .parquet.")
        config, splits = (self.hub_config, self.hub_splits) if self.dataset == self.hub_id else (None, {})
        if splits and split not in splits:
            raise ValueError(
                f"split={split!r}: {self.dataset} is a benchmark and has {', '.join(map(repr, splits))} only; "
                f"give that, or to train dataset= another hub id or a local file with {self.columns}."
            )
        try:
            return load_hub(self.dataset, config, splits.get(split, split))
        except ImportError:
            raise
        except Exception as error:
            others = "dataset='embedded' for generated problems, or " if isinstance(self, GeneratedTask) else ""
            raise RuntimeError(
                f"dataset={self.dataset!r} could not be loaded ({type(error).__name__}: {first_line(error)}). "
                f"Give {others}the path of a local .jsonl, .csv or .parquet file with {self.columns}."
            ) from error


class GeneratedTask(Task):
    """A task that has embedded problems too: generated from their index, disjoint between the splits.

    Their prompts are those that the embedded denoiser was trained on; templates and worked examples are for real data.
    One that has no real data leaves `read_row` and `columns` as they are.
    """

    columns = "nothing: there is no such data"

    def __init__(
        self,
        dataset: str | None = None,
        split: str = "train",
        *,
        prompt_template: str | None = None,
        few_shot: int = 0,
        **options,
    ):
        if dataset in (None, EMBEDDED) and (prompt_template is not None or few_shot):
            given = f"few_shot={few_shot}" if prompt_template is None else f"prompt_template={str(prompt_template)!r}"
            raise ValueError(
                f"{given}: is for real data, embedded problems have their own prompts; "
                f"give dataset='hub', a hub id or a local file, or leave it out."
            )
        super().__init__(dataset, split, prompt_template=prompt_template, few_shot=few_shot, **options)
        if self.dataset != EMBEDDED:
            self.gen_length = Task.gen_length  # a subclass gives that of its embedded problems

    def __len__(self) -> int:
        return EMBEDDED_SIZE[self.split] if self.dataset == EMBEDDED else super().__len__()

    def __getitem__(self, index: int) -> Problem:
        if self.dataset != EMBEDDED:
            return super().__getitem__(index)
        self._check_index(index)
        return self._generate_in_split(index)[0]

    def example(self, index: int, rng: np.random.Generator) -> tuple[Problem, str]:
        """Embedded problem ``index`` with a right completion, its wording and order drawn from ``rng``."""
        problem, content = self._generate_in_split(index)
        return problem, self.demonstrate(content, rng)

    def read_row(self, row: dict) -> tuple[str, Any]:
        raise ValueError(f"{self.name} has embedded problems only")

    @abstractmethod
    def generate(self, rng: np.random.Generator) -> tuple[str, Any, Any]:
        """A fresh embedded problem: prompt, answer, and its content, by which train and test are told apart."""

    @abstractmethod
    def demonstrate(self, content: Any, rng: np.random.Generator) -> str:
        """A right completion of the embedded problem with this content, drawn at random among many."""

    def _generate_in_split(self, index: int) -> tuple[Problem, Any]:
        """Draw from a generator that the problem's id seeds, until the content falls into this split."""
        problem_id = self._problem_id(index)
        rng = np.random.default_rng(list(hashlib.sha256(problem_id.encode()).digest()))
        while True:
            prompt, answer, content = self.generate(rng)
            held_out = hashlib.sha256(str(content).encode()).digest()[0] * TEST_SHARE < 256
            if held_out == (self.split == "test"):
                return Problem(problem_id, prompt, answer), content

    def _load_rows(self, split: str) -> Sequence[dict]:
        return [] if self.dataset == EMBEDDED else super()._load_rows(split)


def _read_template(path: str) -> str:
    """A template's text, without the newline that editors put at its end."""
    given = f"prompt_template={str(path)!r}"
    try:
        template = Path(path).read_text(encoding="utf-8").rstrip("\n")
    except OSError as error:
        raise FileNotFoundError(
            f"{given}: no such file ({error.strerror}); give a text file with {QUESTION}."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{given}: not UTF-8 ({error}).") from error
    if QUESTION not in template:
        raise ValueError(f"{given}: the text must have {QUESTION} where the question belongs.")
    return template
