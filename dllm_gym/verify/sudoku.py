"""Verifier of 4x4 Sudoku."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dllm_gym.types import Verdict
from dllm_gym.verify.markup import answer_region, answer_text, plain

ROW_LABEL = re.compile(
    r"^\W{0,8}(?:(?:row|r|line)\s{0,4}[1-4]\s{0,4}[:.)=-]?|[1-4][.):]\s)", re.IGNORECASE | re.MULTILINE
)
GRID_PUNCTUATION = re.compile(
    r"\\(?:begin|end|hline|quad)(?:\{[^{}]*\}){0,2}|\\|[\s,;|+\-()\[\]{}/&'\"_=*\u2500-\u257f]+"
)
"""What may stand between the digits: blanks, brackets, frames, LaTeX's arrays."""
UNITS = [
    *([4 * i + j for j in range(4)] for i in range(4)),
    *([4 * j + i for j in range(4)] for i in range(4)),
    *([i, i + 1, i + 4, i + 5] for i in (0, 2, 8, 10)),
]
"""Cells of the rows, the columns and the boxes."""
PEERS = [{peer for unit in UNITS if cell in unit for peer in unit} - {cell} for cell in range(16)]


def verify_sudoku(completion: str, puzzle: str, solutions: Sequence[str] = ()) -> Verdict:
    r"""Is the answer a filled grid that keeps the clues? Any such grid is right, whatever the puzzle's author had.

    The answer is the last ``<answer>`` or ``\boxed{}``, else the whole text. Without blanks, grid punctuation and
    labels of rows it must be 16 digits from 1 to 4; nothing is padded, cut or picked out of prose.

    A grid that is not right may get partial credit, less than 1. Without `solutions`: the share of the puzzle's blanks
    whose digit is in conflict with no other cell of its row, column and box; 0 where a clue is changed or there is no
    whole grid. With them: the share of the blanks that hold the digit of the solution, the nearest one where there are
    several. Cells that are left out count as wrong; changed clues and digits after the 16th do not count.

    Args:
        completion: any text.
        puzzle: 16 digits, 0 for a blank.
        solutions: filled grids, 16 digits each.

    Returns:
        A verdict whose answer is the digits that were read, or the text where it is no grid.
    """
    text = answer_text(completion)
    region = answer_region(text)
    grid = GRID_PUNCTUATION.sub("", ROW_LABEL.sub("", plain(text if region is None else region)))
    if re.fullmatch("[0-4]+", grid) is None:
        return Verdict(False, 0.0, region or None)
    blanks = [cell for cell in range(16) if puzzle[cell] == "0"]
    whole = re.fullmatch("[1-4]{16}", grid) is not None
    kept = whole and all(clue in ("0", digit) for clue, digit in zip(puzzle, grid, strict=True))
    free = [kept and all(grid[cell] != grid[peer] for peer in PEERS[cell]) for cell in range(16)]
    if all(free):
        return Verdict(True, 1.0, grid)
    right = sum(free[cell] for cell in blanks)
    if solutions:
        cells = grid[:16].ljust(16, "0")
        right = max(sum(cells[cell] == solution[cell] for cell in blanks) for solution in solutions)
    share = min(right, len(blanks) - 1) / len(blanks) if blanks else 0.0
    return Verdict(False, share, grid)
