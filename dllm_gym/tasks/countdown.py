"""Countdown: reach a target with +, -, * and / from given numbers, each used exactly once.

Embedded problems have three numbers. Their completions are chains of equations, each operand a given number or an
earlier result, and one problem has many of them. Real completions are expressions; the verifier reads both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import combinations, permutations

import numpy as np

from dllm_gym.tasks.base import GeneratedTask
from dllm_gym.types import Problem, Verdict
from dllm_gym.verify.arithmetic import verify_countdown

LARGEST_NUMBER = 15
LARGEST_TARGET = 60
LARGEST_RESULT = 99
"""No intermediate result of an embedded problem is larger."""


class Countdown(GeneratedTask):
    """``Problem.answer``: ``(numbers, target)``, a tuple of int and an int."""

    name = "countdown"
    gen_length = 12
    hub_id = "Jiayi-Pan/Countdown-Tasks-3to4"
    hub_splits = {"train": "train[1000:]", "test": "train[:1000]"}
    columns = "`nums` and `target`, or `input` (comma-separated numbers) and `output` (the target)"
    template = "{question} End with the expression alone inside <answer> </answer>."

    def generate(self, rng: np.random.Generator) -> tuple[str, tuple, tuple]:
        while True:
            numbers = tuple(rng.integers(1, LARGEST_NUMBER + 1, size=3).tolist())
            targets = sorted({second[3] for _, second in _chains(numbers) if second[3] <= LARGEST_TARGET})
            if targets:
                target = targets[rng.integers(len(targets))]
                prompt = f"make {target} from {' '.join(map(str, numbers))} :"
                return prompt, (numbers, target), (sorted(numbers), target)

    def demonstrate(self, content: tuple, rng: np.random.Generator) -> str:
        numbers, target = content
        chains = [chain for chain in _chains(numbers) if chain[1][3] == target]
        return " , ".join(map(_text, chains[rng.integers(len(chains))]))

    def read_row(self, row: dict) -> tuple[str, tuple]:
        if "nums" in row:
            numbers, target = row["nums"], row["target"]
            numbers = json.loads(numbers) if isinstance(numbers, str) else numbers
        else:
            numbers, target = row["input"].split(","), row["output"]
        numbers, target = tuple(map(_whole, numbers)), _whole(target)
        question = (
            f"Write an arithmetic expression that equals {target}. "
            f"Use each of the numbers {list(numbers)} exactly once, with +, -, * and / and parentheses."
        )
        return question, (numbers, target)

    def solve_row(self, row: dict) -> str:
        numbers, target = self.read_row(row)[1]
        for expression, value in _expressions([(str(number), Fraction(number)) for number in numbers]):
            if value == target:
                return f"<answer>{expression}</answer>"
        raise ValueError(f"no expression of {list(numbers)} equals {target}")

    def verify(self, problem: Problem, completion: str) -> Verdict:
        return verify_countdown(completion, *problem.answer)


def _whole(number: int | float | str) -> int:
    if Fraction(str(number)).denominator != 1:
        raise ValueError(f"{number!r} is not a whole number")
    return int(Fraction(str(number)))


Expression = tuple[str, Fraction]
"""Text and value."""


def _expressions(parts: list[Expression]) -> Iterator[Expression]:
    """Every expression that uses each of the parts once."""
    if len(parts) == 1:
        yield parts[0]
    for i, j in combinations(range(len(parts)), 2):
        rest = [part for k, part in enumerate(parts) if k not in (i, j)]
        for (left, a), (right, b) in permutations((parts[i], parts[j])):
            values = {"+": a + b, "-": a - b, "*": a * b} | ({"/": a / b} if b else {})
            for operator, value in values.items():
                whole = not rest
                text = f"{left} {operator} {right}" if whole else f"({left} {operator} {right})"
                yield from _expressions([*rest, (text, value)])


Equation = tuple[int, str, int, int]
"""Left operand, operator, right operand, result."""


def _chains(numbers: Sequence[int]) -> Iterator[tuple[Equation, Equation]]:
    """Every right chain of two equations over three numbers."""
    for i, j in permutations(range(3), 2):
        last = numbers[3 - i - j]
        for first in _equations(numbers[i], numbers[j]):
            for left, right in ((first[3], last), (last, first[3])):
                for second in _equations(left, right):
                    yield first, second


def _equations(left: int, right: int) -> Iterator[Equation]:
    """The equations with these operands and a whole result in 1..LARGEST_RESULT."""
    if left + right <= LARGEST_RESULT:
        yield left, "+", right, left + right
    if left > right:
        yield left, "-", right, left - right
    if left * right <= LARGEST_RESULT:
        yield left, "*", right, left * right
    if left % right == 0:
        yield left, "/", right, left // right


def _text(equation: Equation) -> str:
    left, operator, right, result = equation
    return f"{left} {operator} {right} = {result}"
