"""What a task is: problems by split and index, and a verifier. A task knows nothing of denoisers."""

from __future__ import annotations

import csv
import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from dllm_gym.types import Problem, Verdict

EMBEDDED = "embedded"
EMBEDDED_SIZE = {"train": 1_000_000, "test": 10_000}
"""Embedded problems are generated from their index; these are the indices that a task offers."""
TEST_SHARE = 10
"""One in this many generated problem contents belongs to the test split."""


class Task(ABC):
    """Problems and their verifier: ``len(task)``, ``task[i] -> Problem``, ``task.verify(problem, completion)``.

    Args:
        dataset: None or "embedded" for the procedurally generated problems; "hub" for the task's own set on the
            hub (`hub_id`); another hub id; or a local .jsonl, .csv or .parquet file.
        split: "train" or "test"; the embedded splits are disjoint in content. A local file is one split, used as is.
        allow_code_execution: needed by tasks whose verifier runs what the denoiser wrote (`runs_code`).
    """

    name: str
    gen_length: int
    """Completion length in tokens that embedded problems need."""
    hub_id: str | None
    """None where there is no standard set on the hub."""
    hub_config: str | None = None
    hub_splits = {"train": "train", "test": "test"}
    columns: str
    """The columns that a row needs, for error messages."""
    runs_code: bool = False
    """Whether the verifier runs the completion, in a sandbox."""

    def __init__(self, dataset: str | None = None, split: str = "train", *, allow_code_execution: bool = False):
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
                f"give the path of a local .jsonl or .csv file with {self.columns}."
            )
        self.dataset = {None: EMBEDDED, "hub": self.hub_id}.get(dataset, dataset)
        self.rows = None if self.dataset == EMBEDDED else self._load_rows()

    def __len__(self) -> int:
        return EMBEDDED_SIZE[self.split] if self.rows is None else len(self.rows)

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < len(self):
            raise IndexError(f"problem {index}: {self.name} ({self.dataset}, {self.split}) has 0 to {len(self) - 1}.")
        if self.rows is None:
            return self._generate_in_split(index)[0]
        try:
            return Problem(self._problem_id(index), *self.read_row(self.rows[index]))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"dataset={self.dataset!r}, row {index}: not a {self.name} problem ({error!r}); "
                f"a row needs {self.columns}."
            ) from error

    def example(self, index: int, rng: np.random.Generator) -> tuple[Problem, str]:
        """Embedded problem ``index`` with a right completion, its wording and order drawn from ``rng``."""
        problem, content = self._generate_in_split(index)
        return problem, self.demonstrate(content, rng)

    @abstractmethod
    def generate(self, rng: np.random.Generator) -> tuple[str, Any, Any]:
        """A fresh embedded problem: prompt, answer, and its content, by which train and test are told apart."""

    @abstractmethod
    def demonstrate(self, content: Any, rng: np.random.Generator) -> str:
        """A right completion of the embedded problem with this content, drawn at random among many."""

    @abstractmethod
    def read_row(self, row: dict) -> tuple[str, Any]:
        """Prompt and answer of one row of the real data."""

    @abstractmethod
    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Judge any text; never raises, hangs or runs it."""

    def _problem_id(self, index: int) -> str:
        return f"{self.name}/{Path(self.dataset).name}/{self.split}/{index}"

    def _generate_in_split(self, index: int) -> tuple[Problem, Any]:
        """Draw from a generator that the problem's id seeds, until the content falls into this split."""
        problem_id = self._problem_id(index)
        rng = np.random.default_rng(list(hashlib.sha256(problem_id.encode()).digest()))
        while True:
            prompt, answer, content = self.generate(rng)
            held_out = hashlib.sha256(str(content).encode()).digest()[0] * TEST_SHARE < 256
            if held_out == (self.split == "test"):
                return Problem(problem_id, prompt, answer), content

    def _load_rows(self):
        path = Path(self.dataset)
        if path.suffix in (".jsonl", ".csv", ".parquet"):
            return _read_file(path)
        if path.suffix[1:].isalpha() or path.exists():  # a hub id may have a dot, as in "owner/set-v1.1"
            raise ValueError(f"dataset={self.dataset!r}: a local file must be .jsonl, .csv or .parquet.")
        import datasets

        try:
            return datasets.load_dataset(self.dataset, self.hub_config, split=self.hub_splits[self.split])
        except Exception as error:
            raise RuntimeError(
                f"dataset={self.dataset!r} could not be loaded ({type(error).__name__}: {_first_line(error)}). "
                f"Give dataset='embedded' for generated problems where the task has them, or the path of a local "
                f".jsonl, .csv or .parquet file with {self.columns}."
            ) from error


def _read_file(path: Path) -> list[dict]:
    given = f"dataset={str(path)!r}"
    if not path.is_file():
        raise FileNotFoundError(f"{given}: no such file.")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except Exception as error:
            raise ValueError(f"{given}: not a parquet file ({_first_line(error)}).") from error
    else:
        read = _read_csv if path.suffix == ".csv" else _read_jsonl
        with open(path, encoding="utf-8-sig", newline="") as file:
            try:
                rows = read(file, given)
            except UnicodeDecodeError as error:
                raise ValueError(f"{given}: not UTF-8 ({error}).") from error
    if not rows:
        raise ValueError(f"{given}: no rows.")
    return rows


def _read_csv(file, given: str) -> list[dict]:
    reader = csv.DictReader(file)
    try:
        return list(reader)
    except csv.Error as error:
        raise ValueError(f"{given}, line {reader.reader.line_num}: not CSV ({error}).") from error


def _read_jsonl(file, given: str) -> list[dict]:
    rows = []
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{given}, line {number}: not JSON ({error}).") from error
    return rows


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
