"""Three processes that run a program and its tests; `dllm_gym.verify.sandbox` starts them.

- The keeper limits itself, forks the other two, waits for the judge, and ends both.
- The program runs the untrusted text. It is forked before the tests are read and never sees them.
- The judge runs the tests. It calls the program's functions over a pipe and gets values back, as JSON.

So nothing that the program does to its own interpreter, to its output or to the pipe says that a test has passed: the
judge compares what came back, and what can come back are plain values only.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import json
import os
import select
import signal
import symtable
import sys
import time
import types
from collections.abc import Callable, Iterator

import lockdown

LONGEST_MESSAGE = 4 << 20
"""In bytes: arguments or a value."""
LONGEST_ERROR = 200
WIDEST_INT = 1 << 64
"""Wider integers travel in hexadecimal: Python reads only 4300 decimal digits."""


def main() -> None:
    """The keeper. Reads the job from its standard input (through the judge), which writes the outcome to its output."""
    cpu_s, memory_mb, wall_s = json.loads(sys.argv[2])
    sys.path.pop(0)
    sys.dont_write_bytecode = True
    os.environ.clear()
    lockdown.die_with(int(sys.argv[3]))
    lockdown.drop_privileges()
    null = os.open(os.devnull, os.O_RDWR)
    isolation = ["memory"] if lockdown.limit_resources(cpu_s, memory_mb) else []
    isolation += ["files"] if lockdown.restrict_files() else []

    questions, ask = os.pipe()
    answers, answer = os.pipe()
    judging, done = os.pipe()
    program = fork(lambda: serve(questions, answer, isolation), keep=(questions, answer), null=null)
    judge = fork(lambda: judge_job(ask, answers, wall_s, null), keep=(0, 1, ask, answers, done, null), null=null)
    for descriptor in (0, 1, questions, ask, answers, answer, done):
        os.close(descriptor)

    select.select([judging], [], [], wall_s + 1)  # the judge has its own clock, this is for a judge that hangs
    with contextlib.suppress(OSError):
        os.killpg(program, signal.SIGKILL)
    for process in (program, judge):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    os._exit(0)  # without the interpreter's own end, which takes a while


def fork(work: Callable[[], None], keep: tuple[int, ...], null: int) -> int:
    """A child that dies with the keeper, in a group of its own, with no descriptor but those to keep."""
    keeper = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        lockdown.die_with(keeper)
        for descriptor in range(64):
            if descriptor not in keep:
                os.dup2(null, descriptor) if descriptor < 3 else close(descriptor)
        work()
    finally:
        os._exit(0)


def close(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.close(descriptor)


def lock() -> list[str]:
    """The last restrictions, which a process takes on before it runs anything that was given."""
    no_processes = lockdown.forbid_processes()
    syscalls = lockdown.restrict_syscalls()
    return ["processes"] * (no_processes or syscalls) + ["syscalls"] * syscalls


# The program


def serve(questions: int, answer: int, isolation: list[str]) -> None:
    """Say how well this process is isolated, load the program, then call its functions as asked."""

    def reply(message: dict) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(answer, data) :]

    reply({"isolation": isolation + lock()})
    module = types.ModuleType("program")
    sys.modules["program"] = module
    with open(questions, "rb") as lines:
        for line in lines:
            try:
                value = respond(json.loads(line), module)
                message = {"value": encode(value)}
            except BaseException as error:  # SystemExit too: the tests go on, and this one fails
                message = {"error": describe(error)}
            reply(message)


def respond(question: dict, module: types.ModuleType) -> object:
    if "load" in question:
        load = question["load"]
        for helper in compiled_helpers(load["helpers"], load["names"]):
            with contextlib.suppress(Exception):  # an example of use, perhaps, or a module that is not there
                exec(helper, module.__dict__)
        return exec(compiled_program(load["programs"], load["names"]), module.__dict__)
    arguments = [decode(argument) for argument in question["arguments"]]
    keywords = {name: decode(argument) for name, argument in question["keywords"].items()}
    if question["call"] not in module.__dict__:
        raise NameError(f"name {question['call']!r} is not defined")
    return module.__dict__[question["call"]](*arguments, **keywords)


NO_CODE = (SyntaxError, ValueError, RecursionError, MemoryError)
"""What the compiler says of a text that is none."""


def compiled_program(programs: list[str], names: list[str]) -> types.CodeType:
    """The first program that compiles and defines one of the names, else the first that compiles."""
    found = []
    for program in programs:
        with contextlib.suppress(*NO_CODE):
            tree = ast.parse(program)
            tree.body = [statement for statement in tree.body if not says_nothing(statement)]
            found.append((defined(program).isdisjoint(names), compile(tree, "program", "exec")))
    if not found:
        return compile(programs[-1], "program", "exec")
    return min(found, key=lambda pair: pair[0])[1]


def compiled_helpers(helpers: list[str], names: list[str]) -> Iterator[types.CodeType]:
    """Imports, functions, classes and constants, one by one; none that is called as the program."""
    for helper in helpers:
        with contextlib.suppress(*NO_CODE):
            for statement in ast.parse(helper).body:
                source = ast.unparse(statement)
                if is_definition(statement) and defined(source).isdisjoint(names):
                    yield compile(source, "program", "exec")


def is_definition(statement: ast.stmt) -> bool:
    if isinstance(statement, (ast.Assign, ast.AnnAssign)):
        computed = isinstance(statement.value, ast.Lambda) or statement.value is None
        return computed or not any(isinstance(node, ast.Call) for node in ast.walk(statement.value))
    return isinstance(statement, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))


def says_nothing(statement: ast.stmt) -> bool:
    """A name that stands alone: the language of a fence that was lost, ``Explanation``, ``[DONE]``."""
    if not isinstance(statement, ast.Expr):
        return False
    value = statement.value
    return all(isinstance(node, ast.Name) for node in (value.elts if isinstance(value, ast.List) else [value]))


def defined(program: str) -> set[str]:
    """The names that a program binds at its top level."""
    symbols = symtable.symtable(program, "program", "exec").get_symbols()
    return {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}


# The judge


def judge_job(ask: int, answers: int, wall_s: float, null: int) -> None:
    """Read the job, run the tests, write the outcome."""
    job = json.loads(read_all(0))
    outcome = os.dup(1)
    os.dup2(null, 0)
    os.dup2(null, 1)
    lock()
    lines = read_lines(answers, time.monotonic() + wall_s)
    passed, error, isolation = 0, None, json.loads(next(lines))["isolation"]

    def question(**message) -> object:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(ask, data) :]
        reply = json.loads(next(lines, b'{"error": "the program has ended: it left, crashed or went over a limit"}'))
        if "value" not in reply:
            raise RuntimeError(str(reply["error"]))
        return decode(reply["value"])

    def function(name: str) -> Callable:
        def call(*arguments, **keywords):
            keywords = {key: encode(value) for key, value in keywords.items()}
            return question(call=name, arguments=[encode(value) for value in arguments], keywords=keywords)

        return call

    namespace = {"__name__": "tests"}
    try:
        exec(job["setup"], namespace)
        namespace.update({name: function(name) for name in job["names"]})
        question(load={name: job[name] for name in ("programs", "helpers", "names")})
        tests = job["tests"]
    except BaseException as problem:
        error, tests = describe(problem), []
    for test in tests:
        try:
            exec(test, namespace)
            passed += 1
        except BaseException as problem:
            error = error or describe(problem)
    os.write(outcome, json.dumps({"passed": passed, "error": error, "isolation": isolation}).encode())


def read_all(descriptor: int) -> bytes:
    with open(descriptor, "rb", closefd=False) as file:
        return file.read()


def read_lines(descriptor: int, deadline: float) -> Iterator[bytes]:
    """The lines that arrive before the deadline; none is longer than `LONGEST_MESSAGE`."""
    data = bytearray()
    while True:
        while b"\n" not in data:
            ready, _, _ = select.select([descriptor], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError("over the wall-clock limit")
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                return
            data += chunk
            if len(data) > LONGEST_MESSAGE:
                raise ValueError(f"a value is longer than {LONGEST_MESSAGE} bytes")
        line, _, data = data.partition(b"\n")
        yield bytes(line)


# Values between them


def encode(value: object) -> object:
    """As JSON: what is not a scalar or a list is an object with one key, its type. Of other types the truth is left."""
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int):
        return int(value) if -WIDEST_INT < value < WIDEST_INT else {"int": hex(value)}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item) for item in value]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes):
        return {"bytes": value.decode("latin-1")}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, Iterator):
        return {"iterator": [encode(item) for item in value]}
    if isinstance(value, type) and vars(builtins).get(value.__name__) is value:
        return {"type": value.__name__}
    return {"other": bool(value)}


class Other:
    """A value of a type that is not handed over, such as a match of `re`: equal to nothing but itself."""

    def __init__(self, truth: object):
        self.truth = bool(truth)

    def __bool__(self) -> bool:
        return self.truth


DECODERS: dict[str, Callable] = {
    "int": lambda text: int(text, 16),
    "dict": lambda items: {decode(key): decode(item) for key, item in items},
    "tuple": lambda items: tuple(map(decode, items)),
    "set": lambda items: set(map(decode, items)),
    "frozenset": lambda items: frozenset(map(decode, items)),
    "complex": lambda parts: complex(*parts),
    "bytes": lambda text: text.encode("latin-1"),
    "range": lambda ends: range(*ends),
    "iterator": lambda items: map(decode, items),
    "type": lambda name: {kind.__name__: kind for kind in vars(builtins).values() if isinstance(kind, type)}[name],
    "other": Other,
}


def decode(value: object) -> object:
    """The value of JSON that `encode` made; any error where it did not."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        return DECODERS[kind](content)
    return value


def describe(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text.removesuffix(":")[:LONGEST_ERROR]
