"""Competition mathematics: MATH-500 and two years of AIME. Benchmarks of real problems; none are embedded."""

from __future__ import annotations

from dllm_gym.tasks.base import Task
from dllm_gym.types import Problem, Verdict
from dllm_gym.verify.arithmetic import read_number
from dllm_gym.verify.math import verify_math


class MATH500(Task):
    r"""500 problems of the MATH test set. ``Problem.answer``: the reference answer, LaTeX.

    Problems from MATH (arXiv 2103.03874), the 500 of "Let's verify step by step" (arXiv 2305.20050).
    """

    name = "math500"
    hub_id = "HuggingFaceH4/MATH-500"
    hub_splits = {"test": "test"}
    columns = "`problem` and `answer` (LaTeX)"
    template = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."

    def read_row(self, row: dict) -> tuple[str, str]:
        problem, answer = row["problem"], row["answer"]
        if not isinstance(problem, str) or not isinstance(answer, str | int | float) or not str(answer).strip():
            raise ValueError(f"`problem` must be text and `answer` text or a number, not {problem!r} and {answer!r}")
        return problem, str(answer).strip()

    def solve_row(self, row: dict) -> str:
        solution = (row.get("solution") or "").strip()
        if "\\boxed" in solution:
            return solution
        return f"{solution}\n\nThe final answer is \\boxed{{{self.read_row(row)[1]}}}.".strip()

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Score: 1 for a right answer, else 0; a formula of the problem is no answer to it."""
        return verify_math(completion, problem.answer, problem.prompt)


class AIME24(MATH500):
    """The 30 problems of AIME I and II 2024. ``Problem.answer``: a whole number from 0 to 999, as text."""

    name = "aime24"
    hub_id = "HuggingFaceH4/aime_2024"
    hub_splits = {"test": "train"}  # the set calls its only split so
    columns = "`problem` and `answer` (0 to 999)"

    def read_row(self, row: dict) -> tuple[str, str]:
        problem, answer = super().read_row(row)
        number = read_number(answer)
        if number is None or number.denominator != 1 or not 0 <= number <= 999:
            raise ValueError(f"the answer {answer!r} is not a whole number from 0 to 999")
        return problem, str(number)


class AIME25(AIME24):
    """The 30 problems of AIME I and II 2025. ``Problem.answer``: a whole number from 0 to 999, as text."""

    name = "aime25"
    hub_id = "math-ai/aime25"
    hub_splits = {"test": "test"}
