"""Real data: the benchmarks' rows, prompts from templates and worked examples, and what is said where data is wrong."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import gymnasium as gym
import pytest
from checkpoints import write_dream, write_llada
from errors import error_of

from dllm_gym import make_task
from dllm_gym.agents.environment import EnvConfig, make_env
from dllm_gym.agents.trainers.policy.comparison import ReportConfig
from dllm_gym.eval.cli import main as evaluate
from dllm_gym.tasks import TASKS
from dllm_gym.tasks.base import QUESTION, GeneratedTask, Task
from dllm_gym.tasks.countdown import Countdown
from dllm_gym.types import Problem, Verdict

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
BENCHMARKS = ("math500", "aime24", "aime25", "humaneval", "mbpp")

ROWS = {
    "gsm8k": [{"question": f"What is {i} + {i}?", "answer": f"<<{i}+{i}={2 * i}>>so\n#### {2 * i}"} for i in range(6)],
    "math500": [
        {"problem": "What is $1/2$?", "answer": r"\frac{1}{2}", "solution": r"It is $\boxed{\frac{1}{2}}$."},
        {"problem": "Solve $x^2 = 4$.", "answer": "-2, 2", "solution": "We take roots."},
        {"problem": "What is $2^3$?", "answer": 8},
        {"problem": "What is $3^3$?", "answer": "27", "solution": None},
    ],
    "aime24": [{"problem": f"Find {i}.", "answer": f"{i:03}", "solution": f"\\boxed{{{i:03}}}"} for i in (0, 25, 999)],
    "countdown": [
        {"nums": [12, 9, 3], "target": 6},
        {"nums": [8, 2, 3, 1], "target": 13},
        {"nums": [60], "target": 60},
    ],
    "sudoku": [{"Puzzle": "0320004330100004"}, {"Puzzle": "4321124334122130"}],
    "humaneval": [
        {
            "prompt": 'def double(x):\n    """Twice x."""\n',
            "entry_point": "double",
            "canonical_solution": "    return 2 * x\n",
            "test": "def check(f):\n    assert f(4) == 8\n",
        }
    ],
    "mbpp": [{"text": "Double a number.", "code": "def f(x):\n    return 2 * x", "test_list": ["assert f(4) == 8"]}],
}
ROWS["aime25"] = [{key: row[key] for key in ("problem", "answer")} for row in ROWS["aime24"]]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def data(tmp_path):
    """A file of a task's rows."""
    return lambda name: write(tmp_path / f"{name}.jsonl", ROWS[name])


def template(tmp_path: Path, text: str) -> str:
    (tmp_path / "template.txt").write_text(text, encoding="utf-8")
    return str(tmp_path / "template.txt")


@pytest.mark.parametrize(("name", "length"), [("gsm8k", 24), ("countdown", 12), ("sudoku", 16)])
def test_real_data_has_longer_completions_than_embedded_problems(name, length, data):
    assert make_task(name).gen_length == length and make_task(name, dataset=data(name)).gen_length == 256


# The benchmarks of mathematics


@pytest.mark.parametrize("name", ["math500", "aime24", "aime25"])
def test_rows_of_mathematics(name, data):
    task = make_task(name, data(name), "test")
    assert len(task) == len(ROWS[name]) and task.gen_length == 256
    for index, row in enumerate(ROWS[name]):
        problem = task[index]
        assert problem.prompt.startswith(row["problem"]) and problem.prompt.endswith("within \\boxed{}.")
        assert task.verify(problem, f"So \\boxed{{{row['answer']}}}.") == Verdict(True, 1.0, str(row["answer"]))
        assert not task.verify(problem, "So \\boxed{77}.").correct
        assert not task.verify(problem, problem.prompt).correct
        assert task.verify(problem, task.solve_row(row)).correct
    assert task[0].id == f"{name}/{name}.jsonl/test/0"


def test_answers_of_aime_are_whole_numbers(data):
    task = make_task("aime24", data("aime24"), "test")
    assert [task[i].answer for i in range(3)] == ["0", "25", "999"]
    assert task.verify(task[1], r"\boxed{25}").correct and task.verify(task[1], r"\boxed{025}").correct


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("math500", {"problem": "a"}, "answer"),
        ("math500", {"question": "a", "answer": "1"}, "problem"),
        ("math500", {"problem": "a", "answer": None}, "`answer` text or a number"),
        ("math500", {"problem": "a", "answer": " "}, "`answer` text or a number"),
        ("math500", {"problem": None, "answer": "1"}, "`problem` must be text"),
        ("math500", "a", ""),
        ("aime24", {"problem": "a", "answer": "1000"}, "'1000' is not a whole number from 0 to 999"),
        ("aime24", {"problem": "a", "answer": -1}, "'-1' is not a whole number from 0 to 999"),
        ("aime25", {"problem": "a", "answer": r"\frac{1}{2}"}, "is not a whole number"),
    ],
)
def test_row_that_is_no_problem(name, row, reason, tmp_path):
    task = make_task(name, write(tmp_path / "a.jsonl", [*ROWS[name], row]))
    assert task[0]
    message = error_of(ValueError, lambda: task[len(ROWS[name])])
    assert f"row {len(ROWS[name])}: not a {name} problem" in message and reason in message
    assert message.endswith(f"a row needs {task.columns}.")


# Benchmarks without embedded problems


@pytest.mark.parametrize("name", BENCHMARKS)
def test_no_embedded_problems(name):
    options = {"allow_code_execution": TASKS[name].runs_code}
    assert not issubclass(TASKS[name], GeneratedTask)
    for dataset in (None, "embedded"):
        message = error_of(ValueError, make_task, name, dataset, "test", **options)
        assert message.startswith(f"dataset='embedded': {name} has no embedded problems; give dataset='hub' (")
        assert TASKS[name].hub_id in message and TASKS[name].columns in message


@pytest.mark.parametrize("form", ["", "-TopK", "-Threshold", "-Position"])
@pytest.mark.parametrize("id", ["MATH500", "AIME24", "AIME25", "HumanEval", "MBPP"])
def test_the_ids_say_how_to_give_the_data(id, form):
    message = error_of(ValueError, gym.make, f"MaskedDiffusion-{id}{form}-v0", allow_code_execution=True)
    assert "no embedded problems; give dataset='hub'" in message and "a denoiser that can read them" in message


@pytest.mark.parametrize("id", ["MATH500", "AIME24", "AIME25", "HumanEval"])
def test_benchmarks_are_made_with_the_problems_that_they_have(id):
    assert gym.spec(f"MaskedDiffusion-{id}-v0").kwargs["split"] == "test"
    assert gym.spec(f"MaskedDiffusion-{id}-TopK-v0").kwargs["split"] == "test"
    name = gym.spec(f"MaskedDiffusion-{id}-v0").kwargs["task"]
    message = error_of(ValueError, make_task, name, "hub", "train", allow_code_execution=True)
    assert message.startswith(f"split='train': {TASKS[name].hub_id} is a benchmark and has 'test' only")


# Prompts


def test_default_prompts_ask_for_the_answer_that_is_read(data):
    forms = {"gsm8k": "#### N", "math500": "\\boxed{}", "countdown": "<answer>", "sudoku": "<answer>"}
    for name, form in forms.items():
        task = make_task(name, data(name))
        question, _ = task.read_row(task.rows[0])
        assert form not in question
        assert task[0].prompt == task.template.replace(QUESTION, question) and form in task[0].prompt


def test_embedded_prompts_are_what_they_were():
    prompts = {name: make_task(name, split="test")[0].prompt for name in ("gsm8k", "countdown", "sudoku")}
    assert prompts == {
        "gsm8k": "one shelf holds 18 pens , the next 5 and the last 12 . how many pens in all ?",
        "countdown": "make 22 from 5 5 3 :",
        "sudoku": "sudoku 1 0 3 4 0 0 2 1 0 0 4 0 2 4 1 3 :",
    }


def test_prompt_template(data, tmp_path):
    path = template(tmp_path, "{x} \\boxed{a} Q: {question}\nagain {question}\nA:\n\n")
    task = make_task("gsm8k", data("gsm8k"), prompt_template=path)
    assert task[1].prompt == "{x} \\boxed{a} Q: What is 1 + 1?\nagain What is 1 + 1?\nA:"
    assert task[1].answer == "2"
    assert make_task("gsm8k", data("gsm8k"))[1].prompt != task[1].prompt, "the class keeps its own"


@pytest.mark.parametrize(
    ("content", "kind", "reason"),
    [
        (b"Q: question", ValueError, "must have {question}"),
        (b"", ValueError, "must have {question}"),
        (b"\xff {question}", ValueError, "not UTF-8"),
        (None, FileNotFoundError, "no such file"),
    ],
)
def test_bad_prompt_template(content, kind, reason, data, tmp_path):
    path = tmp_path / "template.txt"
    if content is not None:
        path.write_bytes(content)
    message = error_of(kind, make_task, "gsm8k", data("gsm8k"), prompt_template=str(path))
    assert message.startswith(f"prompt_template={str(path)!r}: ") and reason in message


def test_few_shot_prompts(data, tmp_path):
    path = template(tmp_path, "Q: {question}\nA:")
    task = make_task("gsm8k", data("gsm8k"), "test", prompt_template=path, few_shot=2)
    shots = [f"Q: What is {i} + {i}?\nA:\nso\n#### {2 * i}\n\n" for i in range(3)]
    assert task[5].prompt == f"{shots[0]}{shots[1]}Q: What is 5 + 5?\nA:"
    assert task[0].prompt == f"{shots[1]}{shots[2]}Q: What is 0 + 0?\nA:"
    assert task[1].prompt == f"{shots[0]}{shots[2]}Q: What is 1 + 1?\nA:"
    assert make_task("gsm8k", data("gsm8k"), "test", prompt_template=path)[5].prompt == "Q: What is 5 + 5?\nA:"


def test_no_problem_is_shown_its_own_solution(tmp_path):
    rows = ROWS["gsm8k"][:2] * 2 + ROWS["gsm8k"][2:3]  # the same question twice
    task = make_task("gsm8k", write(tmp_path / "a.jsonl", rows), few_shot=2)
    for index, row in enumerate(rows):
        prompt = task[index].prompt
        assert prompt.count("What is") == 3 and prompt.count(row["question"]) == 1
        assert row["answer"].partition(">>")[2] not in prompt
    message = error_of(ValueError, make_task, "gsm8k", write(tmp_path / "b.jsonl", rows), few_shot=3)
    assert message.startswith("few_shot=3: must be 0 to 2, dataset=") and "has 3 problems" in message


@pytest.mark.parametrize("name", ROWS)
def test_worked_examples_are_right(name, data):
    task = make_task(name, data(name), allow_code_execution=TASKS[name].runs_code)
    for index, row in enumerate(task.rows):
        assert task.verify(task[index], task.solve_row(row)).correct


def test_countdown_examples_are_found_or_refused(tmp_path):
    task = Countdown(write(tmp_path / "a.jsonl", [{"nums": [1, 1, 1], "target": 100}]))
    with pytest.raises(ValueError, match=r"no expression of \[1, 1, 1\] equals 100"):
        task.solve_row(task.rows[0])
    for numbers, target in ([3, 3, 8, 8], 24), ([1, 5, 5, 5], 24), ([25, 50, 75, 100], -100):
        answer = task.solve_row({"nums": numbers, "target": target})
        assert task.verify(Problem("", "", (tuple(numbers), target)), answer).correct


@pytest.mark.parametrize(
    ("count", "reason"),
    [(-1, "few_shot=-1: must be 0 or more"), (6, "few_shot=6: must be 0 to 5"), (99, "must be 0 to 5")],
)
def test_bad_few_shot(count, reason, data):
    message = error_of(ValueError, make_task, "gsm8k", data("gsm8k"), few_shot=count)
    assert reason in message
    assert make_task("gsm8k", data("gsm8k"), few_shot=5)[0].prompt.count("What is") == 6


def test_few_shot_names_the_row_that_has_no_solution(tmp_path):
    path = write(tmp_path / "a.jsonl", [ROWS["gsm8k"][0], {"question": "b"}, *ROWS["gsm8k"][1:]])
    message = error_of(ValueError, make_task, "gsm8k", path, few_shot=1)
    assert "row 1: not a gsm8k problem" in message


@pytest.mark.parametrize("options", [{"few_shot": 2}, {"few_shot": -1}, {"prompt_template": "nowhere.txt"}])
@pytest.mark.parametrize("name", ["gsm8k", "oracle"])
def test_embedded_problems_have_their_own_prompts(name, options):
    (given, value) = next(iter(options.items()))
    message = error_of(ValueError, make_task, name, **options)
    assert message.startswith(f"{given}={value!r}: is for real data, embedded problems have their own prompts")


def test_a_task_without_worked_solutions(tmp_path):
    class Plain(Task):
        name, columns = "plain", "`q`"

        def read_row(self, row):
            return row["q"], None

        def verify(self, problem, completion):
            return Verdict(False, 0.0, None)

    path = write(tmp_path / "a.jsonl", [{"q": "why?"}, {"q": "how?"}])
    assert Plain(path)[0].prompt == "why?"
    assert "must be 0, plain has no worked solutions" in error_of(ValueError, Plain, path, few_shot=1)
    assert "must be 0 or more" in error_of(ValueError, Plain, path, few_shot=-1)
    message = error_of(ValueError, Plain)
    assert "plain has no embedded problems; give dataset=the path of a local" in message


# The hub, as far as it can be had without one


@pytest.fixture
def hub(monkeypatch):
    """A hub of two splits; what is asked of it."""
    asked = []

    def load(hub_id, config, split):
        asked.append((hub_id, config, split))
        rows = {"train": ROWS["gsm8k"][:3], "test": ROWS["gsm8k"][3:]}
        return rows[split]

    monkeypatch.setattr("dllm_gym.tasks.base.load_hub", load)
    return asked


def test_examples_come_from_the_training_split_of_the_tasks_own_set(hub):
    task = make_task("gsm8k", "hub", "test", few_shot=2)
    assert hub == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train")]
    assert re.findall(r"What is (\d)", task[0].prompt) == ["0", "1", "3"]
    hub.clear()
    train = make_task("gsm8k", "hub", "train", few_shot=2)
    assert hub == [("openai/gsm8k", "main", "train")]
    assert re.findall(r"What is (\d)", train[0].prompt) == ["1", "2", "0"]


def test_another_set_is_loaded_as_it_is(hub):
    task = make_task("gsm8k", "someone/else-v1.1", "test", few_shot=2)
    assert hub == [("someone/else-v1.1", None, "test")]
    assert re.findall(r"What is (\d)", task[0].prompt) == ["4", "5", "3"]


def test_the_one_split_of_a_benchmark_may_have_another_name(monkeypatch):
    asked = []
    monkeypatch.setattr("dllm_gym.tasks.base.load_hub", lambda *args: asked.append(args) or ROWS["aime24"])
    task = make_task("aime24", "hub", "test", few_shot=1)
    assert asked == [("HuggingFaceH4/aime_2024", None, "train")]
    assert "Find 25." in task[0].prompt and task[0].prompt.rstrip().endswith("\\boxed{}.")


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path):
    """A server that takes the connection and says nothing: `datasets` alone would try for minutes."""
    code = """
import dllm_gym, datasets
from dllm_gym.tasks import files
files.HUB_TIMEOUT = 0.5
try:
    dllm_gym.make_task("math500", "hub", "test")
except RuntimeError as error:
    print(datasets.config.HF_HUB_OFFLINE, error)
"""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        silent.setblocking(False)
        asked = []
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = silent.accept()
                asked.append(connection.recv(1000))
                connection.close()
    assert sum(b"HuggingFaceH4/MATH-500" in request for request in asked) == 1
    assert done.stdout.startswith("False dataset='HuggingFaceH4/MATH-500' could not be loaded ("), done.stderr
    assert "Give the path of a local .jsonl, .csv or .parquet file with `problem` and `answer`" in done.stdout


def test_offline_mode_is_as_it_was(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match="could not be loaded"):
        make_task("aime25", "nobody/nothing", "test")
    assert datasets.config.HF_HUB_OFFLINE is True


# In environments and commands


@pytest.fixture(scope="module", params=[write_llada, write_dream], ids=["llada", "dream"])
def checkpoint(request, tmp_path_factory) -> str:
    long = {"max_sequence_length": 4096} if request.param is write_llada else {"max_position_embeddings": 4096}
    return str(request.param(tmp_path_factory.mktemp("checkpoint"), **long))


def play(id: str, **settings) -> tuple[str, dict]:
    env = gym.make(id, **settings)
    observation, first = env.reset(seed=0, options={"problem": 1})
    terminated = False
    while not terminated:
        observation, reward, terminated, _, info = env.step(observation["eligible"])
    assert reward == info["score"] * (env.action_space.n - info["nfe"] + 1) / env.action_space.n
    return first["prompt"], info


@pytest.mark.parametrize(("id", "name"), [("GSM8K", "gsm8k"), ("MATH500", "math500"), ("AIME24", "aime24")])
def test_a_tiny_checkpoint_plays(id, name, checkpoint, data, tmp_path):
    options = {"prompt_template": template(tmp_path, "Q: {question}\nA:"), "few_shot": 1}
    settings = {"denoiser": checkpoint, "dataset": data(name), "gen_length": 32, "block_length": 16}
    prompt, info = play(f"MaskedDiffusion-{id}-v0", **settings)
    assert prompt == make_task(name, data(name))[1].prompt
    assert isinstance(info["completion"], str) and not info["correct"]
    prompt, _ = play(f"MaskedDiffusion-{id}-v0", **settings, **options)
    assert prompt == make_task(name, data(name), **options)[1].prompt and prompt.count("Q: ") == 2


def test_a_right_completion_is_paid(checkpoint, data, monkeypatch):
    monkeypatch.setattr("dllm_gym.decoding.completions", lambda *args: [list(b"\\boxed{-2, 2}")])
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.decode", lambda self, ids, **options: bytes(ids).decode())
    settings = {"denoiser": checkpoint, "dataset": data("math500"), "gen_length": 16}
    _, info = play("MaskedDiffusion-MATH500-v0", **settings)
    assert info["correct"] and info["score"] == 1 and info["completion"] == "\\boxed{-2, 2}"


def test_options_reach_the_environments(checkpoint, data, tmp_path):
    options = {"prompt_template": template(tmp_path, "Q: {question}\nA:"), "few_shot": 2}
    settings = {"denoiser": checkpoint, "dataset": data("gsm8k"), "gen_length": 16}
    wanted = make_task("gsm8k", data("gsm8k"), **options)[4].prompt
    rows = gym.make_vec("MaskedDiffusion-GSM8K-v0", num_envs=2, **settings, **options)
    assert rows.unwrapped.episodes.task[4].prompt == wanted
    form = gym.make("MaskedDiffusion-GSM8K-TopK-v0", **settings, **options)
    assert form.reset(options={"problem": 4})[1]["prompt"] == wanted
    config = EnvConfig(num_envs=2, **settings, **options)
    assert make_env(config, "test").unwrapped.episodes.task[4].prompt == wanted


def test_a_task_given_has_its_own_prompts(checkpoint, data):
    task = make_task("gsm8k", data("gsm8k"), few_shot=1)
    settings = {"task": task, "denoiser": checkpoint, "gen_length": 16}
    prompt = gym.make("MaskedDiffusion-GSM8K-v0", **settings).reset(options={"problem": 4})[1]["prompt"]
    assert prompt == task[4].prompt
    for given in {"few_shot": 2}, {"prompt_template": "a.txt"}:
        message = error_of(ValueError, gym.make, "MaskedDiffusion-GSM8K-v0", **settings, **given)
        assert "the Task given writes its own prompts" in message and next(iter(given)) in message


def test_prompts_that_do_not_fit_are_refused(data, tmp_path):
    folder = str(write_llada(tmp_path / "checkpoint"))  # a context of 512
    settings = {"denoiser": folder, "dataset": data("gsm8k"), "gen_length": 16}
    assert gym.make("MaskedDiffusion-GSM8K-v0", **settings)
    message = error_of(ValueError, gym.make, "MaskedDiffusion-GSM8K-v0", **settings, few_shot=4)
    assert "prompt tokens and gen_length=16 exceed the denoiser's context of 512 tokens" in message


@pytest.mark.parametrize("id", ["GSM8K", "MATH500"])
def test_evaluation_from_the_command_line(id, checkpoint, data, tmp_path, capsys):
    flags = (
        f"--env.id MaskedDiffusion-{id}-v0 --env.gen-length 16 --env.num-envs 2 --problems 2 --env.few-shot 2".split()
    )
    flags += ["--env.denoiser", checkpoint, "--env.dataset", data(id.lower()), "--sampler", "confidence:k=8"]
    flags += ["--env.prompt-template", template(tmp_path, "{question} \\boxed{}?")]
    assert evaluate([*flags, "--output", str(tmp_path / "out.jsonl")]) == 0
    assert re.search(r'few_shot": 2\b', (tmp_path / "out.jsonl").read_text())
    assert evaluate([*flags, "--env.few-shot", "99"]) == 2
    assert "error: few_shot=99: must be 0 to" in capsys.readouterr().err


def test_real_gsm8k_with_worked_examples():
    path = DATA / "gsm8k_train_sample.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path.name}")
    task = make_task("gsm8k", str(path), "test", few_shot=4)
    for index in range(len(task)):
        prompt = task[index].prompt
        assert "<<" not in prompt and prompt.count("\n#### ") == 4 + 5 and prompt.count("#### N") == 5
        assert prompt.endswith("#### N") and task.rows[index]["question"] in prompt.split("\n\n")[-2]


# The documentation's example


def test_a_task_of_ones_own(tmp_path, monkeypatch, capsys):
    write(tmp_path / "capitals.jsonl", [{"country": c, "capital": c[::-1]} for c in ("Peru", "Mali", "Oman", "Iran")])
    write_llada(tmp_path / "GSAI-ML" / "LLaDA-8B-Instruct")  # a folder comes before a hub id of the same name
    monkeypatch.chdir(tmp_path)
    registry = dict(gym.registry)
    for module in (gym, gym.envs.registration):
        monkeypatch.setattr(module, "registry", registry)
    monkeypatch.setattr("dllm_gym.tasks.TASKS", dict(TASKS))
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.S)
    assert len(code) == 2
    small = "iterations=1, problems=1, group=2, experts=(), inner_iterations=1, report=ReportConfig(enabled=False)"
    assert code[1].count("GRPOConfig(env=env)") == 1
    code[1] = code[1].replace("GRPOConfig(env=env)", f"GRPOConfig(env=replace(env, gen_length=4), {small})")
    names = {"ReportConfig": ReportConfig, "replace": replace}
    for block in code:
        exec(block, names)
    shown = capsys.readouterr().out
    assert shown.count("What is the capital of") == 3 and "Answer with its name alone.\nureP\n" in shown
    task = names["task"]
    assert task.verify(task[1], " ilaM.") == Verdict(True, 1.0, "ilaM") and not task.verify(task[1], "Mali").correct
    config = EnvConfig(
        "MaskedDiffusion-Capitals-v0", denoiser="GSAI-ML/LLaDA-8B-Instruct", dataset="capitals.jsonl", num_envs=2
    )
    assert make_env(config).unwrapped.episodes.task[0].prompt.startswith("What is the capital of Peru?")
