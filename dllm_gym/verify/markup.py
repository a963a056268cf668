r"""Where the answer stands in a completion, and how it reads without markup: what every verifier begins with.

Completions mark their answers in many ways, and break the marks in more: ``<answer>``, ``\boxed{}``, bold, backticks,
typographic signs. All verifiers read them here, so that what one understands the others do too. All functions are total
functions of text, in time linear in its length.
"""

from __future__ import annotations

import re

TAIL = 20_000
"""Only this many last characters of a completion are read: an answer stands at the end."""
END_OF_TURN = re.compile(r"<\|(?:eot_id|endoftext|im_end)\|>")

OPENING = re.compile(r"<>?\s{0,4}answer\b[ \t]{0,4}[>.]?", re.IGNORECASE)
"""``<answer>``, and how models break it: ``<Answer>``, ``<<answer>``, ``<>answer>``, ``<answer ``."""
CLOSING = re.compile(r"</\s{0,4}answer\b[ \t]{0,4}>?", re.IGNORECASE)
BOXED = re.compile(r"(?:\\f?boxed|\\fbox|(?<![A-Za-z\\])boxed|\x08oxed)\s{0,4}\{")
r"""``\boxed{``, also with its backslash lost, or read as the backspace that ``\b`` is in JSON."""
EMPTY_BOX = re.compile(BOXED.pattern + r"\s{0,4}\}")

FENCE = re.compile(r"```(?:[A-Za-z]{0,20}[ \t]{0,4}(?:\n|$))?|`")
BOLD = re.compile(r"(?<![\w)}])(?:\*\*|__)(?=[^\s*_])|(?<=[^\s*_])(?:\*\*|__)(?![\w({\\])")
"""The stars around ``**5**``, but not those of a power, ``2**3`` or ``2 ** 3``."""
DELIMITER = re.compile(r"(?<!\\)(?:\\[()\[\]]|\$+)")
r"""``$``, ``\(``, ``\[`` around formulas; not the ``\\[`` of a matrix, nor ``\$``."""
SIGNS = {
    **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-"),  # minus, hyphens, en dash
    **dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "),
    **dict.fromkeys("\u200b\u2060\ufeff", ""),
    **dict.fromkeys("\u00b7\u22c5\u2219", r"\cdot "),
    "\u00d7": r"\times ",
    "\u00f7": r"\div ",
    "\u2215": "/",
    "\u2044": "/",
    "\u00b0": r"^\circ ",
    "\u03c0": r"\pi ",
    "\u221e": r"\infty ",
    "\u2264": r"\le ",
    "\u2265": r"\ge ",
    "\u222a": r"\cup ",
    "\u00b2": "^2",
    "\u00b3": "^3",
    "\u00bc": r"\frac14",
    "\u00bd": r"\frac12",
    "\u00be": r"\frac34",
}
"""Typographic signs as ASCII or LaTeX."""
SIGN = re.compile("|".join(map(re.escape, SIGNS)))
EM_DASH = re.compile(r"\u2014(?=[\d.$\\(])")
"""A minus; followed by a blank it parts two phrases."""
CURRENCY = re.compile(r"\\?[\u20ac\u00a3\u00a5\u20b9\u20bd]")


def answer_text(completion: str) -> str:
    """What is read of a completion: up to the first end-of-turn token, and of that the last `TAIL` characters."""
    return END_OF_TURN.split(completion, maxsplit=1)[0][-TAIL:]


def answer_region(text: str) -> str | None:
    r"""Where a completion says that its answer stands; None where it says nothing.

    The ``\boxed{}`` in the last ``<answer>``, else what stands in that tag, whose end may be cut; without the tag the
    last ``\boxed{}``; without both what follows a closing ``</answer>`` that was never opened, or else the line
    before it.
    """
    tag = _last(OPENING, text)
    if tag:
        region = text[tag.end() :].partition("</")[0]
        return last_boxed(region) or EMPTY_BOX.sub("", region).strip()
    boxed = last_boxed(text)
    closing = None if boxed else _last(CLOSING, text)
    if closing:
        before = EMPTY_BOX.sub("", text[: closing.start()]).rstrip().rpartition("\n")[2]
        return text[closing.end() :].strip() or before.strip()
    return boxed


def last_boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{}``; where it is never closed, up to the end of its line or tag."""
    box = _last(BOXED, text)
    if box is None:
        return None
    region, depth = text[box.end() :], 1
    for end, character in enumerate(region):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return region[:end].strip()
    return re.split(r"[<>\n]", region, maxsplit=1)[0].strip()


def plain(text: str) -> str:
    r"""The same answer without markup.

    Without fences, backticks, bold, ``$`` around formulas, currency signs and final full stops, and with typographic
    signs as ASCII or LaTeX. What is mathematics stays as it is; so does ``\$``.
    """
    text = FENCE.sub(lambda fence: "" if fence[0] == "`" else "\n", text)
    text = EM_DASH.sub("-", BOLD.sub("", text))
    text = SIGN.sub(lambda sign: SIGNS[sign[0]], text)
    text = DELIMITER.sub(" ", CURRENCY.sub("", text))
    return text.strip().rstrip(".").strip()


def _last(pattern: re.Pattern, text: str) -> re.Match | None:
    last = None
    for last in pattern.finditer(text):  # noqa: B007 (the last one is what is wanted)
        pass
    return last
