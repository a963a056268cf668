"""A sandbox for programs that a model wrote: `run_tests`. What it keeps out, and what not: docs/code-tasks.md."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent / "jail"
START = "import sys; sys.path.insert(0, sys.argv[1]); import processes; processes.main()"
FULL_ISOLATION = ("memory", "files", "processes", "syscalls")
ENDED = "the sandbox was ended"
PATIENCE_S = 20
"""How much longer than its wall-clock limit a sandbox may take to start and to end, on a busy machine."""


@dataclass(frozen=True)
class Limits:
    """What a program may use. The tests run under the same limits, in a process of their own."""

    cpu_s: int = 5
    """Whole CPU seconds: what ends an endless loop, however busy the machine is."""
    wall_s: float = 15.0
    """Seconds on the clock for all tests: what ends a program that waits."""
    memory_mb: int = 512
    """Address space in MiB."""

    def __post_init__(self):
        for name in ("cpu_s", "wall_s", "memory_mb"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be above 0.")


@dataclass(frozen=True)
class Outcome:
    """What came of the tests of one program."""

    passed: int
    """How many tests passed."""
    total: int
    """How many there were."""
    error: str | None
    """Why the first one failed, in one line; partly written by the program, so for reading only."""
    undecided: str | None
    """None, or why there is no verdict: something outside ended the sandbox, twice."""
    isolation: tuple[str, ...]
    """Those of `FULL_ISOLATION` that held; none where the tests did not come to an end, since none was reported."""


def run_tests(
    programs: Sequence[str],
    tests: Sequence[str],
    names: Sequence[str],
    setup: str = "",
    limits: Limits | None = None,
    helpers: Sequence[str] = (),
) -> Outcome:
    """Run a program that nobody has read, in processes that can do nothing but compute, and test it.

    Args:
        programs: source texts, of which the first that compiles and defines one of the names is run; the first that
            compiles where none does. Names that stand alone (``Explanation``, ``[DONE]``) are left out of it.
        tests: source texts; one that raises nothing has passed. They never enter the program's process.
        names: the functions that the tests take from the program. Arguments and results are handed over by value:
            None, bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, range, iterators and
            built-in types; of anything else only the truth value arrives.
        setup: source text that runs before the tests, beside them.
        limits: None for `Limits()`.
        helpers: source texts, of which imports, functions, classes and constants that do not fail stand before the
            program.

    Returns:
        The outcome. A program that hangs, crashes, leaves or goes over a limit fails the tests that it did not answer.
        Where something else ended the sandbox, it is run once more.

    Raises:
        RuntimeError: no sandbox can be started on this system, with the reason.
    """
    limits = limits or Limits()
    if sys.platform == "win32":
        raise RuntimeError(f"the sandbox needs Linux or macOS, and this is {sys.platform}: run code tasks there.")
    job = {"programs": list(programs), "tests": list(tests), "names": list(names), "setup": setup}
    job |= {"helpers": list(helpers)}
    for _ in range(2):
        code, output, errors = _run(json.dumps(job).encode(), limits)
        if code > 0:
            raise RuntimeError(_cannot_start(errors.decode(errors="replace").strip().rpartition("\n")[2]))
        try:
            outcome = json.loads(output)
        except json.JSONDecodeError:
            outcome = {"passed": 0, "error": "the tests did not come to an end", "isolation": ()}
        if code == 0:
            break
    ended = ENDED if code < 0 else None
    return Outcome(outcome["passed"], len(tests), outcome["error"], ended, tuple(outcome["isolation"]))


def _run(job: bytes, limits: Limits) -> tuple[int, bytes, bytes]:
    """Exit code, output and errors of a sandbox; the code is that of a signal where it had to be ended."""
    settings = json.dumps([limits.cpu_s, limits.memory_mb, limits.wall_s])
    command = [sys.executable, "-I", "-S", "-c", START, str(FOLDER), settings, str(os.getpid())]
    # Some builds of Python do not start without it; it is gone before the program runs.
    environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    with tempfile.TemporaryDirectory(prefix="dllm-sandbox-") as folder:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise RuntimeError(_cannot_start(str(error))) from error
        try:
            output, errors = process.communicate(job, timeout=limits.wall_s + PATIENCE_S)
        except subprocess.TimeoutExpired:
            output, errors = b"", b""
        finally:
            _end(process)
    return process.returncode, output, errors


@lru_cache(maxsize=1)
def isolation() -> tuple[str, ...]:
    """Which of `FULL_ISOLATION` this system gives; see docs/code-tasks.md for what is missing without each."""
    return run_tests([""], [], []).isolation


def _cannot_start(reason: str) -> str:
    return (
        f"the sandbox could not be started with {sys.executable!r} ({reason or 'it gave no reason'}): "
        f"it must be a Python that runs with -I -S and may fork."
    )


def _end(process: subprocess.Popen) -> None:
    """Nothing of the process stays, whatever made us stop waiting for it. Its children end with it."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        with contextlib.suppress(OSError):
            pipe.close()
