"""Are two LaTeX answers equal? Asked of `dllm_gym.verify.equality` in a process of its own, which has limits.

sympy can hang or fill the memory on a short text (``9^{9^{9^9}}``), in C code that no thread or signal can stop.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from itertools import accumulate

from dllm_gym.extras import needs

LONGEST = 500
"""Longer answers, in characters, are not compared."""
DEEPEST = 10
"""Answers with deeper brackets are not compared: the parser takes seconds for ``((((((((((((1))))))))))))``."""
CPU_SECONDS = 5
"""Of the comparison, so that a verdict does not depend on what else the machine does."""
WALL_SECONDS = 120.0
"""Of the comparison or the start of its process, for what uses no CPU time."""
MEMORY = 4 << 30
"""Bytes of address space."""
TIMED_OUT, NOT_COMPARED = "timed out", "not compared"
"""Why two answers were found neither equal nor unequal."""

NUMBER_CODE = re.compile(r"(Integer \([0-9]+ \)|Float \('[0-9.]+' \))\s*")
"""What sympify makes of a number: the only code that is ever evaluated."""


class Undecided(Exception):
    """Two answers were found neither equal nor unequal; the message says why."""


class Refused(BaseException):
    """Code that is no number was about to be evaluated. No `Exception`, which sympy would take for a no."""


class Comparer:
    """The process that compares: started when it is first asked, started anew after it was ended."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def equal(self, expected: str, answer: str, question: str = "") -> bool:
        """`dllm_gym.verify.equality.equal`. From any thread.

        What cannot be compared is asked once more of a fresh process, so that no verdict depends on those before it.

        Raises:
            Undecided: it reached a limit or its library failed.
            RuntimeError: the process cannot be started.
        """
        if not (readable(expected) and readable(answer)):
            raise Undecided(NOT_COMPARED)
        with self._lock:
            fresh = self._process is None or self._process.poll() is not None
            reply = self._ask(expected, answer, question)
            if isinstance(reply, str) and reply != TIMED_OUT and not fresh:
                self.close()
                reply = self._ask(expected, answer, question)
        if isinstance(reply, str):
            raise Undecided(reply)
        return reply

    def _ask(self, *question: str) -> bool | str:
        """Whether they are equal, or why that is not known."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._start()
        reply = ""
        try:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(question) + "\n")
                self._process.stdin.flush()
            reply = self._read()
        finally:
            if not reply:  # it was ended, or this was interrupted: a late reply would count for the next question
                ended = self.close()
        if reply:
            return json.loads(reply)
        return TIMED_OUT if self._late or ended == -signal.SIGXCPU else NOT_COMPARED

    def close(self) -> int | None:
        """End the process. Returns what it returned, None where there was none."""
        if self._process is None:
            return None
        process, self._process = self._process, None
        process.kill()
        process.communicate()
        return process.returncode

    def _start(self) -> None:
        with needs("math"):
            import math_verify  # noqa: F401  (the process uses it)
        code = "import sys; sys.path[:] = sys.argv[1:]; from dllm_gym.verify.latex import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONHASHSEED": "0"},  # sympy's order of terms, and so its luck, follows from hashes
            text=True,
            start_new_session=True,  # Ctrl-C is for the trainer, which may verify once more before it stops
        )
        if self._read() != '"ready"\n':
            self.close()
            raise RuntimeError(
                "the process that compares mathematical answers did not start: is math-verify installed?"
            )

    def _read(self) -> str:
        """A line of the process, "" where it was ended."""
        self._late = False
        timer = threading.Timer(WALL_SECONDS, self._end_late, [self._process])
        timer.start()
        try:
            return self._process.stdout.readline()
        finally:
            timer.cancel()

    def _end_late(self, process: subprocess.Popen) -> None:
        self._late = True
        process.kill()


def readable(text: str) -> bool:
    """Whether a text is short and flat enough to be parsed in a moment."""
    depths = accumulate((c in "([{") - (c in ")]}") for c in text)
    return len(text) <= LONGEST and max(depths, default=0) <= DEEPEST


def serve() -> None:
    """What the process does: a line of JSON in, "true", "false" or a reason out, until its input ends."""
    import logging
    import resource

    from sympy.core.cache import clear_cache
    from sympy.parsing import sympy_parser

    from dllm_gym.verify import equality

    evaluate = sympy_parser.eval_expr

    def evaluate_number(code: str, *scopes: dict):
        if NUMBER_CODE.fullmatch(code) is None:
            raise Refused
        return evaluate(code, *scopes)

    # LaTeX is read by a grammar, but numbers go on to sympify, which is Python's eval: let it see nothing else.
    sympy_parser.eval_expr = evaluate_number
    logging.disable()
    replies, sys.stdout = sys.stdout, sys.stderr
    _, longest = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # not on every system
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print('"ready"', file=replies, flush=True)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + CPU_SECONDS + 1
        if longest == resource.RLIM_INFINITY or limit < longest:
            resource.setrlimit(resource.RLIMIT_CPU, (limit, longest))  # the system ends the process there
        clear_cache()  # a tired process compares as a fresh one does
        try:
            reply = equality.equal(*json.loads(line))
        except (Exception, Refused):  # of sympy, which raises all there is, or for want of memory
            reply = NOT_COMPARED
        print(json.dumps(reply), file=replies, flush=True)


_comparer = Comparer()
atexit.register(lambda: _comparer.close())


def equal(expected: str, answer: str, question: str = "") -> bool:
    """`Comparer.equal` of this process's comparer."""
    return _comparer.equal(expected, answer, question)


def _forget() -> None:
    """A forked process starts its own comparer: two of them would read each other's replies."""
    global _comparer
    _comparer = Comparer()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
