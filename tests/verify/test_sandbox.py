"""The sandbox: what it is for, what it limits, and what it does on a system that gives less."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sandboxed import LINUX, needs, nothing_stays, processes_of, run, wait_for, weaken  # noqa: F401

from dllm_gym.verify.code import Checks, verify_code
from dllm_gym.verify.sandbox import FULL_ISOLATION, Limits, isolation, run_tests

# What it is for


def test_tests_are_counted():
    outcome = run("def f(x): return x + 1", "assert f(1) == 2", "assert f(1) == 3, 'three'", "assert f(2) == 3")
    assert (outcome.passed, outcome.total, outcome.error) == (2, 3, "AssertionError: three")


def test_setup_stands_beside_the_tests_and_the_program_beside_neither():
    program = "def f(): return outcome(lambda: known), 'known' in globals()"
    setup = "known = 1\ndef f(): return 'the setup'"
    assert run(program, "assert known == 1", "assert f() == (('refused', 'NameError'), False)", setup=setup).passed == 2


def test_the_first_program_that_compiles_is_run():
    programs = ["def f(:", "\0", "\ud800", "def f(): return 4", "def f(): return 5"]
    assert run_tests(programs, ["assert f() == 4"], ["f"]).passed == 1
    assert "SyntaxError" in run_tests(["def f(:"], ["assert f() == 4"], ["f"]).error


def test_of_programs_that_compile_the_one_that_defines_the_name_is_run():
    programs = ["def g(): return 3", "(" * 9_000, "def f(): return 4", "def f(): return 5"]
    assert run_tests(programs, ["assert f() == 4"], ["f"]).passed == 1
    assert run_tests(["Explanation\n[DONE, THIS]\ndef f(): return 4\nf"], ["assert f() == 4"], ["f"]).passed == 1
    for program in ("f = lambda: 4", "import math\nif math: f = lambda: 4", "from math import sqrt as f\nf = [f][0]"):
        assert run_tests(["pass", program], ["assert f"], ["f"]).passed == 1


def test_helpers_stand_before_the_program_and_may_fail():
    helpers = [
        "from nowhere import x",
        "((",
        "def f(): return 5\nONE = 1\nTWO = print(3)\ndef g(): return ONE",
        "raise SystemExit",
    ]
    program = "def f():\n    return 3 + g()\n"
    assert run_tests([program], ["assert f() == 4"], ["f"], helpers=helpers).passed == 1
    assert "TWO" in run_tests(["def f(): return TWO"], ["f()"], ["f"], helpers=helpers).error


def test_a_sandbox_that_something_else_ends_is_undecided(monkeypatch):
    """It is started once more; a program that ends itself is just wrong."""
    started, popen = [], subprocess.Popen

    def killed(*arguments, **options):
        started.append(popen(*arguments, **options))
        if len(started) <= kills:
            started[-1].kill()
        return started[-1]

    monkeypatch.setattr("dllm_gym.verify.sandbox.subprocess.Popen", killed)
    for kills, undecided in ((0, None), (1, None), (2, "the sandbox was ended")):
        started.clear()
        outcome = run_tests(["def f(): return 4"], ["assert f() == 4"], ["f"])
        assert (outcome.passed, outcome.undecided, len(started)) == (undecided is None, undecided, min(kills, 1) + 1)
        started.clear()
        verdict = verify_code("def f(): return 4", Checks(("f",), ("assert f() == 4",)))
        assert (verdict.correct, verdict.score, verdict.undecided) == (undecided is None, undecided is None, undecided)
    kills = 0
    assert run_tests(["import os\nos._exit(0)"], ["f()"], ["f"]).undecided is None


VALUES = [
    "None",
    "True",
    "0",
    "-7",
    "10 ** 5000",
    "-(2 ** 64)",
    "0.1",
    "float('inf')",
    "1j",
    "'\\0\\ud800 é \\n'",
    "b'\\0\\xff'",
    "[]",
    "[1, [2, (3,)]]",
    "(1, 2.0, 'a')",
    "{}",
    "{(1, 2): [3], None: {4}, 'int': 5}",
    "{1, 'a', (2,)}",
    "frozenset({1})",
    "range(1, 9, 2)",
    "int",
]


@pytest.mark.parametrize("value", VALUES)
def test_values_arrive_as_they_were(value):
    """Both ways: the program compares what it was given, the test what it got."""
    program = f"def f(x): return x == {value} and type(x) is type({value})\ndef g(): return {value}"
    same = f"assert g() == {value} and type(g()) is type({value})"
    assert run(program, f"assert f({value}) is True", f"assert f(x={value})", same).passed == 3


def test_other_values():
    program = (
        "import re\ndef f(kind): return {'nan': float('nan'), 'map': map(abs, [-1]), 're': re.match('a', 'a')}[kind]"
    )
    tests = ["assert f('nan') != f('nan')", "assert list(f('map')) == [1]", "assert f('re') and f('re') != f('re')"]
    assert run(program, *tests).passed == 3
    program = "import collections\ndef f(): return collections.Counter('aab')"
    assert run(program, "assert f() == {'a': 2, 'b': 1}").passed == 1


def test_what_the_system_gives_is_what_the_kernel_has():
    assert set(isolation()) <= set(FULL_ISOLATION)
    if LINUX and os.uname().machine in ("x86_64", "aarch64"):
        landlock = ctypes.CDLL(None).syscall(444, None, 0, 1) >= 1
        assert set(FULL_ISOLATION) - set(isolation()) == (set() if landlock else {"files"})


# Time, memory and output


def test_an_endless_loop_is_ended_and_what_passed_before_counts():
    program = "def f(x):\n    while x: pass\n    return 1"
    outcome = run(program, "assert f(0) == 1", "assert f(1) == 1", "assert f(0) == 1", limits=Limits(1, 20.0))
    assert outcome.passed == 1 and "a limit" in outcome.error


@pytest.mark.parametrize("where", ["{}", "def f():\n    {}"])
def test_waiting_is_ended_by_the_clock(where):
    start = time.monotonic()
    outcome = run(where.format("import time; time.sleep(600)"), "assert f() == 1", limits=Limits(20, 1.0))
    assert outcome.passed == 0 and "wall-clock" in outcome.error
    assert time.monotonic() - start < 15


def test_a_test_that_hangs_is_ended():
    """As when a program returns something that makes the comparison endless."""
    start = time.monotonic()
    outcome = run("def f(): return 1", "while f(): time.sleep(60)", setup="import time", limits=Limits(20, 0.5))
    assert outcome.passed == 0 and "did not come to an end" in outcome.error
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("bomb", ["bytearray(1 << 34)", "[0] * (1 << 31)", "'x' * (1 << 33)"])
def test_memory_is_limited(bomb):
    needs("memory")
    assert run(f"def f(): return outcome(lambda: len({bomb}))", "assert f() == ('refused', 'MemoryError')").passed == 1


def test_memory_that_grows_ends_the_program():
    needs("memory")
    program = """
        import resource
        def f():
            kept = []
            try:
                while len(kept) < 1024:
                    kept.append(bytearray(1 << 20))
            except MemoryError:
                pass
            return len(kept)
    """
    assert run(program, "assert 50 < f() < 256").passed == 1


@pytest.mark.parametrize(
    "flood",
    [
        "while True: print('x' * 100_000)",
        "while True: print('x' * 100_000, file=sys.stderr)",
        "while True: [outcome(os.write, descriptor, b'x' * 100_000) for descriptor in range(64)]",
        "while True: [outcome(os.write, descriptor, b'{}\\n' * 100_000) for descriptor in range(64)]",
        "return 'x' * 100_000_000",
        "raise ValueError('x' * 1_000_000)",
        "return [[]] * 10_000_000",
    ],
)
def test_output_fills_nothing(flood):
    outcome = run(f"def f():\n    {flood}", "assert f() == 'x'")
    assert outcome.passed == 0 and len(outcome.error) < 1000


def test_a_value_may_be_long_but_not_too_long():
    outcome = run("def f(n): return 'x' * n", "assert len(f(10 ** 6)) == 10 ** 6", "f(5 * 10 ** 6)")
    assert outcome.passed == 1 and "longer than" in outcome.error


def test_deep_and_cyclic_values_are_no_harm():
    program = """
        def f(depth):
            value = []
            for _ in range(depth):
                value = [value]
            return value
        def g():
            value = []
            value.append(value)
            return value
    """
    assert run(program, "assert f(100_000) == []", "assert g() == []", "assert f(1) == [[]]").passed == 1


# The caller


def test_ending_the_caller_ends_everything(tmp_path):
    if not LINUX:
        pytest.skip("other systems cannot tie a process to its parent")
    code = (
        "from dllm_gym.verify.sandbox import *; "
        "run_tests(['import time\\ntime.sleep(60)'], ['f()'], ['f'], limits=Limits(60, 60.0))"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # a caller that is killed leaves its empty folder
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=environment)
    try:
        wait_for(lambda: len(processes_of(caller.pid)) == 3)
    finally:
        caller.kill()
    wait_for(lambda: [pid for pid in processes_of(caller.pid) if pid != caller.pid] == [])
    caller.wait()


def test_many_at_once():
    def one(number: int) -> int:
        loop = "while True: pass" if number % 4 == 0 else f"return {number}"
        return run(f"def f(): {loop}", f"assert f() == {number}", limits=Limits(1, 30.0)).passed

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(16))) == [int(number % 4 > 0) for number in range(16)]


# Systems that give less, and none


def test_a_weaker_system_says_so_and_keeps_the_limits(tmp_path, monkeypatch):
    weaken(monkeypatch, tmp_path)
    outcome = run("def f(x): return x + 1", "assert f(1) == 2")
    expected = {"memory"} if os.geteuid() == 0 else {"memory", "processes"}
    assert outcome.passed == 1 and set(outcome.isolation) == expected & set(isolation())
    assert run("def f():\n    while True: pass", "f()").passed == 0
    program = "import time\ndef f():\n    outcome(os.fork)\n    time.sleep(60)"
    assert run(program, "f()", limits=Limits(1, 0.5)).passed == 0


def test_a_python_that_does_not_start_is_an_error(monkeypatch):
    for executable in ("/bin/false", "/nowhere/python"):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(RuntimeError, match=rf"could not be started with '{executable}' \(.*must be a Python"):
            run("def f(): pass", "f()")


def test_a_caller_that_is_interrupted_leaves_nothing(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(KeyboardInterrupt):
            run("import time\ntime.sleep(60)", "f()", limits=Limits(60, 60.0))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    wait_for(lambda: processes_of(os.getpid()) == [])


@pytest.mark.parametrize("name", ["cpu_s", "wall_s", "memory_mb"])
def test_limits_are_checked(name):
    with pytest.raises(ValueError, match=f"{name}=0: must be above 0"):
        Limits(**{name: 0})
