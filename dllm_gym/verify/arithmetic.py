"""Verifiers of numbers and of Countdown expressions.

They are total functions of text: any string gives a verdict, in time linear in its length, and none of it is run.
Only ASCII digits are numbers.
"""

from __future__ import annotations

import re
from fractions import Fraction

from dllm_gym.types import Verdict
from dllm_gym.verify.markup import OPENING, answer_region, answer_text, last_boxed, plain

LONGEST_EXPRESSION = 1_000
DEEPEST_BRACKET = 20
WRONG_VALUE_SCORE = 0.1
"""Countdown, every number used exactly once but the value is wrong (d1, arXiv 2504.12216)."""

HASHES = re.compile(r"####[ \t]*(?:\n\s{0,20})?([^\n#]*)")
HEADING = re.compile(r"\W*(?:(?:step|part|case|day)\b|[0-9]+[.)][ \t]+\S)", re.IGNORECASE)
"""A markdown heading of the working, ``#### Step 1`` or ``#### 1. Count the eggs``, is no ``#### N``."""
LABEL = re.compile(r"\b(?:answer|result|total|rs|usd|eur)\b|=\W*$", re.IGNORECASE)
"""Words that may stand before ``#### N``'s number: ``The answer is``, ``x =``, ``Rs.``"""

DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3}){1,9}|[0-9]{1,30})(?:\.[0-9]{1,30})?|(?<!\.)\.[0-9]{1,30})"
NUMBER = re.compile(rf"([^0-9/]*?)(?:([0-9]{{1,30}})\s+(?=[0-9]+\s*/))?({DIGITS})(?:\s*/\s*({DIGITS}))?[^0-9]*")
"""One number with no other digit around it: what stands before it, the whole part of a mixed number, number or
numerator, denominator."""
FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([0-9.,\s]+)\}|([0-9]))\s*(?:\{([0-9.,\s]+)\}|([0-9]))")
SPACED = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:\\?[ ,;!][0-9]{3}){1,9}(?![0-9]|\s*/)")
"""``1 234 567``: thousands parted by blanks."""
REMARK = re.compile(r"\([^()]*[A-Za-z][^()]*\)")
"""``5 (2 red and 3 green)`` is 5."""
UNITS = re.compile(r"\\(?:text\w*|math(?:rm|bf|it|sf|tt)|mbox|hbox|boldsymbol|bm|quad|[$%()\[\]!;: ])")
"""LaTeX that says nothing about the value."""
POWER_OF_UNIT = re.compile(
    r"(?:(?<=[A-Za-z])|(?<=[A-Za-z]\}))\s?(?:\^\s?\{?[23]\}?|[\u00b2\u00b3])|\^\s?\{?\s?\\circ\s?\}?"
)
"""The power of ``cm^2``, and the degree sign."""

LITERAL = re.compile(r"\s*(-?)\s*([0-9]{1,12}(?:\.[0-9]{1,12})?)\s*")
TOKEN = re.compile(r"[0-9]{1,12}(?:\.[0-9]{1,12})?|[-+*/()]|\\frac")
LATEX = {r"\times": "*", r"\cdot": "*", r"\div": "/", r"\dfrac": r"\frac", r"\tfrac": r"\frac"}
LATEX |= dict.fromkeys((r"\left", r"\right", r"\(", r"\)", r"\[", r"\]", r"\,", r"\;", r"\!", r"\ ", "$"), " ")
LATEX |= {"{": "(", "}": ")", "[": "(", "]": ")"}
LATEX_SYMBOL = re.compile("|".join(map(re.escape, LATEX)))
SHORT_FRACTION = re.compile(r"(\\[dtc]?frac)\s*(?:([0-9])|(\{[^{}]*\}))\s*(?:([0-9])|(?=\{))")
r"""``\frac82``, ``\frac{8}2`` and ``\frac8{2}``."""
TIMES = re.compile(r"(?<=[0-9)\s])[xX](?=[\s0-9(])")


def verify_number(completion: str, expected: str) -> Verdict:
    r"""Is the answer of the completion the expected number? Score: 1 if so, else 0.

    The answer is the last ``<answer>``, else the last ``#### N``, else what `answer_region` finds. It must hold one
    number (after its last ``=``), which may have a currency, thousands commas, a unit, a denominator, or a remark in
    brackets after it. A number without a marker is no answer: the numbers of the question and of the working would
    count.

    Args:
        completion: any text.
        expected: the number as text, "18", "1,234" or "18.0".

    Returns:
        A verdict whose answer is the number that was read, in lowest terms ("18", "33/2").
    """
    text = answer_text(completion)
    region = answer_region(text)
    tagged = region and OPENING.search(text)
    values = () if tagged else map(read_hashes, reversed(HASHES.findall(text)))
    value = next((value for value in values if value is not None), None)
    if value is None:
        value = read_number(region or "")
    if value is None:
        return Verdict(False, 0.0, None)
    correct = value == read_number(expected)
    return Verdict(correct, float(correct), str(value))


def read_hashes(line: str) -> Fraction | None:
    """The number of ``#### line``; None for a heading, or a sentence that does not call it the answer."""
    line = last_boxed(line) or line
    before = re.match("[^0-9]*", line)[0]
    sentence = re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", before))
    return None if HEADING.match(line) or (sentence and not LABEL.search(before)) else read_number(line)


def read_number(text: str) -> Fraction | None:
    """The only number in a short text; None where there is none, or several, or mathematics that is not read."""
    sides = [side for side in plain(text).split("=") if re.search("[0-9]", side)]
    if not sides:
        return None
    text = sides[-1].replace("{,}", ",").replace("\\,", ",")
    text = FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]} ", text)
    text = SPACED.sub(lambda m: re.sub("[^0-9]", "", m[0]), text)
    text = POWER_OF_UNIT.sub("", UNITS.sub("", text))
    without = REMARK.sub("", text)
    text = without if re.search("[0-9]", without) else text
    if re.search(r"\\[A-Za-z]|[\^!√]", text) or any(c.isnumeric() and not c.isascii() for c in text):
        return None
    match = NUMBER.fullmatch(text)
    if match is None:
        return None
    before, *parts = match.groups()
    whole, numerator, denominator = (part and Fraction(part.replace(",", "")) for part in parts)
    if denominator == 0:
        return None
    value = (whole or 0) + numerator / (denominator or 1)
    return -value if before.rstrip(" $({").endswith("-") else value


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
    text = SHORT_FRACTION.sub(_with_braces, plain(text))
    text = TIMES.sub("*", LATEX_SYMBOL.sub(lambda match: LATEX[match[0]], text))
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


def _with_braces(fraction: re.Match) -> str:
    command, digit, group, denominator = fraction.groups()
    return command + (group or f"{{{digit}}}") + (f"{{{denominator}}}" if denominator else "")


def _literal(text: str) -> Fraction:
    match = LITERAL.fullmatch(text)
    if match is None:
        raise ValueError("not a number")
    return Fraction(match[1] + match[2])
