"""The verifier of mathematics on right, wrong, malformed and hostile text, and the process that it asks."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_verify import HOSTILE

from dllm_gym.tasks.math import MATH500
from dllm_gym.types import Problem, Verdict
from dllm_gym.verify import latex
from dllm_gym.verify.math import final_answer, verify_math

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


def right(answer: str, expected: str) -> bool:
    verdict = verify_math(f"so \\boxed{{{answer}}}", expected)
    assert verdict.score == verdict.correct
    return verdict.correct


@pytest.mark.parametrize(
    ("expected", "answer"),
    [
        (r"\frac{1}{2}", "0.5"),
        (r"\frac 34", "3/4"),
        (r"\frac{1}{8}", r"\frac{3}{24}"),
        (r"\frac{639}{40}", r"15.975 \text{ inches}"),
        (r"3\frac{1}{2}", "3.5"),
        (r"11\sqrt2", r"11 \sqrt{2}"),
        ("9", r"\sqrt{81}"),
        ("2k+2", "2(k + 1)"),
        ("p - q", "-(q - p)"),
        ("6+9i", "9i + 6"),
        ("3, 5, 7", "3, 7, 5"),
        ("(8,-2)", r"\left(8, -2\right)"),
        (r"\{1\pm\sqrt{5},-2\}", r"\{-2, 1-\sqrt5, 1+\sqrt5\}"),
        (r"\left(\frac{3}{5},\frac{8}{3}\right]", "(0.6, 8/3]"),
        (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty,2)\cup(3,\infty)"),
        (r"\begin{pmatrix} -2 \\ -14 \end{pmatrix}", r"\begin{pmatrix}-2\\-14\end{pmatrix}"),
        ("x=5", "5"),
        ("5", "x = 5"),
        ("204", "m + n = 204"),
        ("25", "025"),
        ("10080", "10,080"),
        (r"\$18.90", "18.9"),
        ("180", r"180^\circ"),
        ("10", r"10\%"),
        (r"\text{Navin}", r"\text{navin}"),
        (r"\text{Navin}", "Navin"),
        (r"\text{(C)}", "C"),
        ("2516_8", "2516_{8}"),
        ("5", "$5$."),
        ("5", r"\(5\)"),
        ("5", r"\[5\]"),
        ("x < 2", "x<2"),
    ],
)
def test_equal_answers(expected, answer):
    assert right(answer, expected)
    assert not right(answer, "77")


@pytest.mark.parametrize(
    ("expected", "answer"),
    [
        ("16", "16, 17"),
        ("16", "16 or 17"),
        ("4", "1, 2, 3, 4"),
        ("3, 5, 7", "3, 5"),
        ("(8,-2)", "(-2,8)"),
        ("[2, 3]", "(2, 3)"),
        ("5", "5x"),
        ("5", "-5"),
        ("5", "55"),
        ("14", "1 4"),
        (r"\frac{1}{3}", "0.333"),
        ("90", r"\frac{\pi}{2}"),
        ("12", r"10^{\text{th}} grade"),
        (r"\text{even}", r"\text{odd}"),
        ("x < 2", "x > 2"),
        ("2x+3", "2x-3"),
        (r"\frac{3}{2}", r"\frac{2}{3}"),
        ("5", r"\text{the answer}"),
    ],
)
def test_different_answers(expected, answer):
    assert not right(answer, expected)
    assert right(expected, expected)


EQUAL = [
    ("8n^2+4n+1", "4n(2n+1)+1"),
    ("x^2+2x+1", "(x+1)^2"),
    ("2x+4y-3=0", r"y=-\frac12x+\frac34"),
    (r"\frac{n(n+1)}2", r"\frac{n^2+n}{2}"),
    (r"\frac{71}{6}", "11 5/6"),
    ("71/6", "11 5/6"),
    ("73", "**73**"),
    ("45", "45°"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt2}"),
    (r"\sqrt{3}+\sqrt{2}", r"\sqrt{5+2\sqrt{6}}"),
    (r"\sin^2 x+\cos^2 x", "1"),
    (r"\log_2 8", "3"),
    (r"\binom{5}{2}", "10"),
    (r"0.\overline{3}", r"\frac13"),
    (r"1\pm\sqrt{5}", r"1-\sqrt5,1+\sqrt5"),
    ("3,5", "(3,5)"),
    (r"\{5,3\}", "3,5"),
    ("(1,2),(3,4)", "(3,4),(1,2)"),
    ("204_5", "204"),
    ("204_5", "204_{5}"),
    (r"1\ 000", "1000"),
    (r"50\%", r"\frac12"),
    (r"10\%", "0.1"),
    ("y=2x+3", "y-2x=3"),
    ("x<2", r"(-\infty,2)"),
    (r"x\in(1,2)", "(1,2)"),
    ("1<x<2", "2>x>1"),
    ("x^2<4", "-2<x<2"),
    (r"(-\infty,0)\cup(0,\infty)", r"x\ne0"),
    ("x=1, y=2", "y=2, x=1"),
    ("7", "3+4=7"),
    ("x^2", "x²"),
    (r"\frac{\pi}{2}\text{ cm}", r"\frac\pi2"),
    (r"\frac{\sqrt{3}}{y}", r"\frac{\sqrt3}y"),
    (r"\sqrt{\pi}", r"\sqrt\pi"),
    ("2", r"\sqrt[3]8"),
    ("3.5", "3½"),
    (r"\text{5 cm}", "5"),
    (r"\text{June 20}", "June 20"),
    (r"\begin{pmatrix}1/2\\3\end{pmatrix}", r"\begin{pmatrix}0.5\\3\end{pmatrix}"),
]
UNEQUAL = [
    (r"\frac1{2^{99}}", r"\frac1{2^{98}}"),
    ("10^{100}", "10^{100}+1"),
    (r"\sqrt{10^{200}+1}", "10^{100}"),
    ("204_5", "204_6"),
    ("204_5", "54"),
    (".0000672", "0.0000671"),
    ("(3,5)", r"\{3,5\}"),
    ("(3,5)", "(5,3)"),
    ("(3,5)", "5,3"),
    ("(1,2,3)", "(1,3,2)"),
    ("(1,2),(3,4)", "(2,1),(3,4)"),
    ("(1,2)", "[1,2]"),
    (r"\frac13", "0.33"),
    ("x=5", "2x=10"),
    ("x=1", "y=1"),
    ("8", "3+4=8"),
    ("45", r"336^\circ"),
    ("4:30", "4:31"),
    (r"\text{even}", "vene"),
    (r"\text{June 20}", "June 21"),
    (r"-\infty", r"\infty"),
]


@pytest.mark.parametrize(("expected", "answer"), EQUAL)
def test_equal_either_way(expected, answer):
    assert right(answer, expected)
    assert right(expected, answer)


@pytest.mark.parametrize(("expected", "answer"), UNEQUAL)
def test_unequal_either_way(expected, answer):
    assert verify_math(f"\\boxed{{{answer}}}", expected) == Verdict(False, 0.0, answer)
    assert verify_math(f"\\boxed{{{expected}}}", answer) == Verdict(False, 0.0, expected)


def test_a_tolerance_is_relative_and_only_where_a_decimal_is_asked_for():
    assert right(r"\pi", "3.14159") and not right(r"\pi", "3.14")
    assert right(r"\frac13", "0.333333") and not right("0.333333", r"\frac13")
    assert right(r"\frac{\pi}{10^{9}}", "0.00000000314159") and not right(r"\frac{\pi}{10^{9}}", "0.00000000314")
    assert not right("3.14159", "3.141590000001")


REFERENCES = [pair[0] for pair in EQUAL + UNEQUAL] + [
    r"\left( 3, \frac{\pi}{2} \right)",
    r"14\sqrt3",
    r"\frac{9}{256}",
    r"\left(-\infty,-8\right)\cup\left(-8,\infty\right)",
    r"3\sqrt{13}",
    r"6 - 5i",
    r"-\frac{35}{9}",
    r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}",
    r"\dfrac{5}{36}",
    "1,-2",
    r"x \in [-2,7]",
    r"(5,\infty)",
    "10,\\!080",
    r"y = 2x + 3",
    r"\text{(C)}",
    r"(2,12) \cup (12,102)",
    r"\pm 19",
    "2^{10}-1",
]


@pytest.mark.parametrize("reference", REFERENCES)
def test_harmless_rewriting_changes_nothing(reference):
    bare = reference.replace(r"\left", "").replace(r"\right", "")
    for rewritten in (
        reference.replace(r"\frac", r"\dfrac"),
        bare.replace("+", " + ").replace(",", ", "),
        f"{{{reference}}}",
        f" {reference} .",
        f"${reference}$",
        f"**{reference}**",
        bare,
    ):
        assert right(rewritten, reference), rewritten
        assert right(reference, rewritten), rewritten


@pytest.mark.parametrize(
    ("question", "expected", "answer", "correct"),
    [
        ("Factor $9y^2-30y+25$.", "(3y-5)^2", "9y^2-30y+25", False),
        ("Factor $9y^2-30y+25$.", "(3y-5)^2", "25 - 30y + 9y^2", False),
        ("Factor $9y^2-30y+25$.", "(3y-5)^2", "(5-3y)^2", True),
        ("Factor $9y^2-30y+25$.", "(3y-5)^2", "(3y-5)(3y-5)", True),
        (r"Expand \((x+1)^2\).", "x^2+2x+1", "(x+1)^2", False),
        (r"Simplify $\sqrt{50}$.", r"5\sqrt{2}", r"\sqrt{50}", False),
        (r"Simplify \[\frac{6}{8}.\]", r"\frac34", r"\frac{6}{8}", False),
        (r"Simplify \[\frac{6}{8}.\]", r"\frac34", r"0.75", True),
        ("Compute $2^3+5$.", "13", "2^3+5", False),
        ("Simplify $(1+2i)6-3i$.", "6+9i", "(1+2i)6-3i", False),
        ("What is $1+2+x$ for $x=10$?", "13", "13", True),
        (r"Which is the largest, $\frac34$ or $0.7$?", r"\frac{3}{4}", r"\frac34", True),
        (r"Find $x$ if $x=\sqrt{49}$.", "7", "7", True),
        ("Solve $2x=10$.", "5", "x=5", True),
        ("Is $y=2x$ or $y=3x$ steeper?", "y=3x", "y=3x", True),
    ],
)
def test_what_is_asked_is_no_answer(question, expected, answer, correct):
    assert verify_math(f"\\boxed{{{answer}}}", expected, question).correct == correct
    assert right(answer, expected)
    row = {"problem": question, "answer": expected}
    task = object.__new__(MATH500)
    problem = Problem("", task.template.replace("{question}", task.read_row(row)[0]), expected)
    assert task.verify(problem, f"\\boxed{{{answer}}}").correct == correct


CONSTANTS = ["0", "1", "x", r"\infty", r"\emptyset", "0/0", r"\frac{0}{0}", "nan", "?", "...", "x = x", "1 = 1", r"\pm"]
CONSTANTS += [r"\mathbb{R}", r"(-\infty, \infty)", r"\text{answer}", "N", r"\boxed{}", "{}", r"\text{}", "answer", ","]


@pytest.mark.parametrize("answer", CONSTANTS)
def test_constants_are_not_right(answer):
    for expected in ("18", r"\frac{1}{2}", "(8,-2)", "2k+2", "y = 2x+3", r"\text{Navin}", "3, 5, 7", "[2,3)"):
        assert not right(answer, expected)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"\boxed{18}", "18"),
        (r"\boxed{17} then \boxed{18}", "18"),
        (r"<answer>\boxed{18}</answer> \boxed{17}", "18"),
        (r"\boxed{17} <answer> 18 </answer>", "18"),
        (r"<answer>17</answer><answer>It is \(\boxed{18}\) cm.<|eot_id|>", "18"),
        (r"</answer> \boxed{18}<|eot_id|> \boxed{17}", "18"),
        ("<answer>\n\\boxed{18}\n</ans", "18"),
        (r"<answer>\boxed{x < 18}</answer>", "x < 18"),
        (r"<answer>x < 18</answer>", "x < 18"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"is \(\boxed{8\sqrt{ 2}\).", r"8\sqrt{ 2}"),
        (r"\boxed{18", "18"),
        (r"\boxed{\boxed{18}}", "18"),
        (r"\boxed{\$18}", r"\$18"),
        (r"<answer \boxed{18}", "18"),
        ("it is 18", None),
        ("#### 18", None),
        ("$18$", None),
        (r"\boxed{}", None),
        (r"\boxed{ . }", None),
        (r"\boxed{} <answer></answer>", None),
        (r"<answer>\boxed{}</answer> 18", None),
        (r"\boxed{18}" + " " * 20_000, None),
        ("", None),
    ],
)
def test_answer_that_is_read(completion, answer):
    assert (final_answer(completion) or None) == answer
    verdict = verify_math(completion, "18")
    assert verdict == Verdict(verdict.correct, float(verdict.correct), answer)
    assert verdict.correct == (answer in ("18", r"\$18"))


@pytest.mark.parametrize("wrap", ["{}", "<answer>{}</answer>", "\\boxed{{{}}}", "\\boxed{{{}"])
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_gets_a_verdict_and_no_score(text, wrap):
    assert verify_math(wrap.format(text), "\\frac{7}{18}").score == 0


@pytest.mark.parametrize("expected", ["(" * 200, "1" * 1_000, r"\frac{", "\ud800", ""])
def test_hostile_references_get_a_verdict(expected):
    assert not right("18", expected)


def test_what_is_not_read():
    nested = "18"
    for depth in range(latex.DEEPEST + 2):
        assert latex.readable(nested) == (depth <= latex.DEEPEST)
        nested = f"({nested})"
    assert latex.readable("1" * latex.LONGEST) and not latex.readable("1" * (latex.LONGEST + 1))
    assert latex.readable(")]}(") and latex.readable("")


# The process that compares


@pytest.fixture
def comparer(monkeypatch):
    """A comparer of the test's own."""
    comparer = latex.Comparer()
    monkeypatch.setattr(latex, "_comparer", comparer)
    yield comparer
    comparer.close()


def test_a_comparison_that_hangs_is_ended_and_the_next_is_right(comparer):
    assert comparer.equal("1/2", "0.5")
    first = comparer._process.pid
    answer = "9^{9^{9^{9}}}"
    assert verify_math(f"\\boxed{{{answer}}}", "18") == Verdict(False, 0.0, answer, undecided="timed out")
    assert comparer.equal("1/2", "0.5")
    assert comparer._process.pid != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_a_process_that_does_not_answer_is_ended(comparer, monkeypatch):
    assert comparer.equal("1/2", "0.5")
    monkeypatch.setattr(latex, "WALL_SECONDS", 0.2)
    comparer._process.send_signal(signal.SIGSTOP)  # it uses no CPU time, so only the clock can end it
    with pytest.raises(latex.Undecided, match="timed out"):
        comparer.equal("1/2", "0.5")
    monkeypatch.undo()
    assert comparer.equal("1/2", "0.5")


def test_an_interrupted_question_leaves_no_reply_behind(comparer, monkeypatch):
    assert comparer.equal("1/2", "0.5")

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(comparer, "_read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        comparer.equal("1/2", "0.5")
    monkeypatch.undo()
    assert [comparer.equal("1/2", answer) for answer in ("0.25", "0.5", "0.75")] == [False, True, False]


def test_a_process_that_died_is_replaced(comparer):
    assert comparer.equal("1/2", "0.5")
    comparer._process.kill()
    comparer._process.wait()
    assert comparer.equal("1/2", "0.5")


SAME_VERDICTS = [
    (*EQUAL[0], True),
    (*EQUAL[2], True),
    (*UNEQUAL[0], False),
    (r"\frac{\pi}{2}\text{ cm}", r"\frac\pi2", True),
]


@pytest.mark.parametrize("state", ["fresh", "tired", "killed before", "killed at work"])
def test_verdicts_do_not_depend_on_what_was_before(comparer, state):
    tiring = {"tired": 30, "killed before": 1, "killed at work": 1}.get(state, 0)
    for i in range(tiring):
        assert comparer.equal(rf"\frac{{x^2-{i}}}{{3}}+\sin({i}y)", rf"\frac{{x^2}}{{3}}-\frac{{{i}}}{{3}}+\sin({i}y)")
    for expected, answer, equal in SAME_VERDICTS:
        if state == "fresh":
            comparer.close()
        if state == "killed before":
            comparer._process.kill()
        if state == "killed at work":
            comparer._process.send_signal(signal.SIGSTOP)
            threading.Timer(0.05, comparer._process.kill).start()
        assert comparer.equal(expected, answer) == equal, (expected, answer)


def test_want_of_memory_is_no_verdict(comparer):
    """Every verdict that is reached under a limit is the right one, whatever the limit; the others are undecided."""
    resource = pytest.importorskip("resource")
    replies = []
    for more in range(0, 25, 6):  # MiB beyond what the process has: an import or a computation fails, anywhere in it
        comparer.close()
        comparer._start()
        pid = comparer._process.pid
        size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(pid, resource.RLIMIT_AS, (size + (more << 20),) * 2)
        for expected, answer, equal in SAME_VERDICTS:
            replies.append(comparer._ask(expected, answer, ""))
            assert replies[-1] in (equal, latex.NOT_COMPARED), (more, expected, answer)
    assert latex.NOT_COMPARED in replies and True in replies and False in replies


def test_what_fails_in_a_tired_process_is_asked_of_a_fresh_one(comparer):
    resource = pytest.importorskip("resource")
    assert comparer.equal("1/2", "0.5")
    pid = comparer._process.pid
    resource.prlimit(pid, resource.RLIMIT_AS, (1 << 20, 1 << 20))
    assert comparer.equal(*EQUAL[0])
    assert comparer._process.pid != pid


def test_the_three_outcomes(comparer):
    assert verify_math(r"\boxed{0.5}", "1/2") == Verdict(True, 1.0, "0.5")
    assert verify_math(r"\boxed{0.4}", "1/2") == Verdict(False, 0.0, "0.4")
    for answer in ("1+" * latex.LONGEST + "1", "(" * 11 + "1" + ")" * 11):
        assert verify_math(f"\\boxed{{{answer}}}", "18") == Verdict(False, 0.0, answer, undecided="not compared")
    assert verify_math(r"\boxed{5}", r"\frac{").undecided == "not compared"  # a reference that is none


def test_only_numbers_are_evaluated(tmp_path):
    code = f"""
import io, sys
from sympy import sympify
from dllm_gym.verify import latex
sys.stdin, out, sys.stdout = io.StringIO('["1/2", "0.5"]\\n'), sys.stdout, io.StringIO()
latex.serve()
assert float(sympify("1.5")) == 1.5 and int(sympify("12")) == 12
for text in ("__import__('os').mkdir({str(tmp_path / "made")!r})", "1 + 1", "x", "9**9", "Integer (1 ) + 1"):
    try:
        sympify(text)
    except latex.Refused:
        print("refused", file=out)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["refused"] * 5, done.stderr
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("text", ["__import__('os').mkdir('{}')", "\\text{{__import__('os').mkdir('{}')}}"])
def test_model_text_is_not_run(text, tmp_path):
    text = text.format(tmp_path / "made")
    assert not right(text, "18") and not right("18", text)
    assert not (tmp_path / "made").exists()


def test_from_other_threads():
    pairs = [(f"{i}/{i + 1}", f"{2 * i}/{2 * i + 2 + i % 2}") for i in range(1, 40)]
    assert threading.current_thread() is threading.main_thread()
    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(lambda pair: right(*pair), pairs))
    assert verdicts == [i % 2 == 0 for i in range(1, 40)]


def test_in_a_forked_process():
    assert right("1/2", "0.5")
    parent = latex._comparer._process.pid

    def child(results):
        results.put((right("1/2", "0.5"), right("1/3", "0.5"), latex._comparer._process.pid))

    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    process = fork.Process(target=child, args=(results,))
    process.start()
    equal, unequal, pid = results.get(timeout=60)
    process.join()
    assert equal and not unequal and pid != parent
    assert right("1/2", "0.5") and latex._comparer._process.pid == parent


@pytest.mark.parametrize("ending", ["", "os._exit(0)"], ids=["exit", "no clean-up"])
def test_the_process_ends_with_its_parent(ending):
    code = f"""
import os
from dllm_gym.verify import latex
print(latex.equal("1/2", "0.5"), latex._comparer._process.pid, flush=True)
{ending}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    equal, pid = done.stdout.split()
    assert equal == "True", done.stderr
    for _ in range(100):
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the process is still there")


def test_a_process_that_cannot_start_is_an_error(comparer, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(RuntimeError, match="did not start: is math-verify installed"):
        right("1/2", "0.5")


# Real completions


def test_real_completions_match_a_reading_by_hand():
    path = DATA / "llada8b_generations_math500_sample.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path.name}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    verdicts = [verify_math(row["generations"], row["ground_truth"]) for row in rows]
    by_hand = [1, 2, 4, 11, 12, 13, 14, 16, 19, 20, 24, 28, 36, 37, 40, 45, 46, 49, 51, 53, 54, 60, 61, 64, 66, 67, 68]
    assert [i for i, verdict in enumerate(verdicts) if verdict.correct] == [*by_hand, 73, 75]
    # an empty box, and completions that break off
    assert [i for i, verdict in enumerate(verdicts) if verdict.answer is None] == [23, 44, 48, 56]
    assert not any(verify_math(row["question"], row["ground_truth"]).correct for row in rows)
    assert all(right(row["ground_truth"], f" {row['ground_truth']} ") for row in rows)
