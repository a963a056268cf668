"""The verifiers of numbers, Countdown and Sudoku on right, wrong, malformed and hostile text."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dllm_gym.tasks.countdown import Countdown
from dllm_gym.tasks.gsm8k import GSM8K
from dllm_gym.tasks.math import AIME24, MATH500
from dllm_gym.tasks.sudoku import Sudoku
from dllm_gym.types import Problem, Verdict
from dllm_gym.verify.arithmetic import evaluate, verify_countdown, verify_number
from dllm_gym.verify.sudoku import verify_sudoku

DATA = Path(__file__).parents[3] / "shared" / "data"
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
        ("<answer>18</answer> \\boxed{17}", "18"),
        ("<answer>18</answer>\n#### 17", "18"),
        ("\\boxed{17} \\boxed{18}<|eot_id|>", "18"),
        ("\\boxed{18}<|eot_id|>\\boxed{17}", "18"),
        ("<answer>\n\\boxed{18}\n</answer", "18"),
        ("<answer>\n```\n18\n```\n</answer>", "18"),
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
        ("\\boxed{} <answer>18</answer>", "18"),
        ("<think>\\boxed{17}</think><answer>18</answer>", "18"),
        ("<Answer>18</Answer>", "18"),
        ("<<answer>18", "18"),
        ("<>answer>\n18", "18"),
        ("<answer>\\boxed{}18</answer>", "18"),
        ("we find</answer>\n18", "18"),
        ("we find\n18</answer>", "18"),
        ("\\boxed {18}", "18"),
        ("so boxed{18}", "18"),
        ("\x08oxed{18}", "18"),
        ("\\fbox{18}", "18"),
        ("#### The answer is 18.", "18"),
        ("#### x = 18", "18"),
        ("#### 18 (10 red and 8 green)", "18"),
        ("#### \\boxed{18}", "18"),
        ("#### Day 2 is over\n\\boxed{18}", "18"),
        ("#### Rs. 18", "18"),
        ("it is 18", None),
        ("9 * 2 = 18", None),
        ("18", None),
        ("####", None),
        ("\\boxed{}", None),
        ("\\boxed{17 or 18}", None),
        ("\\boxed{1 8}", None),
        ("\\boxed{1,8}", None),
        ("\\boxed{1.8.0}", None),
        ("\\boxed{18^2}", None),
        ("\\boxed{18!}", None),
        ("\\boxed{\\sqrt{18}}", None),
        ("\\boxed{18²}", None),
        ("\\boxed{2 ** 3}", None),
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


MARKED = ["**18**", "__18__", "`18`", "$18$", "\\(18\\)", "\\text{18}", "\\mathbf{18}", "18.", "18.00"]
MARKED += [
    "$18",
    "\\$18",
    "€18",
    "18 €",
    "£18",
    "18 USD",
    "18%",
    "18°",
    "18^\\circ",
    "18 km",
    "18 m^2",
    "18 cm²",
    "18\\text{ m}^3",
]
MARKED += [
    "x = 18",
    "18 = x",
    "9 × 2 = 18",
    "9 · 2 = 18",
    "18 (9 twice)",
    "\u200918\u202f",
    "36/2",
    "17 2/2",
    "17\\frac{2}{2}",
]


@pytest.mark.parametrize("wrap", ["#### {}", "\\boxed{{{}}}", "<answer>{}</answer>", "<answer>\n{}"])
@pytest.mark.parametrize("text", MARKED)
def test_markup_says_nothing_about_the_number(text, wrap):
    assert verify_number(wrap.format(text), "18").answer == "18"
    negative = text.replace("17", "-17").replace("18", "-18").replace("36", "-36").replace("9 ", "-9 ")
    if negative.count("-") == 1:
        for minus in "-\u2212\u2013\u2010":
            assert verify_number(wrap.format(negative.replace("-", minus)), "-18").answer == "-18"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("1 234", "1234"),
        ("1\u2009234\u2009567", "1234567"),
        ("1\\,234", "1234"),
        ("12 34", None),
        ("1 2345", None),
        ("3½", "7/2"),
        ("3\\frac12", "7/2"),
        ("-3 1/2", "-7/2"),
        ("11 5/6", "71/6"),
        ("\\frac{1,234}{2}", "617"),
    ],
)
def test_spaced_and_mixed_numbers(text, answer):
    assert verify_number(f"\\boxed{{{text}}}", "5").answer == answer


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
        ("12 – 9 + 3", 1),
        ("**12 - 9 + 3**", 1),
        ("**12 - 9** + 3", 1),
        ("`12 - 9 + 3`", 1),
        ("```\n12 - 9 + 3\n```", 1),
        ("$12 - 9 + 3 = 6$.", 1),
        ("<Answer>12 - 9 + 3</Answer>", 1),
        ("boxed{12 - 9 + 3}", 1),
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
        ("\\frac82", (8, 2), 4),
        ("\\frac{8}2 + 1", (8, 2, 1), 5),
        ("\\frac8{2} + 1", (8, 2, 1), 5),
        *((text, (3, 5), 15) for text in ("3 x 5", "3x5", "3 X 5", "3 · 5", "3 × 5", "3 \\cdot 5", "(3) x (5)")),
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
        ("Row 1: 4 3 2 1\nRow 2: 1 2 4 3\nRow 3: 3 4 1 2\nRow 4: 2 1 3 4", 1),
        ("1. 4 3 2 1\n2. 1 2 4 3\n3. 3 4 1 2\n4. 2 1 3 4", 1),
        ("4321 / 1243 / 3412 / 2134", 1),
        ("┌─┐\n│4 3│2 1│\n│1 2│4 3│\n├─┼─┤\n│3 4│1 2│\n│2 1│3 4│\n└─┘", 1),
        ("```\n4321\n1243\n3412\n2134\n```", 1),
        ("**4321 1243 3412 2134**", 1),
        ("\\begin{array}{cc|cc} 4&3&2&1\\\\ 1&2&4&3\\\\ \\hline 3&4&1&2\\\\ 2&1&3&4 \\end{array}", 1),
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


@pytest.mark.parametrize(
    ("grid", "right"),
    [
        (SOLUTION, 8),
        ("4321124334122114", 7),
        ("1321124334122134", 7),  # all blanks right, a clue changed: not correct
        ("4321124334122134"[:15], 7),  # the last cell left out
        (SOLUTION + "4", 7),  # all blanks right, a digit too many
        (PUZZLE, 0),
        (SOLUTION.replace("4", "5"), 0),
        (f"the solution is {SOLUTION}", 0),
        ("", 0),
    ],
)
def test_partial_credit_by_the_solution(grid, right):
    verdict = verify_sudoku(f"<answer>{grid}</answer>", PUZZLE, [SOLUTION])
    assert (verdict.correct, verdict.score) == (grid == SOLUTION, pytest.approx(right / 8))


def test_partial_credit_is_that_of_the_nearest_solution():
    puzzle = "0" * 16
    other = SOLUTION.translate(str.maketrans("12", "21"))
    assert verify_sudoku(other[:15], puzzle, [SOLUTION, other]).score == 15 / 16
    assert verify_sudoku(other, puzzle, [SOLUTION]) == Verdict(True, 1.0, other)


def test_the_task_chooses_the_partial_credit(tmp_path):
    changed = "1321124334122134"  # a clue
    path = tmp_path / "puzzles.jsonl"
    path.write_text(json.dumps({"Puzzle": PUZZLE}))
    for options, score in (({}, 7 / 8), ({"partial_credit": "solution"}, 7 / 8), ({"partial_credit": "rules"}, 0)):
        task = Sudoku(str(path), **options)
        assert task.verify(task[0], changed) == Verdict(False, score, changed)
        assert task.verify(task[0], SOLUTION).correct
    assert Sudoku().partial_credit == "rules"
    with pytest.raises(ValueError, match=r"partial_credit='half': must be 'rules', 'solution' or None"):
        Sudoku(partial_credit="half")


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
    rows = read("sudoku")
    credit = []
    for row in rows:
        puzzle = row["question"].strip()[-16:]
        assert verify_sudoku(row["generations"], puzzle).score == 0
        assert verify_sudoku(row["ground_truth"], puzzle).correct
        credit.append(verify_sudoku(row["generations"], puzzle, [row["ground_truth"]]).score)
    assert [i for i, score in enumerate(credit) if score >= 2 / 8] == [1, 10, 20, 30, 35]
    assert np.mean(credit) == pytest.approx(0.0777, abs=1e-4)


REFERENCES = [
    (GSM8K, {"question": "?", "answer": "#### Monday"}, "'Monday' after '####' is not a number"),
    (GSM8K, {"question": "?", "answer": "It is 5. ####"}, "'' after '####' is not a number"),
    (Countdown, {"nums": [1, 2], "target": 2.5}, "2.5 is not a whole number"),
    (Countdown, {"nums": [1, 2.5], "target": 3}, "2.5 is not a whole number"),
    (Countdown, {"input": "1,2.5", "output": "3"}, "'2.5' is not a whole number"),
    (Countdown, {"input": "1,2", "output": ""}, "Fraction: ''"),
    (Sudoku, {"Puzzle": "1100000000000000"}, "has no solution"),
    (AIME24, {"problem": "?", "answer": "33.5"}, "'33.5' is not a whole number from 0 to 999"),
    (AIME24, {"problem": "?", "answer": "1000"}, "'1000' is not a whole number from 0 to 999"),
    (AIME24, {"problem": "?", "answer": "Monday"}, "'Monday' is not a whole number from 0 to 999"),
    (MATH500, {"problem": "?", "answer": " "}, "`answer` text or a number"),
]


@pytest.mark.parametrize(("kind", "row", "message"), REFERENCES)
def test_a_reference_that_is_none_is_an_error_that_names_the_row(kind, row, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        kind(str(path))[0]
    assert f"rows.jsonl', row 0: not a {kind.name} problem" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "row", "answer"),
    [
        (GSM8K, {"question": "?", "answer": "#### 1,234"}, "1234"),
        (GSM8K, {"question": "?", "answer": "####  $5 "}, "$5"),
        (Countdown, {"nums": ["12", 3.0], "target": "4.0"}, ((12, 3), 4)),
        (AIME24, {"problem": "?", "answer": r"336^\circ"}, "336"),
        (AIME24, {"problem": "?", "answer": "33.0"}, "33"),
        (AIME24, {"problem": "?", "answer": 33.0}, "33"),
        (AIME24, {"problem": "?", "answer": "025"}, "25"),
    ],
)
def test_references_that_are_read(kind, row, answer):
    assert kind.read_row(object.__new__(kind), row)[1] == answer
