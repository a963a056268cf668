"""Programs that attack: nothing escapes, and no success is faked."""

import os

import pytest
from sandboxed import needs, nothing_stays, refused, run, weaken  # noqa: F401

# Processes


@pytest.mark.parametrize(
    "start",
    [
        "os.fork()",
        "os.forkpty()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.execv('/bin/true', ['true'])",
        "__import__('subprocess').run(['true'])",
        "__import__('_thread').start_new_thread(print, ())",
        "os.setsid()",
    ],
)
def test_no_process_or_thread_starts(start):
    needs("syscalls")
    assert refused(f"def f(): return [outcome(lambda: {start})]")


def test_a_fork_bomb_has_no_second_process():
    """Bounded, so that it does no harm where the sandbox is broken: 2 ** 7 processes that leave their session."""
    needs("processes")
    program = """
        import time
        def f():
            forks = 0
            for _ in range(7):
                try:
                    if os.fork() == 0:
                        os.setsid()
                    forks += 1
                except OSError:
                    pass
            if forks:
                time.sleep(8)
            return forks
    """
    assert run(program, "assert f() == 0").passed == 1


def test_nobody_outside_gets_a_signal():
    """SIGCONT does nothing to a running process, so a broken sandbox does no harm here."""
    needs("syscalls")
    assert refused(f"""
        import signal
        def f():
            targets = [{os.getpid()}, os.getppid(), 0, os.getpid()]
            return [outcome(os.kill, target, signal.SIGCONT) for target in targets] + [
                outcome(os.killpg, {os.getpgid(0)}, signal.SIGCONT)
            ]
    """)


# Files, secrets and the network


def test_no_file_is_changed(tmp_path):
    needs("syscalls")
    (tmp_path / "file").write_text("mine")
    mode = (tmp_path / "file").stat()
    assert refused(f"""
        def f():
            file, other = {str(tmp_path / "file")!r}, {str(tmp_path / "other")!r}
            return [
                *(outcome(open, path, mode) for path in (file, other, "here") for mode in ("w", "a", "r+", "x")),
                outcome(os.open, file, os.O_RDONLY | os.O_TRUNC),
                outcome(os.open, file, os.O_RDONLY | os.O_CREAT),
                outcome(os.open, {str(tmp_path)!r}, os.O_RDWR | os.O_TMPFILE),
                outcome(os.truncate, file, 0),
                outcome(os.remove, file),
                outcome(os.rename, file, other),
                outcome(os.link, file, other),
                outcome(os.symlink, file, other),
                outcome(os.mkdir, other),
                outcome(os.mkfifo, other),
                outcome(os.chmod, file, 0),
                outcome(os.chown, file, 1, 1),
                outcome(os.utime, file, (1, 1)),
                outcome(os.setxattr, file, "user.x", b"x"),
                outcome(os.memfd_create, "memory"),
            ]
    """)
    assert [path.name for path in tmp_path.iterdir() if path.name != "temporary"] == ["file"]
    after = (tmp_path / "file").stat()
    assert (tmp_path / "file").read_text() == "mine"
    assert (mode.st_mode, mode.st_uid, mode.st_mtime) == (after.st_mode, after.st_uid, after.st_mtime)


def test_no_byte_goes_into_a_file_even_without_the_system_call_filter(tmp_path, monkeypatch):
    """The file-size limit, which every system has."""
    weaken(monkeypatch, tmp_path)
    program = f"def f():\n    with open({str(tmp_path / 'file')!r}, 'w') as file: file.write('x')"
    assert run(program, "f()").passed == 0
    assert not (tmp_path / "file").exists() or (tmp_path / "file").read_text() == ""


def test_no_file_is_read_but_the_library(tmp_path, monkeypatch):
    needs("files")
    monkeypatch.setenv("SECRET", "swordfish")
    (tmp_path / "file").write_text("swordfish")
    assert refused(f"""
        def f():
            paths = [
                {str(tmp_path / "file")!r}, {__file__!r}, "/etc/passwd", "/dev/mem", "/proc/self/mem",
                "/proc/self/maps", "/proc/self/environ", "/proc/{os.getpid()}/environ", "/proc/{os.getpid()}/cmdline",
                f"/proc/{{os.getppid()}}/environ", f"/proc/{{os.getppid()}}/mem",
            ]
            folders = [{str(tmp_path)!r}, "/", "/proc", os.path.expanduser("~"), "/tmp"]
            return [outcome(open, path) for path in paths] + [outcome(os.listdir, path) for path in folders]
    """)
    program = (
        "import heapq, fractions, zoneinfo, ctypes, statistics, datetime\ndef f(): return fractions.Fraction(1, 2) > 0"
    )
    assert run(program, "assert f() is True").passed == 1


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET", "swordfish")
    assert run("def f(): return [*os.environ.items()], sys.stdin.read()", "assert f() == ([], '')").passed == 1


def test_no_socket_and_no_other_way_into_the_kernel():
    needs("syscalls")
    assert refused("""
        import ctypes, fcntl, resource, socket
        libc = ctypes.CDLL(None, use_errno=True)
        def call(*arguments):
            if libc.syscall(*arguments) == -1:
                raise OSError(ctypes.get_errno(), "refused")
        X86 = os.uname().machine == "x86_64"
        def f():
            families = [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK]
            return [
                *(outcome(socket.socket, family) for family in families),
                outcome(socket.socketpair),
                outcome(socket.create_connection, ("127.0.0.1", 9)),
                outcome(socket.getaddrinfo, "localhost", 80),
                outcome(call, 425, 8, None),  # io_uring_setup
                outcome(call, 101 if X86 else 117, 16, os.getppid(), 0, 0),  # ptrace, to attach
                outcome(call, 310 if X86 else 270, os.getppid(), None, 0, None, 0, 0),  # process_vm_readv
                outcome(call, 272 if X86 else 97, 0x10000000),  # unshare, a user namespace
                outcome(call, 437, -100, b"/dev/null", None, 0),  # openat2
                outcome(call, 0x40000000 + 41, 2, 1, 0),  # socket, by its number in the x32 table
                outcome(fcntl.fcntl, 0, fcntl.F_SETOWN, os.getppid()),
                outcome(fcntl.fcntl, 0, fcntl.F_SETFL, 0o20000),
                outcome(resource.setrlimit, resource.RLIMIT_CPU, (9, 9)),
                outcome(resource.prlimit, os.getppid(), resource.RLIMIT_CPU, (1, 1)),
                outcome(os.sched_setaffinity, 0, {0}),
                outcome(os.nice, 1),
            ]
    """)


def test_no_descriptor_is_inherited(tmp_path):
    """Only the standard ones, which lead nowhere, and the two ends of its own pipes."""
    with open(tmp_path / "file", "w") as file:
        os.set_inheritable(file.fileno(), True)
        program = "def f(): return [n for n in range(64) if outcome(os.fstat, n)[0] == 'done'], os.read(0, 9)"
        assert run(program, "opened, read = f()", "assert len(opened) == 5 and read == b''").passed == 2


def test_exhausted_descriptors_do_not_cost_the_answer():
    program = """
        def f():
            opened = []
            try:
                while len(opened) < 10_000:
                    opened.append(os.dup(0))
            except OSError:
                return len(opened)
    """
    assert run(program, "assert 10 < f() < 64", "assert 0 <= f() < 64").passed == 2


# Success that is not earned: `f(1)` should be 2


OUTCOME = '{"passed": 1, "error": null, "isolation": []}'
FAKES = {
    "os._exit": "os._exit(0)",
    "os._exit in the call": "def f(x): os._exit(0)",
    "sys.exit": "sys.exit(0)",
    "sys.exit in the call": "def f(x): sys.exit(0)",
    "interrupt": "def f(x): raise KeyboardInterrupt",
    "crash": "import ctypes\ndef f(x): ctypes.string_at(0)",
    "deep recursion": "sys.setrecursionlimit(10 ** 9)\ndef f(x): return f(x)",
    "atexit": f"import atexit\natexit.register(lambda: print('{OUTCOME}'))\ndef f(x): sys.exit(0)",
    "print": f"print('{OUTCOME}')\ndef f(x): print('{OUTCOME}'); os._exit(0)",
    "write everywhere": f"def f(x):\n    [outcome(os.write, n, b'{OUTCOME}\\n') for n in range(64)]\n    os._exit(0)",
    "forged reply": """
        import json
        for n in range(3, 64):
            outcome(os.write, n, json.dumps({"passed": 1, "value": None}).encode() + b"\\n")
    """,
    "always equal": """
        class Equal:
            __eq__ = __ge__ = __le__ = __bool__ = lambda self, *other: True
            __hash__ = None
        def f(x): return Equal()
    """,
    "always equal number": """
        class Equal(int):
            __eq__ = lambda self, other: True
            __hash__ = int.__hash__
        def f(x): return Equal(7)
    """,
    "always equal list": "class L(list):\n    __eq__ = lambda *_: True\ndef f(x): return L([7])",
    "not a number": "def f(x): return float('nan')",
    "other check": "def check(*_): pass\ndef f(x): return 7",
    "other assertion": """
        import builtins
        class Never(Exception): pass
        builtins.AssertionError = Never
        builtins.all = builtins.any = builtins.abs = builtins.len = lambda *_: 2
        def f(x): return 7
    """,
    "patched json": "import json\njson.dumps = lambda *_: '{\"value\": true}'\ndef f(x): return 7",
    "patched write": f"""
        write = os.write
        os.write = lambda descriptor, data: write(descriptor, b'{OUTCOME}\\n') and len(data)
        def f(x): return 7
    """,
    "trace": """
        def trace(frame, event, argument):
            frame.f_locals.update(passed=9, error=None)
            return trace
        sys.settrace(trace)
        sys.setprofile(trace)
        def f(x): return 7
    """,
    "frames": """
        import ctypes
        def f(x):
            frame = sys._getframe()
            while frame:
                values = frame.f_locals
                values.update(passed=9, tests=[], error=None)
                ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))
                frame = frame.f_back
            return 7
    """,
    "end of the judge": "import signal\ndef f(x): outcome(os.kill, os.getppid(), signal.SIGCONT); os.abort()",
}


@pytest.mark.parametrize("name", FAKES)
def test_no_success_is_faked(name):
    setup = "def check(f):\n    assert f(1) == 2\n    assert abs(f(1) - 2) < 1e-6"
    outcome = run(FAKES[name], "check(f)", "assert f(1) == 2", "assert all(f(x) == x + 1 for x in (1, 2))", setup=setup)
    assert outcome.passed == 0 and outcome.error
    assert run("def f(x): return x + 1", "check(f)", setup=setup).passed == 1


def test_the_tests_cannot_be_found():
    """They are in no object and no frame of the program's process. What it was given is found in the same way."""
    program = """
        import gc
        def texts(value, depth):
            if isinstance(value, (str, bytes)):
                yield value if isinstance(value, str) else value.decode("latin-1")
            elif depth and isinstance(value, (list, tuple, set, dict)):
                for item in [*value, *(value.values() if isinstance(value, dict) else ())]:
                    yield from texts(item, depth - 1)
        def f():
            frame, values = sys._getframe(), [sys.argv]
            while frame:
                values += [frame.f_locals, frame.f_globals]
                frame = frame.f_back
            word = "".join(reversed("hsifdrows"))
            return any(word in text for value in gc.get_objects() + values for text in texts(value, 3) if text != word)
        def g(given): return f()
    """
    setup = "secret = 'a swordfish'"
    assert run(program, f"{setup}\nassert f() is False", "assert g(secret) is True", setup=setup).passed == 2
