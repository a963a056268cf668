"""HumanEval and MBPP: which code is read from a completion, and which verdict it gets."""

import json
import time
from pathlib import Path

import pytest

from dllm_gym import make_task
from dllm_gym.tasks import code
from dllm_gym.tasks.code import HumanEval
from dllm_gym.types import Problem
from dllm_gym.verify.code import Checks, read_code, verify_code
from dllm_gym.verify.sandbox import Limits

SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "humaneval_sample.jsonl"

PROMPT = (
    'from typing import List\n\n\ndef twice(x: int) -> int:\n    """Two times x.\n    >>> twice(2)\n    4\n    """\n'
)
BODY = "    result = x\n    for _ in range(1):\n        result += x\n    return result\n"
DEFINITION = "def twice(x):\n    return 2 * x\n"
TESTS = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-3) == helper(-3)\n"
HUMANEVAL_ROW = {
    "task_id": "HumanEval/0",
    "prompt": "def helper(x):\n    return x + x\n\n" + PROMPT,
    "entry_point": "twice",
    "canonical_solution": BODY,
    "test": f"METADATA = {{}}\n\n{TESTS}",
}
MBPP_ROW = {
    "task_id": 1,
    "text": "Write a function to double a number.",
    "code": "def twice(x):\r\n  return x + x\r\n",
    "test_list": ["assert twice(2) == 4", "assert twice(3) == 6", "assert twice(0) == 0"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
SANITIZED_ROW = {
    "prompt": "Write a function to get the area of a circle.",
    "code": "def area(r):\n    return 3.14159 * r * r",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(area(1), 3.14159)", "assert [area(r) for r in range(1)] == [0.0]"],
}


def make(tmp_path: Path, name: str, *rows: dict, **options):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_task(name, str(path), "test", allow_code_execution=True, **options)


@pytest.fixture
def humaneval(tmp_path) -> HumanEval:
    return make(tmp_path, "humaneval", HUMANEVAL_ROW)


# Reading the code


def read(completion: str, prompt: str = PROMPT) -> list[str]:
    return [program.removeprefix(prompt).strip("\n") for program in read_code(completion, ("twice",), prompt).programs]


@pytest.mark.parametrize(
    "completion",
    [
        f"```python\n{DEFINITION}```",
        f"Sure!\n\n```python\n{DEFINITION}```\n\nIt doubles.",
        f"``` py \r\n{DEFINITION}```",
        f"```python\n{DEFINITION}",
        f"```python\n{DEFINITION}<|eot_id|><|endoftext|>```python\ndef twice(x): return 3\n```",
        f"```\n{DEFINITION}```<|im_end|>",
        f"```python\ndef once(x):\n    return x\n```\nand\n```python\n{DEFINITION}```",
        f"```python\ndef twice(x):\n    return 3\n```\nThat was wrong.\n```python\n{DEFINITION}```",
        "1. First\n   ```python\n   def twice(x):\n       return 2 * x\n   ```",
        f"{DEFINITION}```\nIt doubles.",
        f"{DEFINITION}```\n\nUse it:\n```python\ntwice(2)\n```",
        DEFINITION,
    ],
)
def test_a_definition_is_found(completion):
    for prompt in (PROMPT, ""):
        assert read(completion, prompt)[0] == DEFINITION.strip()


@pytest.mark.parametrize(
    "completion",
    [
        f"Here it is:\n\n{DEFINITION}\nThis works because 2 * x is x + x.",
        f"{DEFINITION}\nif __name__ == '__main__':\n    print(twice(",
        f"import math\nTWO: int = 2\n\n@staticmethod\n{DEFINITION}\n# Done\nprint(twice(2",
    ],
)
def test_what_is_no_code_is_cut_where_the_whole_is_none(completion):
    *_, shortest = read(completion)
    compile(shortest, "", "exec")
    assert DEFINITION.strip() in shortest and completion.strip() in read(completion)[0]


@pytest.mark.parametrize(
    "completion",
    [
        BODY,
        f"\n{BODY}",
        BODY.strip(),
        f"```python\n{BODY}```",
        f"```python\n{BODY.strip()}\n```",
        f"{BODY}```\nIt adds.",
        "result = x\nfor _ in range(1):\n    result += x\nreturn result",
        f"{BODY}\ndef other():\n    return 1",
        f"{BODY}\nprint(twice(",
        f"{BODY}\nThe function adds.",
        f"{PROMPT}{BODY}",
        f"```python\n{PROMPT}{BODY}```",
        "if x:\n    return x + x\nreturn 0",
        "if x:\n        return x + x\n    return 0",
        "return 2 * x",
    ],
)
def test_a_body_continues_the_prompt(humaneval, completion):
    assert humaneval.verify(humaneval[0], completion).correct


DOCUMENTED = """def twice(x):
    \"\"\"Two times x, as in
    ```
    twice(2)
    ```
    or ```twice(3)```.
    \"\"\"
    return 2 * x
"""
USES_HELPER = "def twice(x):\n    return add(x, math.floor(x) * ONE)\n"
HELPER = "import math\nfrom nowhere import nothing\nONE = 1\nTWO = twice(1)\n\ndef add(a, b):\n    return a + b\n"

READ = {
    "a marker after it": f"{DEFINITION}[DONE]",
    "a marker and more": f"[BEGIN]\n{DEFINITION}[DONE]\n\nYou are an expert Python programmer.",
    "a closing marker": f"[PYTHON]\n{DEFINITION}[/PYTHON]",
    "a heading": f"{DEFINITION}\nExplanation",
    "a heading and prose": f"{DEFINITION}\nExplanation: it is the number x = 2 * y.",
    "the language of a lost fence": f"python\n{DEFINITION}",
    "the language of a lost fence, twice": f"Here it is.\n\npython\n{DEFINITION}\nDone",
    "prose before and after": f"Here is the code:\n{DEFINITION}\nIt doubles.",
    "a session after it": f"{DEFINITION}\n>>> twice(2)\n4",
    "a main block": f"{DEFINITION}\nif __name__ == '__main__':\n    print(twice(input()))",
    "fences in the docstring": f"```python\n{DOCUMENTED}```\nIt doubles.",
    "fences in the docstring, no fence around": DOCUMENTED,
    "fences in the docstring, the first lost": f"{DOCUMENTED}```\nIt doubles.",
    "fences at the margin of the docstring": f"```\n{DOCUMENTED.replace('    ```', '```')}```",
    "a fence at the end of a line": "```python\ndef twice(x): return 2 * x```\nIt doubles.",
    "tildes": f"~~~python\n{DEFINITION}~~~",
    "four backticks": f"````python\n{DEFINITION}````",
    "an answer tag": f"<answer>\n```python\n{DEFINITION}```\n</answer>",
    "windows": f"```python\n{DEFINITION}```".replace("\n", "\r\n"),
    "lambda": "```python\ntwice = lambda x: 2 * x\n```",
    "lambda without fence": "Use this:\n\ntwice = lambda x: 2 * x",
    "typed lambda": "```python\nfrom typing import Callable\ntwice: Callable[[int], int] = lambda x: 2 * x\n```",
    "another name": "```python\ndef solve(x):\n    return 2 * x\n\ntwice = solve\n```",
    "another name in a second block": "```\ndef solve(x):\n    return 2 * x\n```\nThen\n```\ntwice = solve\n```",
    "a helper in a block before": f"First\n```python\n{HELPER}```\nthen\n```python\n{USES_HELPER}```",
    "a helper in a block after": f"```python\n{USES_HELPER}```\nwith\n```python\n{HELPER}print(twice(input()))\n```",
    "an example of use": f"```python\n{DEFINITION}```\nUse it:\n```\nassert twice(2) == 5\nx = twice('a' + 1)\n```",
    "a wrong one before": f"```python\ndef twice(x):\n    return 3\n```\nNo:\n```python\n{DEFINITION}```",
    "a local variable of its name": "twice = x + x\nreturn twice",
}


@pytest.mark.parametrize("completion", READ.values(), ids=READ)
def test_what_is_no_code_is_not_the_program(humaneval, completion, tmp_path):
    assert humaneval.verify(humaneval[0], completion).correct
    if "return twice" not in completion:  # a body needs a prompt
        task = make(tmp_path, "mbpp", MBPP_ROW)
        assert task.verify(task[0], completion).correct


@pytest.mark.parametrize(
    "text", ["```\n" * 6_000, "`" * 19_000, "~~~x\n" * 4_000, " " * 19_000, "\n" * 19_000, "``` " * 4_000]
)
def test_reading_takes_a_moment(text):
    since = time.process_time()
    for completion in (text, f"{text}{DEFINITION}", f"```python\n{DEFINITION}{text}"):
        read_code(completion, ("twice",), PROMPT)
    assert time.process_time() - since < 2  # quadratic time would be minutes


@pytest.mark.parametrize("completion", ["", " \n", "<|eot_id|>", "```python\n```", "<|eot_id|>" + BODY])
def test_no_code_is_no_answer(humaneval, completion):
    verdict = humaneval.verify(humaneval[0], completion)
    assert (verdict.correct, verdict.score, verdict.answer) == (False, 0.0, None)


# Verdicts


WRONG = [
    "pass",
    "    pass",
    "return 4",
    "return None",
    "I cannot do that.",
    "def twice(x):\n    ...",
    "def twice(x):\n    return x",
    "def thrice(x):\n    return x + x",
    "class twice:\n    pass",
    "twice = 4",
    "#### 4",
    "```",
    "``````",
    "```" + " " * 19_000,
    "\\boxed{4}",
    "import os\nos._exit(0)",
    "    raise SystemExit(0)",
    "def check(f): pass\ndef twice(x): return 0",
    "def helper(x): return 4\ndef twice(x): return 4",
    "def twice(x):\n    while True: pass",
    "\0",
    "\ud800",
    "(" * 10_000,
    "```python\n" * 2_000,
    "def twice(" * 2_000,
    " " * 30_000,
]


@pytest.mark.parametrize("completion", WRONG, ids=range(len(WRONG)))
def test_wrong_and_hostile_completions_score_nothing(completion):
    prompt = HUMANEVAL_ROW["prompt"]
    checks = Checks(("twice",), ("check(twice)",), f"{prompt}\n{TESTS}", prompt)
    verdict = verify_code(completion, checks, Limits(1, 5.0))
    assert (verdict.correct, verdict.score) == (False, 0.0)


def test_an_echoed_prompt_scores_nothing(humaneval):
    problem = humaneval[0]
    for completion in (problem.prompt, HUMANEVAL_ROW["prompt"], f"```python\n{HUMANEVAL_ROW['prompt']}```"):
        assert humaneval.verify(problem, completion).score == 0


def test_humaneval_rows(humaneval):
    problem = humaneval[0]
    assert problem.prompt.startswith("Complete this Python function.") and HUMANEVAL_ROW["prompt"] in problem.prompt
    verdict = humaneval.verify(problem, f"```python\n{DEFINITION}```")
    assert verdict.correct and verdict.score == 1.0 and verdict.answer.endswith(DEFINITION)


def test_mbpp_rows_and_their_partial_credit(tmp_path):
    task = make(tmp_path, "mbpp", MBPP_ROW, SANITIZED_ROW)
    problem = task[0]
    assert MBPP_ROW["text"] in problem.prompt and all(test in problem.prompt for test in MBPP_ROW["test_list"])
    expected = {MBPP_ROW["code"]: 1, "def twice(x): return 4": 1 / 3, "def twice(x): return x * x": 2 / 3, "pass": 0}
    for completion, score in expected.items():
        verdict = task.verify(problem, completion)
        assert (verdict.correct, verdict.score) == (score == 1, pytest.approx(score))
    assert task.verify(problem, problem.prompt).score == 0
    assert task.verify(task[1], SANITIZED_ROW["code"]).correct
    assert not task.verify(task[1], "def area(r): return 1").correct


@pytest.mark.parametrize(
    ("row", "names", "setup"),
    [
        ({"test_list": ["assert sum(10, 15) == 6"]}, ("sum",), ""),
        ({"test_list": ["assert size((1,)) == sys.getsizeof((1,))"]}, ("size",), "import sys\n"),
        ({"test_list": ["assert [f(i) for i in x] == g(x)"], "test_setup_code": "x = [1]"}, ("f", "g"), "x = [1]"),
        ({"test_list": ["assert f(lambda a: a)"], "test_imports": None, "test_setup_code": None}, ("f",), ""),
    ],
)
def test_the_functions_that_mbpp_asks_for(tmp_path, row, names, setup):
    answer = make(tmp_path, "mbpp", {"text": "Do it."} | row)[0].answer
    assert (answer.names, answer.setup) == (names, setup)


def test_worked_examples_are_right(tmp_path, humaneval):
    other = MBPP_ROW | {"text": "Double it.", "test_list": ["assert twice(1) == 2"]}
    for task, rows in (
        (make(tmp_path, "mbpp", MBPP_ROW, other, few_shot=1), (MBPP_ROW, other)),
        (humaneval, (HUMANEVAL_ROW,)),
    ):
        for index, row in enumerate(rows):
            assert task.verify(task[index], task.solve_row(row)).correct
    shown = make(tmp_path, "mbpp", MBPP_ROW, other, few_shot=1)[0].prompt
    assert "Double it." in shown and "```python\ndef twice(x):\n  return x + x\n" in shown


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("humaneval", HUMANEVAL_ROW | {"prompt": "def twice(x):\n"}, "`prompt` and `test` must be Python"),
        ("humaneval", HUMANEVAL_ROW | {"entry_point": "thrice"}, "`prompt` must define 'thrice'"),
        ("humaneval", HUMANEVAL_ROW | {"test": "assert twice(1) == 2"}, "must define 'twice' and `test` must define"),
        ("humaneval", {"prompt": "x"}, "a row needs `prompt`, `entry_point` and `test`"),
        ("mbpp", MBPP_ROW | {"test_list": "assert 1"}, "`test_list` must be a list of assertions, not 'assert 1'"),
        ("mbpp", MBPP_ROW | {"test_list": []}, "`test_list` must be a list"),
        ("mbpp", MBPP_ROW | {"test_list": ["assert ("]}, "must be Python"),
        ("mbpp", {"test_list": ["assert 1"]}, "a row needs `text` or `prompt`, `test_list`"),
    ],
)
def test_rows_that_are_none_are_refused(tmp_path, name, row, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, name, row)[0]


@pytest.mark.parametrize("given", [{"names": ()}, {"tests": ()}])
def test_checks_check_something(given):
    with pytest.raises(ValueError, match=r"=\(\): must hold at least one"):
        Checks(**{"names": ("f",), "tests": ("f()",)} | given)


# Leave, and weaker systems


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_code_is_not_run_without_leave(name):
    with pytest.raises(ValueError, match="give allow_code_execution=True to agree"):
        make_task(name, "hub", "test")


def test_a_weaker_sandbox_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(code, "isolation", lambda: ("memory", "processes"))
    with pytest.warns(UserWarning, match="does not let the sandbox limit files, syscalls; see docs/code-tasks.md"):
        make(tmp_path, "mbpp", MBPP_ROW)


# The real problems


@pytest.mark.parametrize("index", range(24))
def test_real_problems(index):
    if not SAMPLE.is_file():
        pytest.skip(f"no {SAMPLE.name}")
    row = json.loads(SAMPLE.read_text(encoding="utf-8").splitlines()[index])
    task = make_task("humaneval", str(SAMPLE), "test", allow_code_execution=True)
    problem: Problem = task[index]
    solution = row["canonical_solution"]
    for right in (f"{row['prompt']}{solution}", solution, f"```python\n{row['prompt']}{solution}```<|eot_id|>"):
        assert task.verify(problem, right).score == 1
    name = row["entry_point"]
    for wrong in (
        row["prompt"],
        "    pass",
        f"def {name}(*given):\n    return True",
        f"def {name}(*given): return given",
    ):
        assert task.verify(problem, wrong).score == 0
