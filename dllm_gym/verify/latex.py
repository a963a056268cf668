"""Are two LaTeX answers equal? Asked of ``math-verify`` in a process of its own, which is ended if it takes too long.

sympy can hang or fill the memory on a short text (``9^{9^{9^9}}``), in C code that no thread or signal can stop.
math-verify's own limits are signals, which work in a main thread only.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from itertools import accumulate

LONGEST = 500
"""Longer answers, in characters, are not read."""
DEEPEST = 10
"""Answers with deeper brackets are not read: the parser takes seconds for ``((((((((((((1))))))))))))``."""
CPU_SECONDS = 5
"""Of the comparison, so that a verdict does not depend on what else the machine does."""
WALL_SECONDS = 120.0
"""Of the comparison or the start of its process, for what uses no CPU time."""
MEMORY = 4 << 30
"""Bytes of address space."""

NUMBER_CODE = re.compile(r"(Integer \([0-9]+ \)|Float \('[0-9.]+' \))\s*")
"""What sympify makes of a number: the only code that is ever evaluated."""


class Comparer:
    """The process that compares: started when it is first asked, started anew after it was ended."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def equal(self, expected: str, answer: str) -> bool:
        """Whether math-verify calls them equal; False where it reaches a limit. From any thread.

        Raises:
            RuntimeError: the process cannot be started.
        """
        if not (readable(expected) and readable(answer)):
            return False
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self.close()
                self._start()
            reply = ""
            try:
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.write(json.dumps([expected, answer]) + "\n")
                    self._process.stdin.flush()
                reply = self._read()
            finally:
                if not reply:  # it was ended, or this was interrupted: a late reply would count for the next question
                    self.close()
            return reply == "true\n"

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        code = "import sys; sys.path[:] = sys.argv[1:]; from dllm_gym.verify.latex import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is for the trainer, which may verify once more before it stops
        )
        if self._read() != "ready\n":
            self.close()
            raise RuntimeError(
                "the process that compares mathematical answers did not start: is math-verify installed?"
            )

    def _read(self) -> str:
        """A line of the process, "" where it was ended."""
        timer = threading.Timer(WALL_SECONDS, self._process.kill)
        timer.start()
        try:
            return self._process.stdout.readline()
        finally:
            timer.cancel()


def readable(text: str) -> bool:
    """Whether a text is short and flat enough to be parsed in a moment."""
    depths = accumulate((c in "([{") - (c in ")]}") for c in text)
    return len(text) <= LONGEST and max(depths, default=0) <= DEEPEST


def serve() -> None:
    """What the process does: a line of JSON in, "true" or "false" out, until its input ends."""
    import logging
    import resource

    from math_verify import LatexExtractionConfig, parse, verify
    from sympy.parsing import sympy_parser

    evaluate = sympy_parser.eval_expr

    def evaluate_number(code: str, *scopes: dict):
        if NUMBER_CODE.fullmatch(code) is None:
            raise ValueError("not a number")
        return evaluate(code, *scopes)

    # LaTeX is read by a grammar, but numbers go on to sympify, which is Python's eval: let it see nothing else.
    sympy_parser.eval_expr = evaluate_number
    logging.disable()
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    replies, sys.stdout = sys.stdout, sys.stderr
    _, longest = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # not on every system
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + CPU_SECONDS + 1
        if longest == resource.RLIM_INFINITY or limit < longest:
            resource.setrlimit(resource.RLIMIT_CPU, (limit, longest))  # the system ends the process there
        try:
            expected, answer = (parse(f"\\boxed{{{text}}}", config, parsing_timeout=None) for text in json.loads(line))
            equal = verify(expected, answer, timeout_seconds=None)
        except Exception:  # also MemoryError and RecursionError
            equal = False
        print(json.dumps(bool(equal)), file=replies, flush=True)


_comparer = Comparer()
atexit.register(lambda: _comparer.close())


def equal(expected: str, answer: str) -> bool:
    """`Comparer.equal` of this process's comparer."""
    return _comparer.equal(expected, answer)


def _forget() -> None:
    """A forked process starts its own comparer: two of them would read each other's replies."""
    global _comparer
    _comparer = Comparer()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
