"""Verifier of Python functions: which code a completion holds, and whether it passes its tests in the sandbox."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

from dllm_gym.types import Verdict
from dllm_gym.verify.markup import answer_text
from dllm_gym.verify.sandbox import Limits, run_tests

FENCE = re.compile(r"```[ \t]{0,4}[\w+.-]{0,20}[ \t]{0,4}\r?\n(.*?)(?:```|\Z)", re.DOTALL)
STATEMENT = re.compile(r"(?:async +)?def +\w|class +\w|import +\w|from +[\w.]+ +import|@\w")
"""How code at the left margin starts, and prose does not."""
CODE_LINE = re.compile(rf"{STATEMENT.pattern}|\s|$|#|[)\]}}]|\w+ *(?::[^=]+)?=")


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
    programs = read_code(completion, checks.names, checks.prompt)
    if not programs:
        return Verdict(False, 0.0, None)
    outcome = run_tests(programs, checks.tests, checks.names, checks.setup, limits)
    return Verdict(outcome.passed == outcome.total, outcome.passed / outcome.total, programs[0])


def read_code(completion: str, names: tuple[str, ...], prompt: str = "") -> list[str]:
    """The programs that a completion may mean, most likely first; the first that compiles is meant.

    Read is the last fenced block (its closing fence may be cut) that defines one of the names, else the first block,
    else the whole text, with and without what is no code around it. What defines none of the names is taken for the
    body of the function at the end of the prompt, also where the indentation of its first line or of all is missing.
    """
    text = answer_text(completion)
    definition = re.compile(rf"^[ \t]*(?:async +def|def|class) +(?:{'|'.join(map(re.escape, names))})\b", re.MULTILINE)
    blocks = FENCE.findall(text)
    before = text.partition("```")[0]
    if blocks and (definition.search(before) or _indented(before)):  # the prompt has opened the first block
        blocks.insert(0, before)
    defining = [block for block in blocks if definition.search(block)]
    codes = defining[-1:] or blocks[:1] or [text, _without_prose(text)]
    programs = []
    for code in codes:
        if definition.search(code):
            programs.append(f"{prompt}\n{textwrap.dedent(code)}")
        elif code.strip() and (not prompt or _indented(code)):
            programs.append(f"{prompt}\n{code}")
        elif code.strip():
            body = code.strip()
            programs += [f"{prompt}\n    {body}", f"{prompt}\n{textwrap.indent(body, '    ')}"]
    return programs


def _indented(code: str) -> bool:
    return code.strip() != "" and code.lstrip("\r\n")[0] in " \t"


def _without_prose(text: str) -> str:
    """From the first line that must be code, or the start of a body, up to the first that is not."""
    lines = text.split("\n")
    if not _indented(text):
        start = next((i for i, line in enumerate(lines) if STATEMENT.match(line)), 0)
        lines = lines[start:]
    end = next((i for i, line in enumerate(lines) if i and not CODE_LINE.match(line)), len(lines))
    return "\n".join(lines[:end])
