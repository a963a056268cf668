"""Verifier of 4x4 Sudoku."""

from __future__ import annotations

import re

from dllm_gym.types import Verdict
from dllm_gym.verify.arithmetic import answer_region, answer_text

GRID_PUNCTUATION = re.compile(r"[\s,;|+\-()\[\]{}]+")
UNITS = [
    *([4 * i + j for j in range(4)] for i in range(4)),
    *([4 * j + i for j in range(4)] for i in range(4)),
    *([i, i + 1, i + 4, i + 5] for i in (0, 2, 8, 10)),
]
"""Cells of the rows, the columns and the boxes."""
PEERS = [{peer for unit in UNITS if cell in unit for peer in unit} - {cell} for cell in range(16)]


def verify_sudoku(completion: str, puzzle: str) -> Verdict:
    r"""Is the answer a filled grid that keeps the clues? Any such grid is right, whatever the puzzle's author had.

    The answer is the last ``<answer>`` or ``\boxed{}``, else the whole text. Without blanks and grid punctuation it
    must be 16 digits from 1 to 4; nothing is padded, cut or picked out of prose.

    Args:
        completion: any text.
        puzzle: 16 digits, 0 for a blank.

    Returns:
        A verdict with the share of the puzzle's blanks whose digit is in conflict with no other cell of its row,
        column and box as the score: 1.0 only if correct, and 0 if a clue is changed or the answer is no grid.
    """
    text = answer_text(completion)
    region = answer_region(text)
    grid = GRID_PUNCTUATION.sub("", text if region is None else region)
    if re.fullmatch("[1-4]{16}", grid) is None:
        return Verdict(False, 0.0, region or None)
    if any(clue not in ("0", digit) for clue, digit in zip(puzzle, grid, strict=True)):
        return Verdict(False, 0.0, grid)
    free = [all(grid[cell] != grid[peer] for peer in PEERS[cell]) for cell in range(16)]
    blanks = [free[cell] for cell in range(16) if puzzle[cell] == "0"]
    correct = all(free)
    return Verdict(correct, float(correct) if all(blanks) else sum(blanks) / len(blanks), grid)
