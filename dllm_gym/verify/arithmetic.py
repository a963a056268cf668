"""Verifiers of numbers and of Countdown expressions, and how an answer is found in a completion.

They are total functions of text: any string gives a verdict, in time linear in its length, and none of it is run.
Only ASCII digits are numbers.
"""

from __future__ import annotations

import re
from fractions import Fraction

from dllm_gym.types import Verdict

TAIL = 20_000
"""Only this many last characters of a completion are read: an answer stands at the end."""
LONGEST_EXPRESSION = 1_000
DEEPEST_BRACKET = 20
WRONG_VALUE_SCORE = 0.1
"""Countdown, every number used exactly once but the value is wrong (d1, arXiv 2504.12216)."""

END_OF_TURN = re.compile(r"<\|(?:eot_id|endoftext|im_end)\|>")
HASHES = re.compile(r"####([^\w#]*(?![0-9]+[.)][ \t]+\S)[0-9][^\n#]*)")
"""``#### N``, but no markdown heading like ``#### Step 1`` or ``#### 1. Count the eggs``."""

DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3}){1,9}|[0-9]{1,30})(?:\.[0-9]{1,30})?|(?<!\.)\.[0-9]{1,30})"
NUMBER = re.compile(rf"([^0-9/]*?)({DIGITS})(?:\s*/\s*({DIGITS}))?[^0-9]*")
"""One number with no other digit around it: what stands before it, number or numerator, denominator."""
FRACTION = re.compile(r"\\[dt]?frac\s*\{([0-9.,\s]+)\}\s*\{([0-9.,\s]+)\}")
UNITS = re.compile(r"\\(?:text\w*|mathrm|mbox|quad|[$%()\[\]!;: ])")
"""LaTeX that says nothing about the value."""

LITERAL = re.compile(r"\s*(-?)\s*([0-9]{1,12}(?:\.[0-9]{1,12})?)\s*")
TOKEN = re.compile(r"[0-9]{1,12}(?:\.[0-9]{1,12})?|[-+*/()]|\\frac")
LATEX = {r"\times": "*", r"\cdot": "*", r"\div": "/", r"\dfrac": r"\frac", r"\tfrac": r"\frac"}
LATEX |= dict.fromkeys((r"\left", r"\right", r"\(", r"\)", r"\[", r"\]", r"\,", r"\;", r"\!", r"\ ", "$"), " ")
LATEX |= {"×": "*", "÷": "/", "\u2212": "-", "{": "(", "}": ")", "[": "(", "]": ")"}
LATEX_SYMBOL = re.compile("|".join(map(re.escape, LATEX)))


def answer_text(completion: str) -> str:
    """What is read of a completion: up to the first end-of-turn token, and of that the last `TAIL` characters."""
    return END_OF_TURN.split(completion, maxsplit=1)[0][-TAIL:]


def last_answer(text: str) -> str | None:
    """What stands after the last ``<answer>``, up to the next ``<`` (the closing tag may be cut) or the end."""
    _, tag, region = text.rpartition("<answer>")
    return region.partition("<")[0].strip() if tag else None


def last_boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{}``; where it is never closed, up to the end of its line or tag."""
    _, command, region = text.rpartition("\\boxed{")
    if not command:
        return None
    depth = 1
    for end, character in enumerate(region):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return region[:end].strip()
    return re.split(r"[<>\n]", region, maxsplit=1)[0].strip()


def answer_region(text: str) -> str | None:
    r"""The last ``<answer>``, or the ``\boxed{}`` in it; without that tag the last ``\boxed{}``; else None."""
    region = last_answer(text)
    boxed = last_boxed(text if region is None else region)
    return region if boxed is None else boxed


def verify_number(completion: str, expected: str) -> Verdict:
    r"""Is the answer of the completion the expected number? Score: 1 if so, else 0.

    The answer is the last ``#### N``, else the last ``\boxed{}``, else the last ``<answer>``. It must hold one number
    (after its last ``=``), which may have a currency, thousands commas, a unit or a denominator. A number without a
    marker is no answer: the numbers of the question and of the working would count.

    Args:
        completion: any text.
        expected: the number as text, "18", "1,234" or "18.0".

    Returns:
        A verdict whose answer is the number that was read, in lowest terms ("18", "33/2").
    """
    text = answer_text(completion)
    value = next((v for v in map(read_number, reversed(HASHES.findall(text))) if v is not None), None)
    if value is None:
        boxed = last_boxed(text)
        region = last_answer(text) if boxed is None else boxed
        value = read_number(region or "")
    if value is None:
        return Verdict(False, 0.0, None)
    correct = value == read_number(expected)
    return Verdict(correct, float(correct), str(value))


def read_number(text: str) -> Fraction | None:
    """The only number in a short text; None where there is none, or several, or mathematics that is not read."""
    text = text.rpartition("=")[2].replace("\u2212", "-").replace("\u2013", "-")
    text = FRACTION.sub(r" \1/\2 ", text).replace("{,}", ",").replace("\\,", ",")
    text = UNITS.sub("", text)
    if re.search(r"\\[A-Za-z]|[\^!√π]", text) or any(c.isnumeric() and not c.isascii() for c in text):
        return None
    match = NUMBER.fullmatch(text)
    if match is None:
        return None
    before, *parts = match.groups()
    numerator, denominator = (Fraction((part or "1").replace(",", "")) for part in parts)
    if denominator == 0:
        return None
    return (-numerator if before.rstrip(" $({").endswith("-") else numerator) / denominator


def verify_countdown(completion: str, numbers: tuple[int, ...], target: int) -> Verdict:
    r"""Does the completion reach the target with each number used exactly once?

    The answer is that of `answer_region`, else the whole text if it is nothing but equations. It is an expression,
    ``(12 - 9) + 3`` or ``12 - 9 + 3 = 6``, or a chain of true equations, ``12 - 9 = 3 , 3 + 3 = 6``, where each
    operand is a number or an earlier result not used before, and only the last result is left over.

    Returns:
        A verdict that is correct only if every equation holds and the value is exactly the target. Score: 1.0 if
        correct, `WRONG_VALUE_SCORE` if only values are wrong, else 0. Its answer is the text that was judged.
    """
    text = answer_text(completion)
    region = answer_region(text)
    answer = text.strip() if region is None else region
    try:
        all_true, value = _solve_chain(answer, numbers)
    except (ValueError, ZeroDivisionError):
        return Verdict(False, 0.0, region or None)
    correct = all_true and value == target
    return Verdict(correct, 1.0 if correct else WRONG_VALUE_SCORE, answer)


def _solve_chain(text: str, numbers: tuple[int, ...]) -> tuple[bool, Fraction]:
    """Whether every equation holds, and the last result. ValueError unless every number is used exactly once."""
    if len(text) > LONGEST_EXPRESSION:
        raise ValueError("too long")
    text = LATEX_SYMBOL.sub(lambda match: LATEX[match[0]], text)
    equations = [part.rstrip(" .") for part in re.split(r"[,;\n]", text) if part.strip(" .")]
    unused, all_true = [Fraction(number) for number in numbers], True
    for equation in equations:
        expression, equals, stated = equation.partition("=")
        value, operands = evaluate(expression)
        for operand in operands:
            unused.remove(operand)
        if equals:
            all_true &= value == _literal(stated)
            value = _literal(stated)
        elif len(equations) > 1:
            raise ValueError("an expression beside others has no result")
        unused.append(value)
    if not equations or len(unused) != 1:
        raise ValueError("a number or a result is not used")
    return all_true, unused[0]


def evaluate(text: str) -> tuple[Fraction, list[Fraction]]:
    r"""Value and literals of an expression over ``+ - * /``, brackets and ``\frac``.

    A minus sign before a literal belongs to it (so that a negative result can be used), before a bracket it is
    refused. ValueError where the text is no such expression, ZeroDivisionError where it has no value.
    """
    tokens = TOKEN.findall(text)
    if "".join(tokens) != "".join(text.split()):
        raise ValueError("not an expression")
    tokens = ["", *reversed(tokens)]  # a stack; the empty token at its bottom ends the expression
    operands = []

    def sum_(depth: int) -> Fraction:
        value = product(depth)
        while tokens[-1] in ("+", "-"):
            value = value + product(depth) if tokens.pop() == "+" else value - product(depth)
        return value

    def product(depth: int) -> Fraction:
        value = atom(depth)
        while tokens[-1] in ("*", "/"):
            value = value * atom(depth) if tokens.pop() == "*" else value / atom(depth)
        return value

    def atom(depth: int) -> Fraction:
        if tokens[-1] == "(":
            return bracket(depth)
        if tokens[-1] == r"\frac":
            tokens.pop()
            return bracket(depth) / bracket(depth)
        sign = tokens.pop() if tokens[-1] == "-" else ""
        operands.append(_literal(sign + tokens[-1]))
        tokens.pop()
        return operands[-1]

    def bracket(depth: int) -> Fraction:
        if depth == DEEPEST_BRACKET or tokens[-1] != "(":
            raise ValueError("too deep, or no bracket")
        tokens.pop()
        value = sum_(depth + 1)
        if tokens.pop() != ")":
            raise ValueError("an open bracket")
        return value

    value = sum_(0)
    if tokens != [""]:
        raise ValueError("text after the expression")
    return value, operands


def _literal(text: str) -> Fraction:
    match = LITERAL.fullmatch(text)
    if match is None:
        raise ValueError("not a number")
    return Fraction(match[1] + match[2])
