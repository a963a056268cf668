"""Results on disk: JSON Lines that are appended to while an evaluation runs, so that it can be continued.

A file holds cells, a sampler on an environment with all settings. Every line has ``kind`` and ``cell``, the cell's key:

- ``cell``: ``settings``, all that the figures depend on, and the version of the package;
- ``problem``: ``index``, ``problem_id``, ``prompt``, and lists of one entry a sample: ``correct, score, nfe, reward,
  length, log_likelihood, completion, positions, undecided``;
- ``film``: a canvas as it was unmasked, for the report's player;
- ``end``: ``seconds``, ``tokens`` and ``forwards`` of the last uninterrupted part, and for Metropolis-Hastings the
  ``chain``, acceptance and log-likelihood by step; the cell is finished.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from dllm_gym.agents.evaluation import count_reasons
from dllm_gym.envs.settings import EnvSettings
from dllm_gym.files import append, held, write_text

NOT_OF_CELLS = ("split", "denoiser", "dataset", "gen_length", "device")
"""Settings that a cell has elsewhere, or always resolved."""
PER_SAMPLE = ("correct", "score", "nfe", "reward", "length", "log_likelihood", "completion")
"""What every file has."""
PER_SAMPLE_LATER = ("positions", "undecided")
"""What files of earlier versions lack."""


@dataclass
class Cell:
    """One sampler on one environment."""

    key: str
    """Twelve hex digits, computed from what was asked for."""
    settings: dict
    """Everything the figures depend on. Environment settings that the file lacks have their defaults."""
    problems: list[dict] = field(default_factory=list)
    """Finished problems, ordered by index."""
    films: list[dict] = field(default_factory=list)
    end: dict | None = None

    def __post_init__(self):
        missing = {f.name: f.default for f in fields(EnvSettings) if f.name not in NOT_OF_CELLS}
        self.settings = self.settings | {"env": missing | self.settings.get("env", {})}

    def __getattr__(self, name: str) -> np.ndarray:
        """``[N, n]`` arrays of what is kept of each sample: ``cell.correct``, ``cell.nfe``, ..."""
        if name not in PER_SAMPLE:
            raise AttributeError(name)
        return np.array([record[name] for record in self.problems])

    def add(self, kind: str, record: dict) -> None:
        """A line of the cell. Raises ValueError or KeyError for one that is none."""
        if kind == "problem":
            if any(len(record[name]) != self.settings["samples"] for name in PER_SAMPLE):
                raise ValueError(f"not {self.settings['samples']} samples")
            self.problems.append(record)
        elif kind == "film":
            self.films.append(record)
        elif kind == "end":
            self.end = record
        else:
            raise ValueError(f"kind {kind!r}")

    @property
    def positions(self) -> np.ndarray | None:
        """``[N, n]`` token positions forwarded; None where some problems were evaluated by an earlier version."""
        known = all("positions" in record for record in self.problems)
        return np.array([record["positions"] for record in self.problems]) if known else None

    @property
    def undecided(self) -> dict[str, int]:
        """How many verdicts were not reached, by reason."""
        return count_reasons(reason for record in self.problems for reason in record.get("undecided", ()))

    def sort(self) -> None:
        """Problems by index, each once: they are written in the order in which they end, by two processes perhaps."""
        self.problems = [record for _, record in sorted({r["index"]: r for r in self.problems}.items())]
        self.films = list({film["problem_id"]: film for film in self.films}.values())


class ResultsFile:
    """A results file that is being written, by one process at a time; what it holds already is read first.

    A context manager, which gives the file back to others at its end.

    Raises:
        ValueError: the file is not one of results, or another process is writing it.
        OSError: it cannot be written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._held = ExitStack()
        self._held.enter_context(held(self.path.with_name(f".{self.path.name}.lock"), f"results {str(self.path)!r}"))
        self.cells = {cell.key: cell for cell in read_results(self.path)} if self.path.exists() else {}
        if self.path.exists() and (text := self.path.read_text(encoding="utf-8")) and not text.endswith("\n"):
            whole = _is_json(text[text.rfind("\n") + 1 :])  # else its writing was interrupted
            write_text(self.path, text + "\n" if whole else text[: text.rfind("\n") + 1])

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, *_) -> None:
        self._held.close()

    def open(self, key: str, settings: dict) -> Cell:
        """The cell with this key: what there is of it, or a new one."""
        if key not in self.cells:
            self.cells[key] = Cell(key, settings)
            self.write(key, "cell", {"settings": settings})
        return self.cells[key]

    def write(self, key: str, kind: str, record: dict) -> None:
        """Append a line. Raises OSError where it cannot be written; the next process drops half a line."""
        append(self.path, json.dumps({"kind": kind, "cell": key} | record))


def read_results(path: str | Path) -> list[Cell]:
    """The cells of a results file, finished or not.

    A truncated last line is dropped with a warning. Of problems that occur twice the last counts, with a warning.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no result.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"results {str(path)!r}: no such file.")
    cells: dict[str, Cell] = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            kind, key = record.pop("kind"), record.pop("cell")
            if kind == "cell":
                cells.setdefault(key, Cell(key, record["settings"]))  # two processes may both have begun it
            else:
                cells[key].add(kind, record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):  # no newline after it: writing it was interrupted
                print(
                    f"warning: {path}, line {number}: truncated after {len(line)} characters; it is dropped.",
                    file=sys.stderr,
                )
                continue
            raise ValueError(f"results {str(path)!r}, line {number}: not a result ({error!r}).") from None
    doubled = 0
    for cell in cells.values():
        doubled += len(cell.problems)
        cell.sort()
        doubled -= len(cell.problems)
    if doubled:
        said = f"{doubled} problems are there more than once: two processes wrote it. The last of each counts."
        print(f"warning: {path}: {said}", file=sys.stderr)
    return list(cells.values())


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
