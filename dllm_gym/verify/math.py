"""Verifier of mathematical answers: the final answer of a completion against a reference in LaTeX."""

from __future__ import annotations

import re

from dllm_gym.types import Verdict
from dllm_gym.verify import latex
from dllm_gym.verify.arithmetic import answer_text, last_boxed

DELIMITERS = re.compile(r"(?<!\\)(?:\\[()\[\]]|\$+)")
r"""``$``, ``\(``, ``\[`` around formulas; not the ``\\[`` of a matrix, nor ``\$``."""


def verify_math(completion: str, expected: str) -> Verdict:
    r"""Is the answer of the completion mathematically equal to the expected one? Score: 1 if so, else 0.

    The answer is that of `final_answer`; without a ``\boxed{}`` or ``<answer>`` there is none. math-verify decides
    (``1/2`` is ``\frac{1}{2}`` and ``0.5``, ``3, 7, 5`` is the set ``3, 5, 7``, units and ``x =`` are left out,
    decimals count to six places). An answer that is too long, or takes it too much time or memory, is not correct.

    Args:
        completion: any text.
        expected: the reference answer, LaTeX, for example ``\frac{1}{2}``.

    Returns:
        A verdict whose answer is the text that was judged.

    Raises:
        RuntimeError: math-verify cannot be run at all.
    """
    answer = final_answer(completion)
    if not answer:
        return Verdict(False, 0.0, None)
    correct = answer == expected or latex.equal(expected, answer)
    return Verdict(correct, float(correct), answer)


def final_answer(completion: str) -> str | None:
    r"""The last ``\boxed{}`` in the last ``<answer>``, else what stands there; without that tag the last ``\boxed{}``.

    Unlike `dllm_gym.verify.arithmetic.answer_region`, the tag does not end at the first ``<``: it may be an inequality.
    """
    text = answer_text(completion)
    _, tag, region = text.rpartition("<answer>")
    region = region.partition("</")[0] if tag else text
    boxed = last_boxed(region)
    answer = boxed if boxed is not None else region if tag else None
    return answer and DELIMITERS.sub(" ", answer).strip().rstrip(".").strip()
