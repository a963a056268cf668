"""The verifiers of numbers, Countdown and Sudoku on right, wrong, malformed and hostile text."""

import json
from pathlib import Path

import numpy as np
import pytest

from dllm_gym.tasks.countdown import Countdown
from dllm_gym.tasks.gsm8k import GSM8K
from dllm_gym.tasks.sudoku import Sudoku
from dllm_gym.types import Problem, Verdict
from dllm_gym.verify.arithmetic import evaluate, verify_countdown, verify_number
from dllm_gym.verify.sudoku import verify_sudoku

DATA = Path(__file__).parents[2] / "shared" / "data"
PUZZLE, SOLUTION = "4320004330100004", "4321124334122134"
ARABIC, FULL_WIDTH = str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩"), str.maketrans("0123456789", "０１２３４５６７８９")

HOSTILE = [
    "",
    "\0",
    "\ud800",
    "9**9**9**9",
    "(" * 10_000,
    "(" * 10_000 + "1" + ")" * 10_000,
    "(" * 400 + "12" + ")" * 400,
    "(" * 30 + "9 + 9" + ")" * 30,
    "1" * 1_000_000,
    " " * 1_000_000,
    "-" * 19_000,
    "#" * 100_000,
    "#### " * 100_000,
    "<answer>" * 100_000,
    "\\boxed{" * 100_000,
    "\\frac{" * 10_000 + "1" + "}{1}" * 10_000,
    "\\frac{1}{" * 80 + "1" + "}" * 80,
    "1/0",
    "18/(9-9)",
    "__import__('os').system('true')",
    "<|eot_id|>",
    "</answer>",
    "}{",
    "nan",
    "inf",
    "1e5",
    "0x12",
    "1_8",
]


@pytest.mark.parametrize("wrap", ["{}", "#### {}", "\\boxed{{{}}}", "<answer>{}</answer>", "\\boxed{{{}"])
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_gets_a_verdict_and_no_score(text, wrap):
    completion = wrap.format(text)
    assert verify_number(completion, "18").score == 0
    assert verify_number(completion, text).score in (0, 1)
    assert verify_countdown(completion, (9, 9), 18).score == 0
    assert verify_sudoku(completion, PUZZLE).score == 0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("so 9 * 2 = 18 . #### 18", "18"),
        ("#### 17 ... #### 18", "18"),
        ("#### 18\n#### Step 2: rest", "18"),
        ("#### **Step 2**\n\\boxed{18}", "18"),
        ("#### 1. Count the eggs\n\\boxed{18}", "18"),
        ("####\n$18.00 a day.", "18"),
        ("\\boxed{17}\n#### 18", "18"),
        ("<answer>17</answer> \\boxed{18}", "18"),
        ("\\boxed{17} \\boxed{18}<|eot_id|>", "18"),
        ("\\boxed{18}<|eot_id|>\\boxed{17}", "18"),
        ("<answer>\n\\boxed{18}\n</answer", "18"),
        ("<answer>17</answer><answer>18</ans", "18"),
        ("<answer>\n18 eggs<|endoftext|>", "18"),
        ("\\boxed{18><|im_end|>", "18"),
        ("\\boxed{\\boxed{18}}", "18"),
        ("\\boxed{\\text{18 eggs}}", "18"),
        ("\\boxed{18\\text{ km}} long", "18"),
        ("\\boxed{9 \\times 2 = 18}", "18"),
        ("\\boxed{\\$18}", "18"),
        ("\\boxed{18\\%}", "18"),
        ("<answer>The answer is **18**.</answer>", "18"),
        ("\\boxed{6,277}", "6277"),
        ("\\boxed{1{,}234\\,567.50}", "2469135/2"),
        ("\\boxed{16.50}", "33/2"),
        ("\\boxed{.5}", "1/2"),
        ("\\boxed{2 / 4}", "1/2"),
        ("\\boxed{-\\frac{2}{4}}", "-1/2"),
        ("\\boxed{-\\$18}", "-18"),
        ("\\boxed{\u221218}", "-18"),
        ("it is 18", None),
        ("9 * 2 = 18", None),
        ("18", None),
        ("####", None),
        ("\\boxed{}", None),
        ("\\boxed{} <answer>18</answer>", None),
        ("\\boxed{17 or 18}", None),
        ("\\boxed{1 8}", None),
        ("\\boxed{1,8}", None),
        ("\\boxed{1.8.0}", None),
        ("\\boxed{3\\frac{1}{2}}", None),
        ("\\boxed{18^2}", None),
        ("\\boxed{18!}", None),
        ("\\boxed{\\sqrt{18}}", None),
        ("\\boxed{18½}", None),
        ("\\boxed{18/0}", None),
        ("\\boxed{x/18}", None),
        ("\\boxed{\\frac{.}{18}}", None),
        ("\\boxed{" + "1" * 31 + "}", None),
        ("\\boxed{" + "18".translate(ARABIC) + "}", None),
        ("\\boxed{" + "18".translate(FULL_WIDTH) + "}", None),
        ("\\boxed{18}" + " " * 20_000, None),
    ],
)
def test_number_read(completion, answer):
    correct = answer is not None
    assert verify_number(completion, str(answer)) == Verdict(correct, float(correct), answer)
    assert not verify_number(completion, "17").correct


@pytest.mark.parametrize("expected", ["18", "18.0", "18.00", "$18", "36/2"])
def test_number_is_compared_exactly(expected):
    assert verify_number("#### 18", expected).correct
    assert not verify_number("#### 18.0000000001", expected).correct
    assert not verify_number("#### -18", expected).correct


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("12 - 9 = 3 , 3 + 3 = 6", 1),
        ("12 - 9 = 3, 3 + 3 = 6.", 1),
        ("12 - 9 = 3; 3 + 3 = 6<|eot_id|>", 1),
        ("3 - 9 = -6\n-6 + 12 = 6", 1),
        ("3 / 12 = 0.25", 0),
        ("12 - 9 + 3", 1),
        ("12 - 9 + 3 = 6", 1),
        ("<answer>\n(12 - 9) + 3\n</answer>", 1),
        ("<answer>\\boxed{12 - 9 + 3}<|eot_id|>", 1),
        ("we get 99. \\boxed{12 - 9 + 3><|eot_id|>", 1),
        ("<answer>12</answer> <answer>12 - (9 - 3)", 1),
        ("\\boxed{12} then \\[ \\boxed{\\left(12 - 9\\right) + 3} \\]", 1),
        ("\\( 12 − 9 + 3 \\)", 1),
        ("12 + 9 + 3", 0.1),
        ("12 - 9 + 3 = 7", 0.1),
        ("12 - 9 = 4 , 4 + 3 = 7", 0.1),
        ("12 - 9 = 4 , 4 + 3 = 6", 0.1),
        ("12 + 9 = 21 , 21 - 3 = 18", 0.1),
        ("<answer>12 - 9 + 3</answer> <answer>12</answer>", 0),
        ("<answer>12 + 9 - 3 <answer>", 0),
        ("the expression is 12 - 9 + 3", 0),
        ("6", 0),
        ("\\boxed{6}", 0),
        ("6 = 6", 0),
        ("12 - 9 = 3", 0),
        ("12 - 6", 0),
        ("12 - 9 + 3 + 3 - 3", 0),
        ("12 - 9 = 3 , 3 = 3 , 6 = 6", 0),
        ("12 - 9 = 3 , 3 + 3", 0),
        ("12 - 9 + 3 , 12 - 9 + 3", 0),
        ("12 - 9 = 3 , 12 - 9 = 3 , 3 + 3 = 6", 0),
        ("12 - 9 = 3 = 3 + 0", 0),
        ("-9 + 12 + 3", 0),
        ("12 - (9 - 3", 0),
        ("12 - 9) + 3", 0),
        ("12 -- 9 + 3", 0),
        ("12 - 9 + 3 +", 0),
        ("12 9 3", 0),
        ("(12 - 9)(3)", 0),
        ("12 - 9 ** 3", 0),
        ("12 - 9 // 3", 0),
        ("12 - 9 + 3 # six", 0),
        ("12 / (9 - 3 * 3)", 0),
        ("make 6 from 12 9 3 :", 0),
        ("make 6 from 12 9 3 : 12 - 9 = 3 , 3 + 3 = 6", 0),
        ("12 - 9 + 3".translate(ARABIC), 0),
        ("12 - 9 + 3".translate(FULL_WIDTH), 0),
        ("12 - 9" + " " * 2_000 + "+ 3", 0),
    ],
)
def test_countdown(completion, score):
    verdict = verify_countdown(completion, (12, 9, 3), 6)
    assert (verdict.correct, verdict.score) == (score == 1, score)
    assert score == 0 or verdict.answer


@pytest.mark.parametrize(
    ("completion", "numbers", "target"),
    [
        ("60", (60,), 60),
        ("5 + 5", (5, 5), 10),
        ("\\boxed{6 \\times 8 \\div 4}", (4, 6, 8), 12),
        ("\\dfrac{6 + 8}{\\frac{4}{2}} - 1", (4, 6, 8, 2, 1), 6),
        ("8 / (3 - 8 / 3)", (3, 3, 8, 8), 24),
        ("1 / 3 * 3", (1, 3, 3), 1),
        ("5 / 2 = 2.5 , 2.5 * 4 = 10", (2, 4, 5), 10),
        ("2 - 3 - 4 + 15", (2, 3, 4, 15), 10),
    ],
)
def test_countdown_values(completion, numbers, target):
    assert verify_countdown(completion, numbers, target).correct
    assert verify_countdown(completion, numbers, target + 1).score == 0.1
    assert verify_countdown(completion, (*numbers, 7), target).score == 0
    assert verify_countdown(completion, numbers[1:], target).score == 0


def test_evaluate_agrees_with_python():
    rng = np.random.default_rng(0)

    def expression(depth: int) -> str:
        if depth == 0:
            return str(rng.integers(1, 20))
        text = f"{expression(depth - 1)} {rng.choice(list('+-*'))} {expression(depth - 1)}"
        return f"({text})" if rng.random() < 0.5 else text

    for text in (expression(depth) for depth in (1, 2, 3, 4) for _ in range(50)):
        assert evaluate(text)[0] == eval(text)


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (SOLUTION, 1),
        (" ".join(SOLUTION), 1),
        (f"we find\n<answer>\n{SOLUTION}\n</answer><|eot_id|>", 1),
        (f"<answer>{PUZZLE}</answer> <answer>{SOLUTION}", 1),
        (f"\\boxed{{{SOLUTION}}}", 1),
        ("| 4 3 | 2 1 |\n| 1 2 | 4 3 |\n|-----|-----|\n| 3 4 | 1 2 |\n| 2 1 | 3 4 |", 1),
        ("[[4,3,2,1],[1,2,4,3],[3,4,1,2],[2,1,3,4]]", 1),
        ("4321124334122114", 6 / 8),  # the 1s of the last row clash, both blanks
        ("4321124334123124", 5 / 8),  # 3 and 2 of the last row clash with clues, the 2 also with a blank of its box
        ("1321124334122134", 0),  # a clue changed
        (PUZZLE, 0),
        (SOLUTION[:-1], 0),
        (SOLUTION + "4", 0),
        (PUZZLE + SOLUTION, 0),
        (f"{PUZZLE} {SOLUTION}", 0),
        (f"the solution is {SOLUTION}", 0),
        (f"{SOLUTION} <answer></answer>", 0),
        (SOLUTION.translate(ARABIC), 0),
        (SOLUTION.translate(FULL_WIDTH), 0),
        (SOLUTION.replace("4", "5"), 0),
    ],
)
def test_sudoku(completion, score):
    verdict = verify_sudoku(completion, PUZZLE)
    assert verdict.correct == (score == 1)
    assert verdict.score == pytest.approx(score)


def test_sudoku_takes_any_completion_that_is_right():
    other = SOLUTION.translate(str.maketrans("12", "21"))
    assert verify_sudoku(SOLUTION, "0" * 16).correct
    assert verify_sudoku(other, "0" * 16).correct
    assert verify_sudoku(SOLUTION, SOLUTION) == Verdict(True, 1.0, SOLUTION)
    assert verify_sudoku("1" * 16, "0" * 16) == Verdict(False, 0.0, "1" * 16)
    assert verify_sudoku("1" * 16, "1" * 16) == Verdict(False, 0.0, "1" * 16)


def test_sudoku_has_no_hub_set():
    with pytest.raises(ValueError, match=r"no standard sudoku set.*\.csv.*Puzzle"):
        Sudoku("hub")


@pytest.mark.parametrize("task", [GSM8K(), Countdown(), Sudoku()], ids=lambda task: task.name)
def test_demonstrations_are_right_and_prompts_are_not(task):
    rng = np.random.default_rng(0)
    for index in range(100):
        problem, completion = task.example(index, rng)
        assert task.verify(problem, completion).correct
        assert task.verify(problem, problem.prompt).score == 0
        assert task.verify(problem, f"{problem.prompt} {completion}").correct == (task.name == "gsm8k")


@pytest.mark.parametrize(
    ("task", "row"),
    [
        (GSM8K(), {"question": "How many is 18 + 0?", "answer": "18 + 0 = 18\n#### 18"}),
        (Countdown(), {"nums": [18], "target": 18}),
        (Sudoku(), {"Puzzle": SOLUTION}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_echoed_prompts_of_real_rows_are_not_right(task, row):
    question, answer = task.read_row(row)
    prompt = task.template.replace("{question}", question)
    assert task.verify(Problem("", prompt, answer), prompt).score == 0


def read(task: str) -> list[dict]:
    path = DATA / f"llada8b_generations_{task}_sample.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path.name}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_real_numbers_match_a_reading_by_hand():
    rows = read("gsm8k")
    verdicts = [verify_number(row["generations"], str(row["ground_truth"])) for row in rows]
    wrong = [4, 7, 21, 24, 27, 30, 31, 40, 43, 44, 50, 52, 64, 73, 80, 82, 83, 91, 101, 110, 111, 114]
    assert [i for i, verdict in enumerate(verdicts) if not verdict.correct] == wrong
    assert all(verdict.answer for verdict in verdicts)


def test_real_countdowns_match_a_reading_by_hand():
    verdicts = [verify_countdown(row["generations"], *row["ground_truth"]) for row in read("countdown")]
    assert [i for i, verdict in enumerate(verdicts) if verdict.correct] == [0, 6, 7, 18, 21, 27, 30, 36]
    assert [i for i, verdict in enumerate(verdicts) if verdict.score == 0.1] == [28, 31]


def test_real_sudokus_match_a_reading_by_hand():
    for row in read("sudoku"):
        puzzle = row["question"].strip()[-16:]
        assert verify_sudoku(row["generations"], puzzle).score == 0
        assert verify_sudoku(row["ground_truth"], puzzle).correct
