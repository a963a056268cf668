"""Several tasks as one."""

import json
from collections import Counter

import gymnasium as gym
import numpy as np
import pytest

from dllm_gym import make_task
from dllm_gym.agents.cli import main as train
from dllm_gym.eval.cli import main as evaluate
from dllm_gym.tasks.mixture import Mixture, task_of

MIXTURE = ["--env.id", "MaskedDiffusion-Mixture-v0", "--env.num-envs", "8"]


@pytest.mark.parametrize(
    "mix",
    [
        {"gsm8k": 2, "countdown": 1},
        "gsm8k:2,countdown:1",
        "GSM8K:2, Countdown",
        "MaskedDiffusion-GSM8K-v0:2,MaskedDiffusion-Countdown-v0:1",
    ],
)
def test_proportions_and_problems(mix):
    task = make_task(mix)
    alone = {name: make_task(name) for name in ("gsm8k", "countdown")}
    assert task.parts == ("gsm8k", "countdown") and task.gen_length == 24
    for start in (0, 1, 7):
        counts = Counter(task_of(task[i].id) for i in range(start, start + 30))
        assert counts == {"gsm8k": 20, "countdown": 10}
    ids = [task[i].id for i in range(300)]
    assert len(set(ids)) == 300
    for name, whole in alone.items():
        own = [problem_id for problem_id in ids if task_of(problem_id) == name]
        assert own == [whole[i].id for i in range(len(own))]


def test_it_ends_with_the_task_that_ends_first_and_no_problem_comes_twice():
    tasks = [make_task("gsm8k", split="test"), make_task("countdown", split="test")]
    assert len(Mixture(tasks, [3, 1])) == 4 * (10_000 // 3)
    task = Mixture(tasks)
    assert len(task) == 20_000
    task[len(task) - 1]
    with pytest.raises(IndexError, match=r"problem 20000: mixture \(embedded, test\) has 0 to 19999"):
        task[len(task)]


def test_each_problem_is_judged_by_its_own_task():
    task = make_task(["gsm8k", "countdown"])
    for i in range(6):
        problem = task[i]
        own = make_task(task_of(problem.id))
        completion = own.example(i // 2, np.random.default_rng(0))[1]
        assert task.verify(problem, completion).correct
        assert not task.verify(task[i + 1], completion).correct


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("gsm8k,sudoku", r"gsm8k 24, sudoku 16 cannot share a canvas: completions of sudoku have exactly 16 tokens"),
        (["gsm8k"], r"a mixture needs two or more different tasks"),
        ("gsm8k:1,gsm8k:2", r"gsm8k is there twice"),
        ("gsm8k,GSM8K", r"two or more different tasks"),
        ("gsm8k:x,countdown", r"the weight 'x' of gsm8k must be a whole number"),
        ("gsm8k:0,countdown", r"the weights \[0, 1\] must be whole numbers of 1 or more"),
        ({"gsm8k": 0.5, "countdown": 1}, r"the weights \[0.5, 1\]"),
        ("gsm8,countdown", r"task='gsm8': must be one of .* Did you mean 'gsm8k'\?"),
        ("gsm8k:2000000,countdown", r"ask for more problems than there are"),
    ],
)
def test_what_cannot_be_mixed(mix, message):
    with pytest.raises(ValueError, match=message):
        make_task(mix)


def test_a_file_cannot_be_the_data_of_two_tasks(tmp_path):
    with pytest.raises(ValueError, match=r"dataset='rows.jsonl': the tasks of a mixture need sets of their own"):
        make_task("gsm8k,countdown", "rows.jsonl")


def test_sudoku_mixes_with_what_is_not_longer():
    assert make_task("sudoku,countdown").gen_length == 16


def test_in_gym_make():
    env = gym.make("MaskedDiffusion-Mixture-v0", task={"countdown": 1, "gsm8k": 3})
    assert env.action_space.n == 24
    seen = Counter(task_of(env.reset(options={"problem": i})[1]["problem_id"]) for i in range(8))
    assert seen == {"countdown": 2, "gsm8k": 6}


def test_figures_of_each_task_in_a_table(tmp_path, capsys):
    output = tmp_path / "results.jsonl"
    flags = ["--env.mix", "gsm8k:1,countdown:3", "--problems", "40", "--sampler", "confidence", "--output", str(output)]
    assert evaluate([*MIXTURE, *flags]) == 0
    shown = capsys.readouterr().out
    problems = [json.loads(line) for line in output.read_text().splitlines()]
    problems = [line for line in problems if line["kind"] == "problem"]
    for name, count in (("gsm8k", 10), ("countdown", 30)):
        own = [line["correct"][0] for line in problems if task_of(line["problem_id"]) == name]
        assert len(own) == count and f"{name} {100 * sum(own) / count:.1f} % [" in shown


@pytest.mark.parametrize(
    "flags",
    [
        ["grpo", "--group", "2", "--problems", "4", "--experts", "0.5"],
        ["ppo", "--episodes", "8", "--epochs", "1"],
        ["espo", "--group", "2", "--problems", "4", "--env.temperature", "1"],
    ],
)
def test_metrics_of_each_task(flags, tmp_path, capsys):
    report = ["--report.problems", "8"]
    if flags[0] != "espo":
        report += ["--report.validation-problems", "8", "--report.no-heuristics", "--report.thresholds", "0.5"]
    flags = [*flags, *MIXTURE, "--iterations", "2", *report, "--run-dir", str(tmp_path / "run")]
    assert train(flags) == 0
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        parts = [row[f"reward/{name}"] for name in ("gsm8k", "countdown") if f"reward/{name}" in row]
        assert parts and min(parts) - 1e-6 <= row["reward"] <= max(parts) + 1e-6
    assert "gsm8k" in capsys.readouterr().out


def test_a_mix_is_for_the_mixture(capsys):
    assert evaluate(["--env.mix", "gsm8k,countdown", "--sampler", "random"]) == 2
    assert "env.mix='gsm8k,countdown': is for --env.id MaskedDiffusion-Mixture-v0" in capsys.readouterr().err
