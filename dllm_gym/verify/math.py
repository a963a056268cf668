"""Verifier of mathematical answers: the final answer of a completion against a reference in LaTeX."""

from __future__ import annotations

from dllm_gym.types import Verdict
from dllm_gym.verify import latex
from dllm_gym.verify.markup import answer_region, answer_text, plain


def verify_math(completion: str, expected: str, question: str = "") -> Verdict:
    r"""Is the answer of the completion mathematically equal to the expected one? Score: 1 if so, else 0.

    The answer is that of `dllm_gym.verify.markup.answer_region`; without a ``\boxed{}`` or ``<answer>`` there is none.
    What counts as equal is said in `dllm_gym.verify.equality`: ``1/2`` is ``\frac{1}{2}`` and ``0.5``, ``3, 7, 5`` is
    the set ``3, 5, 7``, ``x^2 - 1`` is ``(x-1)(x+1)``, units and ``x =`` are left out.

    Args:
        completion: any text.
        expected: the reference answer, LaTeX, for example ``\frac{1}{2}``.
        question: what was asked. Its own formulas are no answers: to repeat what is to be factored or simplified is
            algebraically right and still wrong.

    Returns:
        A verdict whose answer is the text that was judged. It is `undecided` where the answers are too long, or the
        comparison takes too much time or memory or cannot tell.

    Raises:
        RuntimeError: the process that compares cannot be started.
    """
    answer, expected = final_answer(completion), plain(expected)
    if not answer:
        return Verdict(False, 0.0, None)
    try:
        correct = answer == expected or latex.equal(expected, answer, question)
    except latex.Undecided as reason:
        return Verdict(False, 0.0, answer, undecided=str(reason))
    return Verdict(correct, float(correct), answer)


def final_answer(completion: str) -> str | None:
    """The answer of a completion without markup, LaTeX; None where there is none."""
    region = answer_region(answer_text(completion))
    return None if region is None else plain(region)
