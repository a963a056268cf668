"""Grade-school word problems: the openai/gsm8k format, and embedded problems in our own words and numbers.

Embedded completions are chains of equations that end in ``#### N``. One problem has many right chains: any order of
the steps, either order of the operands of + and *, one of three wordings. Tokens that are picked in parallel can
contradict each other, as in real text; that is what makes an unmasking policy worth learning.
"""

from __future__ import annotations

import re
from itertools import combinations
from math import prod

import numpy as np

from dllm_gym.tasks.base import GeneratedTask
from dllm_gym.types import Problem, Verdict
from dllm_gym.verify.arithmetic import read_number, verify_number

LARGEST = 60
"""No number of an embedded problem or of its solutions is larger."""

NAMES = "tom mia sam ana leo eva max zoe ben ida dan kim".split()
ITEMS = "apples books coins cards shells stamps pens cups stars nuts".split()


Term = tuple[int, tuple[int, ...]]
"""A signed term of the sum that answers a problem: its sign, and one number or two factors."""

STORIES = {
    "+a +b -c": [
        "{x} has {a} {item} . {x} buys {b} more and gives {c} to {y} . how many {item} are left ?",
        "there are {a} {item} in a box . {x} adds {b} and {y} takes {c} . how many are in the box ?",
    ],
    "+a -b -c": [
        "{x} has {a} {item} . {b} are lost and {c} are sold . how many {item} are left ?",
        "{x} saves {a} dollars , then spends {b} on {item} and {c} on food . how many dollars are left ?",
    ],
    "+a +b +c": [
        "{x} finds {a} {item} , {y} finds {b} and {z} finds {c} . how many {item} in all ?",
        "one shelf holds {a} {item} , the next {b} and the last {c} . how many {item} in all ?",
    ],
    "+a*b +c -d": [
        "{x} packs {a} boxes of {b} {item} and has {c} more . {x} sells {d} . how many {item} are left ?",
        "{x} works {a} days for {b} dollars a day , gets {c} more and spends {d} . how many dollars are left ?",
    ],
    "+a*b -c": [
        "{x} packs {a} boxes of {b} {item} and gives {c} to {y} . how many {item} are left ?",
    ],
    "+a*b +c*d": [
        "{x} buys {a} bags of {b} {item} and {y} buys {c} bags of {d} . how many {item} in all ?",
    ],
    "+a +b -c -d": [
        "{x} has {a} {item} and gets {b} more . {c} are lost and {d} are sold . how many {item} are left ?",
        "a bus has {a} people . {b} get on , {c} get off , then {d} more get off . how many are left ?",
    ],
}
"""Signed sum -> stories. Letters stand for the drawn numbers, in order."""

WORDINGS = (("", ".", "."), ("first", ", then", "."), ("", ", so", ""))
"""Opening, between two equations, before the answer."""


class GSM8K(GeneratedTask):
    """Word problems whose answer is a number. ``Problem.answer``: that number as text."""

    name = "gsm8k"
    gen_length = 24
    hub_id = "openai/gsm8k"
    hub_config = "main"
    columns = "`question` and `answer` (working, then `#### N`)"
    template = (
        "{question}\n\nReason step by step. End with a line that gives the final answer, a number, as follows:\n#### N"
    )

    def generate(self, rng: np.random.Generator) -> tuple[str, str, list[Term]]:
        form = list(STORIES)[rng.integers(len(STORIES))]
        terms = _draw_terms(form, rng)
        numbers = dict(zip("abcd", (n for _, factors in terms for n in factors), strict=False))
        x, y, z = rng.choice(NAMES, size=3, replace=False)
        story = STORIES[form][rng.integers(len(STORIES[form]))]
        prompt = story.format(x=x, y=y, z=z, item=ITEMS[rng.integers(len(ITEMS))], **numbers)
        return prompt, str(sum(map(value, terms))), sorted(terms)

    def demonstrate(self, content: list[Term], rng: np.random.Generator) -> str:
        opening, between, ending = WORDINGS[rng.integers(len(WORDINGS))]
        equations, result = _solve(content, rng)
        return " ".join(f"{opening} {f' {between} '.join(equations)} {ending} #### {result}".split())

    def read_row(self, row: dict) -> tuple[str, str]:
        _, marker, answer = row["answer"].rpartition("####")
        if not marker:
            raise ValueError("no '####' in the answer")
        if read_number(answer) is None:
            raise ValueError(f"the answer {answer.strip()!r} after '####' is not a number")
        return row["question"], answer.strip().replace(",", "")

    def solve_row(self, row: dict) -> str:
        return re.sub("<<.*?>>", "", row["answer"])  # annotations for a calculator that is not there

    def verify(self, problem: Problem, completion: str) -> Verdict:
        return verify_number(completion, problem.answer)


def value(term: Term) -> int:
    """The signed value of a term."""
    sign, factors = term
    return sign * prod(factors)


def _draw_terms(form: str, rng: np.random.Generator) -> list[Term]:
    """Numbers for a signed sum: every partial sum, in the order of the story, within 1..LARGEST."""
    while True:
        terms: list[Term] = []
        total = 0
        for part in form.split():
            largest, count = (9, 2) if "*" in part else (15 if terms else 30, 1)
            factors = rng.integers(2, largest + 1, size=count)
            terms.append((1 if part[0] == "+" else -1, tuple(factors.tolist())))
            total += value(terms[-1])
            if not 1 <= total <= LARGEST:
                break
        else:
            return terms


def _solve(terms: list[Term], rng: np.random.Generator) -> tuple[list[str], int]:
    """A random right chain: at each step multiply some product out, or join any two numbers that stay in range."""
    terms, equations = list(terms), []

    def write(left: int, operator: str, right: int, result: int):
        if operator != "-" and rng.random() < 0.5:
            left, right = right, left
        equations.append(f"{left} {operator} {right} = {result}")

    while len(equations) == 0 or len(terms) > 1 or len(terms[0][1]) > 1:
        products = [(i,) for i, (_, factors) in enumerate(terms) if len(factors) > 1]
        numbers = [i for i, (_, factors) in enumerate(terms) if len(factors) == 1]
        pairs = [(i, j) for i, j in combinations(numbers, 2) if 1 <= abs(value(terms[i]) + value(terms[j])) <= LARGEST]
        step = (products + pairs)[rng.integers(len(products) + len(pairs))]
        chosen = [terms[i] for i in step]
        total = sum(map(value, chosen))
        if len(step) == 1:
            left, right = chosen[0][1]
            write(left, "*", right, abs(total))
        else:
            left, right = sorted((abs(value(term)) for term in chosen), reverse=True)
            write(left, "+" if chosen[0][0] == chosen[1][0] else "-", right, abs(total))
        terms = [term for i, term in enumerate(terms) if i not in step] + [(1 if total > 0 else -1, (abs(total),))]
    return equations, value(terms[0])
