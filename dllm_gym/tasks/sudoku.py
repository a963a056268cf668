"""4x4 Sudoku: 16 digits, 0 for a blank; a completion is a filled grid that keeps the clues."""

from __future__ import annotations

import re
from functools import cache
from itertools import permutations

import numpy as np

from dllm_gym.tasks.base import EMBEDDED, GeneratedTask
from dllm_gym.types import Problem, Verdict
from dllm_gym.verify.sudoku import verify_sudoku

FEWEST_BLANKS, MOST_BLANKS = 4, 12


class Sudoku(GeneratedTask):
    """``Problem.answer``: the puzzle, a string of 16 digits; any grid that completes it is right.

    Embedded puzzles have one solution. There are only 288 grids, so train and test are told apart by puzzle, not by
    grid: a test puzzle's solution may have been seen as the solution of another puzzle.

    Args:
        partial_credit: the score of a grid that is not right. "rules": the share of the blanks whose digit is in
            conflict with no other cell, 0 where a clue is changed or a cell left out. "solution": the share of the
            blanks that hold the solution's digit, as in d1 (arXiv 2504.12216), whose denoisers change clues and leave
            cells out. None: "rules" for embedded puzzles, "solution" for real data.

    Raises:
        ValueError: another partial_credit, and as `Task`.
    """

    name = "sudoku"
    gen_length = 16
    columns = "`Puzzle` (16 digits, 0 for a blank)"
    template = "{question} End with the 16 digits of the solution, row by row, inside <answer> </answer>."

    def __init__(
        self, dataset: str | None = None, split: str = "train", *, partial_credit: str | None = None, **options
    ):
        if partial_credit not in (None, "rules", "solution"):
            raise ValueError(f"partial_credit={partial_credit!r}: must be 'rules', 'solution' or None.")
        super().__init__(dataset, split, **options)
        self.fills_canvas = self.dataset == EMBEDDED
        self.partial_credit = partial_credit or ("rules" if self.dataset == EMBEDDED else "solution")

    def generate(self, rng: np.random.Generator) -> tuple[str, str, tuple[str, str]]:
        grids = all_grids()
        while True:
            solution = grids[rng.integers(len(grids))]
            clues = np.ones(16, dtype=bool)
            clues[rng.permutation(16)[: rng.integers(FEWEST_BLANKS, MOST_BLANKS + 1)]] = False
            if (grids[:, clues] == solution[clues]).all(axis=1).sum() == 1:
                puzzle = "".join(map(str, np.where(clues, solution, 0)))
                return f"sudoku {' '.join(puzzle)} :", puzzle, (puzzle, "".join(map(str, solution)))

    def demonstrate(self, content: tuple[str, str], rng: np.random.Generator) -> str:
        return " ".join(content[1])

    def read_row(self, row: dict) -> tuple[str, str]:
        puzzle = row["Puzzle"]
        if not re.fullmatch("[0-4]{16}", puzzle):
            raise ValueError(f"the puzzle {puzzle!r} is not 16 digits from 0 to 4")
        if not solutions(puzzle):
            raise ValueError(f"the puzzle {puzzle!r} has no solution")
        question = (
            f"Solve this 4x4 Sudoku, given row by row with 0 for a blank: {puzzle}. Each row, column and 2x2 box "
            f"holds 1 to 4 once."
        )
        return question, puzzle

    def solve_row(self, row: dict) -> str:
        return f"<answer>{solutions(self.read_row(row)[1])[0]}</answer>"

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Correct: a filled grid that keeps the clues and the rules. Score: see `partial_credit`."""
        known = solutions(problem.answer) if self.partial_credit == "solution" else ()
        return verify_sudoku(completion, problem.answer, known)


def solutions(puzzle: str) -> list[str]:
    """The filled grids that keep the clues of a puzzle of 16 digits."""
    grids, digits = all_grids(), np.array(list(map(int, puzzle)))
    kept = grids[((digits == 0) | (grids == digits)).all(axis=1)]
    return ["".join(map(str, grid)) for grid in kept]


@cache
def all_grids() -> np.ndarray:
    """The 288 filled grids, ``[288, 16]`` int64."""
    rows = list(permutations((1, 2, 3, 4)))
    grids = [
        a + b + c + d
        for a in rows
        for b in rows
        if len({*a[:2], *b[:2]}) == 4 and len({*a[2:], *b[2:]}) == 4
        for c in rows
        for d in rows
        if len({*c[:2], *d[:2]}) == 4 and len({*c[2:], *d[2:]}) == 4
        if all(len({a[i], b[i], c[i], d[i]}) == 4 for i in range(4))
    ]
    return np.array(grids)
