"""Results files: what is written is read, what is there is continued, what is broken is named."""

import json
import time

import numpy as np
import pytest
import torch

from dllm_gym.agents.environment import EnvConfig
from dllm_gym.agents.samplers.policy import PolicyConfig, UnmaskingPolicy
from dllm_gym.eval import cli, evaluate
from dllm_gym.eval.compare import paired_test
from dllm_gym.eval.evaluate import CellConfig, evaluate_cell
from dllm_gym.eval.metrics import distinct, summary
from dllm_gym.eval.report.data import payload
from dllm_gym.eval.results import PER_SAMPLE, ResultsFile, read_results
from dllm_gym.eval.tables import print_cells
from dllm_gym.tasks.countdown import Countdown
from dllm_gym.types import Verdict

SAMPLED = EnvConfig(id="MaskedDiffusion-Countdown-v0", num_envs=4, temperature=1.0)
ARGMAX = EnvConfig(id="MaskedDiffusion-Countdown-v0", num_envs=4)


def records(cell) -> list:
    """All that is kept of the problems but the likelihoods, whose last bits depend on the rows beside them."""
    names = [name for name in ("problem_id", *PER_SAMPLE) if name != "log_likelihood"]
    return [{name: record[name] for name in names} for record in cell.problems]


def test_what_is_written_is_read(tmp_path):
    file = ResultsFile(tmp_path / "new" / "results.jsonl")
    written = [
        evaluate_cell(CellConfig(text, SAMPLED, problems=3, samples=2), file) for text in ("threshold", "random")
    ]
    read = read_results(file.path)
    assert [cell.settings["sampler"] for cell in read] == ["threshold", "random"]
    for mine, theirs in zip(written, read, strict=True):
        assert mine == theirs and mine.correct.shape == (3, 2) and len(mine.films) == 3
        assert mine.end["tokens"] == mine.length.sum() and mine.end["forwards"] == mine.nfe.sum()
        assert [p["problem_id"] for p in mine.problems] == [f"countdown/embedded/test/{i}" for i in range(3)]
    assert written[0].key != written[1].key
    assert (read[1].log_likelihood < 0).all() and (read[1].nfe == 12).all()


def test_undecided_verdicts_are_counted_apart(tmp_path, capsys, monkeypatch):
    reasons = {"countdown/embedded/test/1": "timed out", "countdown/embedded/test/2": "not compared"}
    verify = Countdown.verify

    def undecided_on_two(self, problem, completion):
        reason = reasons.get(problem.id)
        return Verdict(False, 0.0, completion, undecided=reason) if reason else verify(self, problem, completion)

    monkeypatch.setattr(Countdown, "verify", undecided_on_two)
    path = tmp_path / "results.jsonl"
    cell = evaluate_cell(CellConfig("threshold", SAMPLED, problems=4, samples=2), ResultsFile(path))
    (read,) = read_results(path)
    assert cell.undecided == read.undecided == summary(cell)["undecided"] == {"timed out": 2, "not compared": 2}
    assert not cell.correct[1:3].any() and cell.problems[0]["undecided"] == [None, None]
    print_cells([cell])
    note = "4 undecided, counted as wrong (2 timed out, 2 not compared)"
    assert f"threshold: {note}" in capsys.readouterr().out
    assert note in payload([path], completions=100)["cells"][0]["undecided"]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line.pop("undecided", None)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (old,) = read_results(path)  # written before verdicts could be undecided
    assert old.undecided == {} and (old.correct == cell.correct).all()


def test_a_film_shows_the_first_sample(tmp_path):
    cell = evaluate_cell(CellConfig("threshold:threshold=0.6", SAMPLED, problems=2, samples=2, films=1))
    (film,) = cell.films
    assert film["problem_id"] == cell.problems[0]["problem_id"] and film["nfe"] == cell.problems[0]["nfe"][0]
    assert film["correct"] == cell.problems[0]["correct"][0] and max(film["step_of"]) == film["nfe"]
    assert len(film["tokens"]) == len(film["confidence"]) == 12 and min(film["step_of"]) == 1
    spelled = "".join("" if text == "<eos>" else text for text in film["tokens"])
    assert "".join(cell.problems[0]["completion"][0].split()) == "".join(spelled.split())


@pytest.mark.parametrize("sampler", ["threshold:threshold=0.6", "metropolis:alpha=2,steps=3,proposal=left-to-right"])
def test_an_interrupted_cell_is_continued_with_the_same_result(sampler, tmp_path):
    request = CellConfig(sampler, SAMPLED, problems=6, samples=2, films=2)
    whole = ResultsFile(tmp_path / "whole.jsonl")
    evaluate_cell(request, whole)
    lines = whole.path.read_text().splitlines(keepends=True)
    assert [json.loads(line)["kind"] for line in lines[:5]] == ["cell", *["problem"] * 4]
    part = tmp_path / "part.jsonl"
    part.write_text("".join(lines[:4]) + lines[4][: len(lines[4]) // 2])  # the fourth problem was being written
    continued = evaluate_cell(request, ResultsFile(part))
    (read,) = read_results(part)
    assert records(continued) == records(read) and len(read.problems) == 6 and read.end
    if sampler.startswith("threshold"):  # chains draw in groups, which an interruption cuts differently
        assert records(read) == records(read_results(whole.path)[0])
        assert continued.films == whole.cells[continued.key].films


@pytest.mark.parametrize("first", [0, 1])
def test_an_error_in_one_thread_ends_the_others(first, tmp_path, monkeypatch):
    """Ctrl-C comes the same way: nobody waits for what the other threads have left."""
    real, written = evaluate.finished, []

    def finished(env, sampler, problems, **given):
        if first in problems:
            raise ValueError("no more")
        for n, end in real(env, sampler, problems, **given):
            time.sleep(0.2)
            written.append(n)
            yield n, end

    monkeypatch.setattr(evaluate, "finished", finished)
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="no more"):
            evaluate_cell(CellConfig("threshold", ARGMAX, problems=60), ResultsFile(tmp_path / "results.jsonl"))
    finally:
        torch.set_num_threads(1)
    assert len(written) <= 2


def test_threads_draw_positions_of_their_own():
    """Also where the sampler names its seed: at temperature 0 the order is all that differs between samples."""
    env = EnvConfig(id="MaskedDiffusion-Countdown-v0", num_envs=16)
    torch.set_num_threads(2)
    try:
        cell = evaluate_cell(CellConfig("random:k=3,seed=1", env, problems=12, samples=2, films=0))
    finally:
        torch.set_num_threads(1)
    assert distinct(cell.completion.tolist()).mean() > 0.6


def test_a_result_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "results.jsonl"
    request = CellConfig("threshold", ARGMAX, problems=3, films=0)
    evaluate_cell(request, ResultsFile(path))
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:3]))
    evaluate_cell(request, ResultsFile(path))
    (cell,) = read_results(path)
    assert [record["index"] for record in cell.problems] == [0, 1, 2] and path.read_text().count('"kind": "end"') == 1


def test_what_is_there_twice_counts_once(tmp_path):
    """Two processes may both have begun a cell, and done a problem of it."""
    path = tmp_path / "results.jsonl"
    evaluate_cell(CellConfig("threshold", ARGMAX, problems=3, films=0), ResultsFile(path))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[0], lines[1], ""]))
    assert len(read_results(path)[0].problems) == 3


def test_a_finished_cell_is_not_done_again(tmp_path, monkeypatch):
    with ResultsFile(tmp_path / "results.jsonl") as file:
        first = evaluate_cell(CellConfig("threshold", ARGMAX, problems=2), file)
    before = file.path.read_text()
    monkeypatch.setattr("dllm_gym.eval.evaluate.finished", None)
    assert evaluate_cell(CellConfig("threshold", ARGMAX, problems=2), ResultsFile(file.path)) == first
    assert file.path.read_text() == before


def test_a_cell_belongs_to_its_settings_and_weights(tmp_path):
    def key(**changes) -> str:
        request = {"sampler": "threshold", "env": ARGMAX, "problems": 1, "films": 0} | changes
        return evaluate_cell(CellConfig(**request)).key

    folders = [UnmaskingPolicy(PolicyConfig(hidden_dim=16, mlp_dim=16)).save(tmp_path / name) for name in "ab"]
    keys = [
        key(),
        key(sampler="random"),
        key(env=SAMPLED),
        key(problems=2),
        key(sampler="random", samples=2),
        key(seed=1),
    ]
    keys += [key(split="train"), *(key(sampler=str(folder)) for folder in folders)]
    assert len(set(keys)) == len(keys) and key() == keys[0]
    UnmaskingPolicy(PolicyConfig(hidden_dim=16, mlp_dim=16)).save(folders[0])
    assert key(sampler=str(folders[0])) not in keys


def test_a_file_that_was_cut_loses_its_last_line_only(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    evaluate_cell(CellConfig("threshold", ARGMAX, problems=3, films=0), ResultsFile(path))
    text = path.read_text()
    path.write_text(text[:-30])
    (cell,) = read_results(path)
    assert len(cell.problems) == 3 and cell.end is None
    assert f"{path}, line 5: truncated after" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{broken", "line 2: not a result"),
        ('{"kind": "problem", "cell": "nowhere"}', "line 2"),
        ('{"kind": "surprise", "cell": "k"}', "kind 'surprise'"),
        ('{"kind": "problem", "cell": "k", "index": 0, "correct": [true, true]}', "not 1 samples"),
        ("[1, 2]", "line 2"),
    ],
)
def test_a_line_in_the_middle_that_is_no_result(line, named, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"kind": "cell", "cell": "k", "settings": {"samples": 1}}) + f"\n{line}\n\n")
    with pytest.raises(ValueError, match=named):
        read_results(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_results(tmp_path / "nowhere.jsonl")


@pytest.fixture
def two_files(tmp_path) -> list[str]:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, text, env in zip(paths, ("threshold:threshold=0.3", "confidence"), (ARGMAX, SAMPLED), strict=True):
        evaluate_cell(CellConfig(text, env, problems=20, films=0), ResultsFile(path))
    return [str(path) for path in paths]


def test_comparison_of_two_files(two_files, capsys):
    assert cli.main(["compare", *two_files, "--metrics", "accuracy", "nfe", "pass@1"]) == 0
    shown = capsys.readouterr().out
    a, b = (read_results(path)[0] for path in two_files)
    assert "sampler: 'threshold:threshold=0.3' and 'confidence'" in shown
    assert "env.temperature: 0.0 and 1.0" in shown and "env.num_envs" not in shown
    accuracy = 100 * (a.correct.mean() - b.correct.mean())
    assert (
        f"accuracy: first minus second {accuracy:+.1f} [" in shown
        and f"pass@1: first minus second {accuracy:+.1f}" in shown
    )
    assert f"nfe: first minus second {a.nfe.mean() - 12:+.3f} [" in shown and "p = 5e-05" in shown


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["{a}", "{c}"], ["different problems: 20 and 5, of which 5", "--common"]),
        (["{a}", "{d}"], ["of which 0 are the same; nothing can be paired"]),
        (["{a}", "{both}"], ["2 cells (choose by --first-cell, --second-cell)", "threshold", "random"]),
        (["{a}", "{both}", "--second-cell", "margin"], ["0 cells for 'margin'"]),
        (["{a}", "{b}", "--metrics", "speed"], ["metric='speed'", "pass@k"]),
        (["{a}", "{b}", "--metrics", "pass@3"], ["k=3: must be 1 to 1"]),
        (["{a}", "nowhere.jsonl"], ["'nowhere.jsonl': no such file"]),
    ],
)
def test_comparisons_that_cannot_be(flags, named, two_files, tmp_path, capsys):
    others = {"c": [("threshold", ARGMAX, "test")], "d": [("threshold", ARGMAX, "train")]}
    others["both"] = [("threshold", ARGMAX, "test"), ("random", ARGMAX, "test")]
    paths = dict(zip("ab", two_files, strict=True))
    for name, cells in others.items():
        paths[name] = str(tmp_path / f"{name}.jsonl")
        for text, env, split in cells:
            evaluate_cell(CellConfig(text, env, problems=5, split=split, films=0), ResultsFile(paths[name]))
    assert cli.main(["compare", *(flag.format(**paths) for flag in flags)]) == 2
    line = capsys.readouterr().err
    assert all(text in line for text in named)


def test_common_problems_of_two_files(two_files, tmp_path, capsys):
    path = tmp_path / "few.jsonl"
    evaluate_cell(CellConfig("threshold", ARGMAX, problems=5, films=0), ResultsFile(path))
    assert cli.main(["compare", two_files[0], str(path), "--common"]) == 0
    assert "on the 5 problems that both have, of 20 and 5" in capsys.readouterr().out


def test_the_paired_test_has_the_exact_p_value():
    assert paired_test(np.zeros(9)) == 1
    assert paired_test(np.array([1.0] * 4)) == pytest.approx(2 / 16, abs=0.01)
    assert paired_test(np.array([1.0, 1.0, 1.0, -1.0])) == pytest.approx(10 / 16, abs=0.01)
    assert paired_test(np.array([0.3] * 40)) < 1e-4
