"""Running programs in the sandbox, and seeing that nothing of them stays."""

import contextlib
import os
import shutil
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

from dllm_gym.verify import sandbox
from dllm_gym.verify.sandbox import Limits, Outcome, isolation, run_tests

QUICK = Limits(cpu_s=1, wall_s=2.0, memory_mb=256)
LINUX = sys.platform == "linux"

TRY = """
import os, sys
def outcome(action, *arguments):
    try:
        return ("done", repr(action(*arguments))[:80])
    except BaseException as error:
        return ("refused", type(error).__name__)
"""


def run(program: str, *tests: str, limits: Limits = QUICK, setup: str = "") -> Outcome:
    return run_tests([TRY + textwrap.dedent(program)], tests, ["f", "g"], setup, limits)


def refused(program: str) -> bool:
    """``f`` of the program gives the outcomes of what it tried: was everything refused?"""
    outcome = run(program, "tried = f()\nassert tried and all(what == 'refused' for what, _ in tried), tried")
    print(outcome.error)
    return outcome.passed == 1


def needs(*parts: str) -> None:
    missing = set(parts) - set(isolation())
    if missing:
        pytest.skip(f"this system does not let the sandbox limit {missing}")


def processes_of(pid: int) -> list[int]:
    """Sandbox processes that were started by a process, wherever they are now. A child that left its state too."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes().split(b"\0")
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if command[-2:-1] == [str(pid).encode()] and b"processes.main" in b" ".join(command):
                found.append(int(entry.name))
            if state == "Z" and int(parent) == pid:
                found.append(int(entry.name))
    return found


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path, monkeypatch):
    """After every test of a file that imports this: no process, no thread, no file."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    threads = set(threading.enumerate())
    yield
    assert processes_of(os.getpid()) == []
    assert list(folder.iterdir()) == []
    assert set(threading.enumerate()) <= threads  # those of earlier tests may end


def weaken(monkeypatch, tmp_path: Path) -> None:
    """A sandbox as on a system without Landlock and seccomp."""
    folder = tmp_path / "weak" / "jail"
    shutil.copytree(sandbox.FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    source = (folder / "lockdown.py").read_text()
    weak = source.replace("os.uname().machine", '"riscv64"').replace("if LINUX else -1", "if not LINUX else -1")
    assert weak.count("riscv64") == weak.count("not LINUX else") == 1
    (folder / "lockdown.py").write_text(weak)
    monkeypatch.setattr(sandbox, "FOLDER", folder)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
