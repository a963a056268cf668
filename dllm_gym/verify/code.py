"""Verifier of Python functions: which code a completion holds, and whether it passes its tests in the sandbox."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

from dllm_gym.types import Verdict
from dllm_gym.verify.markup import answer_text
from dllm_gym.verify.sandbox import Limits, run_tests

OPENING = re.compile(r"(?<![`~])(`{3,8}|~{3,8})[ \t]{0,4}[\w+.-]{0,20}[ \t]{0,4}\r?\n")
"""A fence that opens a block."""
MOST_ENDS = 4
"""Fences that may close a block, the others standing in its docstrings."""
STATEMENT = re.compile(r"(?:async +)?def +\w|class +\w|import +\w|from +[\w.]+ +import|@\w")
"""How code at the left margin starts, and prose does not."""
ASSIGNMENT = r"\w+ *(?:: *[\w.]+(?:\[[\w.\[\], |]*\])? *)?=(?!=)"
CODE_LINE = re.compile(rf"{STATEMENT.pattern}|\s|$|#|[)\]}}]|{ASSIGNMENT}")


@dataclass(frozen=True)
class Checks:
    """What a program must do."""

    names: tuple[str, ...]
    """The functions that the tests take from it."""
    tests: tuple[str, ...]
    """Source texts; one that raises nothing has passed."""
    setup: str = ""
    """Source text that runs before the tests; the program does not see it."""
    prompt: str = ""
    """Source text that the program continues, or defines anew."""

    def __post_init__(self):
        for field in ("names", "tests"):
            if not getattr(self, field):
                raise ValueError(f"{field}=(): must hold at least one, else every program would be right.")


def verify_code(completion: str, checks: Checks, limits: Limits | None = None) -> Verdict:
    """Does the code in a completion pass its tests? It is run, in the sandbox; nothing of it is run here.

    Args:
        completion: any text; see `read_code` for what is read of it.
        checks: the tests.
        limits: of the sandbox.

    Returns:
        A verdict that is correct if every test passes, with the share of them as the score, and the code as the answer.

    Raises:
        RuntimeError: the sandbox cannot be started on this system.
    """
    code = read_code(completion, checks.names, checks.prompt)
    if not code.programs:
        return Verdict(False, 0.0, None)
    outcome = run_tests(code.programs, checks.tests, checks.names, checks.setup, limits, code.helpers)
    share = outcome.passed / outcome.total
    return Verdict(outcome.passed == outcome.total, share, code.programs[0], outcome.undecided)


@dataclass(frozen=True)
class Code:
    """What is read of a completion."""

    programs: list[str]
    """What may be meant, most likely first: the first that compiles and defines a name that is asked for."""
    helpers: list[str]
    """Other blocks, of which imports, functions, classes and constants count."""


def read_code(completion: str, names: tuple[str, ...], prompt: str = "") -> Code:
    r"""The code of a completion. Nothing is compiled here; what compiles is found out in the sandbox.

    Read is the last fenced block (its closing fence may be cut) that defines one of the names, by ``def``, ``class`` or
    an assignment, else the first block, else the whole text, with and without what is no code around it. What defines
    none of the names is taken for the body of the function at the end of the prompt, also where the indentation of its
    first line or of all is missing. The other blocks are helpers.
    """
    text = answer_text(completion)
    name = rf"(?:{'|'.join(map(re.escape, names))})\b"
    definition = re.compile(rf"^[ \t]*(?:async +def|def|class) +{name}", re.MULTILINE)
    assignment = re.compile(rf"^{name} *(?::[^=\n]+)?=(?!=)", re.MULTILINE)
    blocks = read_blocks(text)
    before = re.split("```|~~~", text, maxsplit=1)[0]
    if blocks and (definition.search(before) or _indented(before)):  # the prompt has opened the first block
        blocks.insert(0, [before, text, _without_prose(text, assignment)])
    defining = [block for block in blocks if definition.search(block[0]) or assignment.search(block[0])]
    chosen = (defining[-1:] or blocks[:1] or [[text, _without_prose(text, assignment)]])[0]
    programs = []
    for code in filter(str.strip, chosen):
        if definition.search(code) or assignment.search(code):
            programs.append(f"{prompt}\n{textwrap.dedent(code)}")
        elif not prompt or _indented(code):
            programs.append(f"{prompt}\n{code}")
        if prompt and not _indented(code) and not definition.search(code):  # a body, whose variable may have the name
            body = code.strip()
            programs += [f"{prompt}\n    {body}", f"{prompt}\n{textwrap.indent(body, '    ')}"]
    return Code(programs, [textwrap.dedent(block[0]) for block in blocks if block is not chosen])


def read_blocks(text: str) -> list[list[str]]:
    """The fenced blocks of a text: of each, what it is if it ends at its first closing fence, at its second, ...

    A fence closes if it stands at the beginning of a line, no deeper than the opening one and a little; where there is
    none, wherever it stands, or else the text's end does.
    """
    blocks, position = [], 0
    while opening := OPENING.search(text, position):
        start, fence = opening.end(), opening[1]
        line = text[text.rfind("\n", 0, opening.start()) + 1 : opening.start()]
        indent = len(line) - len(line.lstrip(" \t"))
        closings = re.compile(rf"^[ \t]{{0,{indent + 3}}}{fence}", re.MULTILINE).finditer(text, start)
        ends = [closing.start() for closing, _ in zip(closings, range(MOST_ENDS), strict=False)]
        if not ends:
            anywhere = text.find(fence, start)
            ends = [len(text) if anywhere < 0 else anywhere]
        blocks.append([text[start:end] for end in ends])
        position = ends[0] + len(fence)
    return blocks


def _indented(code: str) -> bool:
    return code.strip() != "" and code.lstrip("\r\n")[0] in " \t"


def _without_prose(text: str, assignment: re.Pattern) -> str:
    """From the first line that must be code, or the start of a body, up to the first that is not."""
    lines = text.split("\n")
    if not _indented(text):
        start = next((i for i, line in enumerate(lines) if STATEMENT.match(line) or assignment.match(line)), 0)
        lines = lines[start:]
    end = next((i for i, line in enumerate(lines) if i and not CODE_LINE.match(line)), len(lines))
    return "\n".join(lines[:end])
