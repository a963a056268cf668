"""Tasks: embedded problems, their splits and demonstrations, and data from files and from the hub."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from dllm_gym import make_task
from dllm_gym.tasks.gsm8k import ITEMS, NAMES, STORIES
from dllm_gym.types import Problem

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
NAMES_OF_TASKS = ("gsm8k", "countdown", "sudoku")

GRID, PUZZLE = "4321124334122134", "0320004330100004"
GSM8K_ROW = {"question": "How many is 1000 + 234?", "answer": "<<1000+234=1234>>\nso 1234\n#### 1,234"}
ROWS = [
    # task, row, answer of the problem, a right completion, a wrong one
    ("gsm8k", GSM8K_ROW, "1234", "#### 1234", "#### 1233"),
    ("countdown", {"nums": [12, 9, 3], "target": 6}, ((12, 9, 3), 6), "12 - 9 + 3", "12 - 9 - 3"),
    ("countdown", {"input": "12,9,3", "output": "6"}, ((12, 9, 3), 6), "12 - 9 + 3", "12 - 9 - 3"),
    ("sudoku", {"Puzzle": PUZZLE, "Solution": GRID}, PUZZLE, GRID, PUZZLE),
]


def write(path: Path, rows: list[dict]) -> str:
    """A data file in the form that its name ends in."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# Embedded problems


def gsm8k_content(problem: Problem) -> tuple:
    """The signed sum behind a story, read from its text."""
    blank = {word: "_" for word in NAMES + ITEMS}
    skeletons = {}
    for form, stories in STORIES.items():
        for story in stories:
            skeletons[story.format_map({key: "_" for key in (*"abcdxyz", "item")})] = form
    words = problem.prompt.split()
    form = skeletons[" ".join("_" if word.isdigit() else blank.get(word, word) for word in words)]
    numbers = (int(word) for word in words if word.isdigit())
    return tuple(sorted((part[0], *(next(numbers) for _ in part.split("*"))) for part in form.split()))


CONTENT = {
    "gsm8k": gsm8k_content,
    "countdown": lambda problem: (tuple(sorted(problem.answer[0])), problem.answer[1]),
    "sudoku": lambda problem: problem.answer,
}


@pytest.mark.parametrize("name", NAMES_OF_TASKS)
def test_train_and_test_are_disjoint_in_content(name):
    train, test = (
        {CONTENT[name](problem) for problem in map(make_task(name, split=split).__getitem__, range(size))}
        for split, size in (("train", 4000), ("test", 600))
    )
    assert len(train) > 2000 and len(test) > 300
    assert not train & test


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", NAMES_OF_TASKS)
def test_an_index_is_always_the_same_problem(name, split):
    task, again = make_task(name, split=split), make_task(name, "embedded", split)
    indices = [0, 1, 7, len(task) - 1]
    problems = [task[i] for i in indices]
    assert problems == [again[i] for i in indices[::-1]][::-1]
    assert problems == [again.example(i, np.random.default_rng(i))[0] for i in indices]
    assert [problem.id for problem in problems] == [f"{name}/embedded/{split}/{i}" for i in indices]
    assert len({problem.prompt for problem in problems}) == 4
    assert task[np.int64(7)] == task[7]


@pytest.mark.parametrize("name", NAMES_OF_TASKS)
def test_demonstrations_are_right_and_fit(name):
    rng = np.random.default_rng(1)
    longest = 0
    for split in ("train", "test"):
        task = make_task(name, split=split)
        for index in range(300):
            problem, completion = task.example(index, rng)
            verdict = task.verify(problem, completion)
            assert verdict.correct and verdict.score == 1, (problem, completion)
            longest = max(longest, len(completion.split()))
    assert longest <= task.gen_length <= 1.5 * longest


@pytest.mark.parametrize(("name", "fewest", "share"), [("gsm8k", 3, 1.0), ("countdown", 2, 0.7), ("sudoku", 1, 1.0)])
def test_one_problem_has_several_demonstrations(name, fewest, share):
    task, rng = make_task(name), np.random.default_rng(2)
    kinds = [len({task.example(index, rng)[1] for _ in range(40)}) for index in range(50)]
    assert np.mean([n >= fewest for n in kinds]) >= share
    assert name != "sudoku" or max(kinds) == 1


def test_gsm8k_demonstrations_differ_in_order_and_not_in_wording_alone():
    task, rng = make_task("gsm8k"), np.random.default_rng(3)
    orders = []
    for index in range(50):
        texts = [task.example(index, rng)[1].split() for _ in range(40)]
        orders.append(len({tuple(word for i, word in enumerate(text) if text[i - 1] == "=") for text in texts}))
    assert np.mean([n >= 2 for n in orders]) > 0.8, "orders reach different numbers in between"


@pytest.mark.parametrize("name", NAMES_OF_TASKS)
def test_verdicts_of_another_problems_demonstration(name):
    task, rng = make_task(name), np.random.default_rng(4)
    others = [task.verify(task[index], task.example(index + 1, rng)[1]).correct for index in range(200)]
    assert np.mean(others) < 0.15


@pytest.mark.parametrize("name", NAMES_OF_TASKS)
def test_the_denoiser_can_read_and_write_the_embedded_problems(name, embedded):
    task, rng, tokenizer = make_task(name), np.random.default_rng(5), embedded.tokenizer
    for index in range(200):
        problem, completion = task.example(index, rng)
        prompt, answer = (tokenizer(text)["input_ids"] for text in (problem.prompt, completion))
        assert tokenizer.unk_token_id not in prompt + answer
        assert len(answer) <= task.gen_length and len(prompt) + task.gen_length <= embedded.context_length
        assert tokenizer.decode(answer).split() == completion.split()


# Names and indices


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("chess",),
            r"task='chess': must be one of \['aime24', 'aime25', 'countdown', 'gsm8k', 'humaneval', 'math500'",
        ),
        (("gsm8k", None, "validation"), r"split='validation': must be 'train' or 'test'"),
        (("sudoku", "hub"), r"dataset='hub': there is no standard sudoku set.*`Puzzle`"),
        (("gsm8k", "problems.txt"), r"dataset='problems.txt': a local file must be .jsonl, .csv or .parquet"),
    ],
)
def test_unknown_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_task(*arguments)


@pytest.mark.parametrize("index", [-1, 10_000])
def test_index_out_of_range(index):
    with pytest.raises(IndexError, match=rf"problem {index}: countdown \(embedded, test\) has 0 to 9999"):
        make_task("countdown", split="test")[index]


def test_split_sizes():
    assert [len(make_task("sudoku", split=split)) for split in ("train", "test")] == [1_000_000, 10_000]


# Local files


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize(("name", "row", "answer", "right", "wrong"), ROWS)
def test_local_file(name, row, answer, right, wrong, suffix, tmp_path):
    path = write(tmp_path / f"mine{suffix}", [row, row | {"extra": "é"}] if suffix == ".jsonl" else [row, row])
    task = make_task(name, path, "test")
    assert len(task) == 2 and task.dataset == path
    problem = task[1]
    assert problem.id == f"{name}/mine{suffix}/test/1" and problem.answer == answer
    assert ("[12, 9, 3]" if name == "countdown" else next(iter(row.values()))) in problem.prompt
    assert task.verify(problem, right).correct and not task.verify(problem, wrong).correct
    with pytest.raises(IndexError, match=r"problem 2: .* has 0 to 1"):
        task[2]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"\ufeff\n{json.dumps(GSM8K_ROW)}\n\n", encoding="utf-8")
    (tmp_path / "a.csv").write_text(f"\ufeffPuzzle,Solution\n{PUZZLE},{GRID}\n", encoding="utf-8")
    for name, file, answer in (("gsm8k", "a.jsonl", "1234"), ("sudoku", "a.csv", PUZZLE)):
        task = make_task(name, str(tmp_path / file))
        assert len(task) == 1 and task[0].answer == answer


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.jsonl", b'{"question": "a", "answer": "#### 1"}\n\n{"question": \n', "line 3: not JSON"),
        ("a.jsonl", b'{"question": "a", "answer": "#### 1"}\n{"question": "\xff"}\n', "not UTF-8"),
        ("a.csv", b"question,answer\na\xff,#### 1\n", "not UTF-8"),
        ("a.csv", b"question,answer\na," + b"1" * 200_000 + b"\n", "line 2: not CSV"),
        ("a.parquet", b"question,answer\n", "not a parquet file"),
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b"\n \n", "no rows"),
        ("a.csv", b"", "no rows"),
        ("a.csv", b"question,answer\n", "no rows"),
        ("a.txt", b"question", r"must be \.jsonl, \.csv or \.parquet"),
        ("a", b"question", r"must be \.jsonl, \.csv or \.parquet"),
    ],
)
def test_broken_file(file, content, message, tmp_path):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"dataset='.*/{file}'.*{message}"):
        make_task("gsm8k", str(tmp_path / file))


def test_empty_parquet_file(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"Puzzle": []}), path)
    with pytest.raises(ValueError, match=r"dataset='.*/a\.parquet': no rows"):
        make_task("sudoku", str(path))


@pytest.mark.parametrize("file", ["nowhere.jsonl", "nowhere.csv", "nowhere.parquet"])
def test_file_that_is_not_there(file):
    with pytest.raises(FileNotFoundError, match=f"dataset='{file}': no such file"):
        make_task("gsm8k", file)


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("gsm8k", {"question": "a"}, "answer"),
        ("gsm8k", {"answer": "#### 1"}, "question"),
        ("gsm8k", {"question": "a", "answer": "1"}, "no '####'"),
        ("gsm8k", {"question": "a", "answer": 1}, "rpartition"),
        ("countdown", {"nums": [1, 2]}, "target"),
        ("countdown", {"input": "1,2"}, "output"),
        ("countdown", {"target": 3}, "input"),
        ("countdown", {"nums": "1 2", "target": 3}, ""),
        ("countdown", {"input": "1,two", "output": "3"}, "two"),
        ("sudoku", {"puzzle": PUZZLE}, "Puzzle"),
        ("sudoku", {"Puzzle": PUZZLE[1:]}, "16 digits"),
        ("sudoku", {"Puzzle": PUZZLE[:-1] + "5"}, "16 digits"),
        ("sudoku", {"Puzzle": int(GRID)}, ""),
        ("sudoku", [PUZZLE], ""),
    ],
)
def test_row_that_is_no_problem(name, row, reason, tmp_path):
    good = next(row for task, row, *_ in ROWS if task == name)
    task = make_task(name, write(tmp_path / "a.jsonl", [good, row]))
    assert task[0]
    with pytest.raises(ValueError, match=rf"a\.jsonl', row 1: not a {name} problem .*{reason}") as caught:
        task[1]
    assert str(caught.value).endswith(f"a row needs {task.columns}.")


def test_short_line_of_a_csv_file(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\na,#### 1\nb\n")
    task = make_task("gsm8k", str(tmp_path / "a.csv"))
    with pytest.raises(ValueError, match=r"a\.csv', row 1: not a gsm8k problem.*`question` and `answer`"):
        task[1]


# Real data


def sample(name: str, file: str):
    if not (DATA / file).is_file():
        pytest.skip(f"no {file}")
    task = make_task(name, str(DATA / file))
    return task, task.rows


def test_real_gsm8k():
    task, rows = sample("gsm8k", "gsm8k_train_sample.jsonl")
    assert len(task) == 300
    for index, row in enumerate(rows):
        assert task.verify(task[index], row["answer"]).correct
        assert task[index].prompt == task.template.replace("{question}", row["question"])


def test_real_countdown():
    task, _ = sample("countdown", "countdown_sample.jsonl")
    assert len(task) == 64 and task[0].answer == ((30, 100, 93), 23)
    assert all(len(numbers) == 3 and target > 0 for numbers, target in (task[i].answer for i in range(64)))
    assert task.verify(task[0], "<answer>30 - (100 - 93)</answer>").correct


def test_real_sudoku():
    task, rows = sample("sudoku", "sudoku4x4_sample.csv")
    assert len(task) == 100
    for index, row in enumerate(rows):
        assert task.verify(task[index], row["Solution"]).correct
        assert not task.verify(task[index], row["Solution"][1:] + row["Solution"][0]).correct


# The hub


def test_hub_sets_that_cannot_be_reached_say_how_to_give_them(tmp_path):
    code = """
import dllm_gym
for name, dataset in [("gsm8k", "hub"), ("countdown", "hub"), ("gsm8k", "nobody/nothing"), ("gsm8k", "nobody/v1.1")]:
    for split in ("train", "test"):
        try:
            print(dllm_gym.make_task(name, dataset, split))
        except RuntimeError as error:
            print(error)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_DATASETS_CACHE": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    assert len(lines) == 8, run.stderr
    ids = ("openai/gsm8k", "Jiayi-Pan/Countdown-Tasks-3to4", "nobody/nothing", "nobody/v1.1")
    for dataset, *both in zip(ids, lines[::2], lines[1::2], strict=True):
        for line in both:
            assert line.startswith(f"dataset='{dataset}' could not be loaded (")
            assert "dataset='embedded'" in line and ".jsonl, .csv or .parquet file with `" in line
