"""4x4 Sudoku: 16 digits, 0 for a blank; a completion is a filled grid that keeps the clues."""

from __future__ import annotations

import re
from functools import cache
from itertools import permutations

import numpy as np

from dllm_gym.tasks.base import GeneratedTask
from dllm_gym.types import Problem, Verdict
from dllm_gym.verify.sudoku import verify_sudoku

FEWEST_BLANKS, MOST_BLANKS = 4, 12


class Sudoku(GeneratedTask):
    """``Problem.answer``: the puzzle, a string of 16 digits; any grid that completes it is right.

    Embedded puzzles have one solution. There are only 288 grids, so train and test are told apart by puzzle, not by
    grid: a test puzzle's solution may have been seen as the solution of another puzzle.
    """

    name = "sudoku"
    gen_length = 16
    columns = "`Puzzle` (16 digits, 0 for a blank)"
    template = "{question} End with the 16 digits of the solution, row by row, inside <answer> </answer>."

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
        question = (
            f"Solve this 4x4 Sudoku, given row by row with 0 for a blank: {puzzle}. Each row, column and 2x2 box "
            f"holds 1 to 4 once."
        )
        return question, puzzle

    def solve_row(self, row: dict) -> str:
        puzzle = np.array(list(map(int, self.read_row(row)[1])))
        grids = all_grids()
        solutions = grids[((puzzle == 0) | (grids == puzzle)).all(axis=1)]
        if not len(solutions):
            raise ValueError("the puzzle has no solution")
        return f"<answer>{''.join(map(str, solutions[0]))}</answer>"

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Score: share of the blanks whose digit conflicts with no other cell; 0 if a clue is changed or no grid."""
        return verify_sudoku(completion, problem.answer)


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
