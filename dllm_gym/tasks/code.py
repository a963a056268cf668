"""Python functions from their description: HumanEval and MBPP. Their verifier runs the completion, in a sandbox.

How success is decided and what the sandbox keeps out: docs/code-tasks.md.
"""

from __future__ import annotations

import ast
import builtins
import sys
import warnings

from dllm_gym.tasks.base import Task
from dllm_gym.types import Problem, Verdict
from dllm_gym.verify.code import Checks, verify_code
from dllm_gym.verify.sandbox import FULL_ISOLATION, isolation


class CodeTask(Task):
    """What HumanEval and MBPP share. ``Problem.answer``: `dllm_gym.verify.code.Checks`.

    Raises:
        RuntimeError: no sandbox can be started on this system.

    Warns where the sandbox is weaker on this system than it can be.
    """

    runs_code = True

    def __init__(self, dataset: str | None = None, split: str = "train", **options):
        super().__init__(dataset, split, **options)
        missing = [part for part in FULL_ISOLATION if part not in isolation()]
        if missing:
            warnings.warn(
                f"{self.name}: this system does not let the sandbox limit {', '.join(missing)}; see "
                f"docs/code-tasks.md, and run it in a container or a virtual machine.",
                stacklevel=2,
            )

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Score: the share of the tests that pass. Runs the completion, in the sandbox."""
        return verify_code(completion, problem.answer)


class HumanEval(CodeTask):
    """164 functions to complete (arXiv 2107.03374). Score: 1 if all assertions of a problem hold, else 0."""

    name = "humaneval"
    hub_id = "openai/openai_humaneval"
    hub_splits = {"test": "test"}
    columns = "`prompt`, `entry_point` and `test`, and `canonical_solution` where there is one"
    template = (
        "Complete this Python function. Answer with the whole function in one ```python block.\n\n"
        "```python\n{question}\n```"
    )

    def read_row(self, row: dict) -> tuple[str, Checks]:
        prompt, name = row["prompt"], row["entry_point"]
        # The prompt's helpers are there for the tests too, and cannot be replaced by the program.
        setup = f"{prompt}\n{row['test']}"
        if not {name, "check"} <= _bound(_parse("`prompt` and `test`", setup)):
            raise ValueError(f"`prompt` must define {name!r} and `test` must define 'check'")
        return prompt, Checks((name,), (f"check({name})",), setup, prompt)

    def solve_row(self, row: dict) -> str:
        return f"```python\n{row['prompt']}{row['canonical_solution']}\n```"


class MBPP(CodeTask):
    """974 functions described in a sentence, with three assertions each (arXiv 2108.07732); 500 are the test set.

    The prompt shows the assertions, as the paper's does. Score: the share of them that hold. The config is "full", that
    of lm-evaluation-harness, which the evaluation scripts of LLaDA (arXiv 2502.09992) and Dream (arXiv 2508.15487) run;
    rows of "sanitized" are read too, from a local file.
    """

    name = "mbpp"
    hub_id = "google-research-datasets/mbpp"
    hub_config = "full"
    columns = "`text` or `prompt`, `test_list`, and `code` and `test_setup_code` or `test_imports` where there are some"
    template = (
        "You are an expert Python programmer, and here is your task:\n{question}\n\n"
        "Answer with the whole function in one ```python block."
    )

    def read_row(self, row: dict) -> tuple[str, Checks]:
        text, tests = row["text"] if "text" in row else row["prompt"], row["test_list"]
        if isinstance(tests, str) or not tests:
            raise ValueError(f"`test_list` must be a list of assertions, not {tests!r}")
        setup = "\n".join([row.get("test_setup_code") or "", *(row.get("test_imports") or ())])
        tree = _parse("`test_list` and the setup", "\n".join([setup, *tests]))
        wanted = _used(tree) - _bound(tree) - set(dir(builtins))
        modules = wanted & sys.stdlib_module_names  # one problem's tests use `sys` and do not import it
        setup = "\n".join([*(f"import {module}" for module in sorted(modules)), setup])
        names = wanted - modules or _called(tree)  # one problem is to define `sum`
        question = "\n".join([text.strip(), "Your code should pass these tests:", *tests])
        return question, Checks(tuple(sorted(names)), tuple(tests), setup)

    def solve_row(self, row: dict) -> str:
        code = row["code"].replace("\r\n", "\n")
        return f"```python\n{code}\n```"


def _parse(given: str, source: str) -> ast.Module:
    """The tree of a text of the data set. Completions are never parsed here: a parser can be made to crash."""
    try:
        return ast.parse(source)
    except SyntaxError as error:
        raise ValueError(f"{given} must be Python ({error})") from error


def _used(tree: ast.Module) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _called(tree: ast.Module) -> set[str]:
    return {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


def _bound(tree: ast.Module) -> set[str]:
    """Names that a text defines itself, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                names.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.alias(name=name, asname=alias):
                names.add(alias or name.partition(".")[0])
    return names
