"""Experiment files: read, refused, run, and run again without doing anything twice."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from dllm_gym.eval import cli
from dllm_gym.eval.experiments.file import Grid, draws, only, read_experiment
from dllm_gym.eval.results import read_results

ROOT = Path(__file__).parents[2]
SMALL = """
claim: A learned policy is no worse.
seeds: 2
train:
  policy:
    algorithm: grpo
    settings: {env.id: MaskedDiffusion-Countdown-v0, iterations: 1, problems: 1, group: 2, experts: [0.5],
               policy.hidden-dim: 16, policy.mlp-dim: 16, env.num-envs: 4, report.enabled: false}
cells:
  learned: {sampler: "{policy}", env: &env {id: MaskedDiffusion-Countdown-v0, num_envs: 8}, problems: 4}
  thresholds:
    sampler: [threshold:threshold=0.3, threshold:threshold=0.9]
    env: *env
    problems: 4
  blocks:
    sampler: confidence
    env: {id: MaskedDiffusion-Countdown-v0, num_envs: 8, block_length: [4, 12]}
    problems: 4
compare:
  - {first: learned, second: thresholds, metric: nfe}
  - {first: thresholds, second: blocks, metric: accuracy}
"""


@pytest.fixture
def written(tmp_path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "eval/experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_experiments_of_the_repository_can_be_read(path):
    assert read_experiment(path).compare


TRIES = """
claim: Settings are chosen.
seeds: 1
tasks: {sudoku: MaskedDiffusion-Sudoku-v0, gsm8k: MaskedDiffusion-GSM8K-v0}
choose: {sampler: [confidence:k=8, confidence:k=16], problems: 3, settings: {forwards: 30}}
train:
  spg:
    algorithm: spg
    settings: {forwards: 40, problems: 2, group: 2, inner-iterations: 1, env.num-envs: 4, report.enabled: false}
    tries: {learning-rate: [0.0, 1.0]}
cells:
  before: {sampler: confidence:k=8, env: &env {num_envs: 4, denoiser: embedded-early}, problems: 4}
  spg: {sampler: confidence:k=8, env: {<<: *env, denoiser: "{spg}"}, problems: 4}
compare:
  - {first: spg, second: before, metric: accuracy}
"""
CHOICE = next(line for line in TRIES.splitlines() if line.startswith("choose: "))


def test_the_best_try_is_trained_with_the_seeds(tmp_path, capsys):
    """A learning rate of 1 ruins the denoiser, so that one of 0 is chosen; only what was asked for is done."""
    path, folder = tmp_path / "tries.yaml", tmp_path / "out"
    path.write_text(TRIES)
    flags = ["experiment", str(path), "--folder", str(folder), "--workers", "1", "--only", "sudoku-*"]
    assert cli.main(flags) == 0
    table = (folder / "table.md").read_text()
    assert "chose learning-rate 0.0 for sudoku-spg" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        "results", "sudoku-spg-try0", "sudoku-spg-try1", "sudoku-spg-seed0",
    }  # fmt: skip
    tried = [read_results(folder / f"results/sudoku-spg-try{i}.jsonl") for i in (0, 1)]
    for i, cells in enumerate(tried):
        assert [cell.settings["sampler"] for cell in cells] == ["confidence:k=8", "confidence:k=16"]
        assert all([record["index"] for record in cell.problems] == [999_997, 999_998, 999_999] for cell in cells)
        mean = 100 * np.mean([cell.correct.mean() for cell in cells])
        assert f"| sudoku-spg | learning-rate {float(i)} | {mean:.1f} |" in table
    assert "| sudoku-spg | sudoku-before | accuracy | +0.0 [+0.0, +0.0] | +0.0 | 0.50 | +0.0 |" in table
    record = (folder / "sudoku-spg-seed0.json").read_text()
    assert '"learning-rate": 0.0' in record and '"env.id": "MaskedDiffusion-Sudoku-v0"' in record
    assert '"forwards": 40' in record and '"forwards": 30' in (folder / "sudoku-spg-try0.json").read_text()


def test_tasks_are_written_out(tmp_path):
    path = tmp_path / "tries.yaml"
    path.write_text(TRIES)
    whole = read_experiment(path)
    assert list(whole.train) == ["sudoku-spg", "gsm8k-spg"] and len(whole.compare) == 2
    assert whole.cells["gsm8k-spg"].env == {
        "id": "MaskedDiffusion-GSM8K-v0", "num_envs": 4, "denoiser": "{gsm8k-spg}",
    }  # fmt: skip
    part = only(whole, ["gsm8k-before"])
    assert list(part.cells) == ["gsm8k-before"] and not part.train and not part.compare
    with pytest.raises(ValueError, match=r"only='math-\*': no cell has such a name; they are sudoku-before, "):
        only(whole, ["math-*"])


def test_a_star_stands_for_every_training(tmp_path):
    path = tmp_path / "stars.yaml"
    cell = '  "*-fast": {sampler: [confidence:k=8, "{*}"], env: {denoiser: "{*}"}, problems: 4}\ncompare:\n'
    more = cell + '  - {first: "*-fast", second: before, metric: nfe}\n'
    path.write_text(TRIES.replace("compare:\n", more).replace("cells:", "  gdsd: {algorithm: gdsd}\ncells:"))
    whole = read_experiment(path)
    assert [name for name in whole.cells if "fast" in name] == [
        "sudoku-spg-fast", "sudoku-gdsd-fast", "gsm8k-spg-fast", "gsm8k-gdsd-fast",
    ]  # fmt: skip
    grid = whole.cells["gsm8k-gdsd-fast"]
    assert grid.sampler == ["confidence:k=8", "{gsm8k-gdsd}"] and grid.env["denoiser"] == "{gsm8k-gdsd}"
    assert [(entry.first, entry.second) for entry in whole.compare if entry.metric == "nfe"] == [
        (name, f"{name.partition('-')[0]}-before") for name in whole.cells if "fast" in name
    ]


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("choose:", "chose:", "did you mean 'choose'"),
        (CHOICE, "", "sudoku-spg.*have tries"),
        ("{forwards: 30}", "{forwards: 2}", "forwards=2: the first step of 4 completions needs more"),
        ("{forwards: 30}", "{forward: 30}", "not flags of spg"),
        ("{forwards: 30}", "{learning-rate: 1}", "'learning-rate' is what sudoku-spg tries; leave it out"),
        ("{forwards: 30}", "30", "choose, settings: 30, must be names and values"),
        ("algorithm: spg", "algorithm: grpo", "not flags of grpo|tries: unknown 'grpo'"),
        ("learning-rate: [0.0, 1.0]", "learning-rate: 0.1", "must be names and lists"),
        ("forwards: 40", "forwards: 2", "forwards=2: the first step of 4 completions needs more"),
        (
            "cells:",
            "  gdsd: {algorithm: gdsd, settings: {forwards: 400, problems: 2, group: 2}, tries: {psi: [1, 2]}}\ncells:",
            "the forwards differs",
        ),
        (
            "cells:",
            "  gdsd: {algorithm: gdsd, settings: {forwards: 40, problems: 2, group: 2}, tries: {psi: [1]}}\ncells:",
            "the number of tries differs",
        ),
    ],
)
def test_tries_that_are_refused(old, new, named, tmp_path):
    path = tmp_path / "tries.yaml"
    path.write_text(TRIES.replace(old, new, 1))
    with pytest.raises(ValueError, match=named):
        read_experiment(path)


def test_axes_make_variants():
    grid = Grid(["random", "confidence"], {"block_length": [None, 4], "alpha": 2})
    assert len(grid.variants()) == 4 and grid.variants()[1] == ("random", {"block_length": 4, "alpha": 2})
    assert Grid("random").variants() == [("random", {})]


def test_what_draws_nothing_is_evaluated_once():
    assert not draws("threshold:threshold=0.5", {}) and not draws("confidence", {"denoiser": "embedded"})
    for sampler, env in (("random", {}), ("{policy}", {}), ("confidence", {"temperature": 1.0})):
        assert draws(sampler, env)
    assert draws("metropolis", {"temperature": 1.0}) and draws("confidence", {"denoiser": "{spg}"})


def test_an_experiment_runs_and_is_not_repeated(written, tmp_path, capsys):
    folder = tmp_path / "out"
    assert cli.main(["experiment", str(written), "--folder", str(folder), "--workers", "1"]) == 0
    shown = capsys.readouterr().out
    table = (folder / "table.md").read_text()
    assert table.strip() in shown and "A learned policy is no worse." in table
    results = {path.stem: read_results(path)[0] for path in (folder / "results").glob("*.jsonl")}
    names = {"learned-0-seed0", "learned-0-seed1", "thresholds-0-seed0", "thresholds-1-seed0"}
    assert set(results) == names | {"blocks-0-seed0", "blocks-1-seed0"}
    assert results["blocks-0-seed0"].settings["env"]["block_length"] == 4
    weights = {results[f"learned-0-seed{seed}"].settings["policy_settings"]["weights"] for seed in (0, 1)}
    assert len(weights) == 2

    learned = [results[f"learned-0-seed{seed}"].nfe.mean() for seed in (0, 1)]
    faster = min(results[f"thresholds-{i}-seed0"].nfe.mean() for i in (0, 1))
    assert "| learned | thresholds: threshold:threshold=0.3 | nfe |" in table
    assert ", ".join(f"{nfe - faster:+.3f}" for nfe in learned) in table
    # Two variants against two: each with its own.
    for i, block in ((0, 4), (1, 12)):
        accuracy = [100 * results[f"{name}-{i}-seed0"].correct.mean() for name in ("thresholds", "blocks")]
        wanted = f"| blocks: block_length {block} | accuracy | {accuracy[0] - accuracy[1]:+.1f} ["
        assert wanted in table

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jsonl")}
    assert cli.main(["experiment", str(written), "--folder", str(folder), "--workers", "1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.jsonl")} == before
    assert (folder / "table.md").read_text() == table

    # Other settings are other cells, of which only the new ones count.
    more = [str(written), "--folder", str(folder), "--workers", "1", "--problems", "2"]
    assert cli.main(["experiment", *more]) == 0
    both = read_results(folder / "results" / "learned-0-seed0.jsonl")
    assert [len(cell.problems) for cell in both] == [4, 2]
    accuracy = [100 * read_results(folder / f"results/learned-0-seed{n}.jsonl")[1].correct.mean() for n in (0, 1)]
    assert (
        f"| {np.mean(accuracy):.1f} | {', '.join(f'{a:.1f}' for a in accuracy)} |" in (folder / "table.md").read_text()
    )
    written.write_text(SMALL.replace("group: 2", "group: 3"))
    assert cli.main(["experiment", *more]) == 1
    assert "trained with other settings" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_one_process_in_a_folder_and_no_worker_without_it(number, written, tmp_path, capsys):
    written.write_text(SMALL.replace("iterations: 1,", "iterations: 1000000,"))
    arguments = ["experiment", str(written), "--folder", str(tmp_path / "out"), "--workers", "1"]
    running = subprocess.Popen([sys.executable, "-m", "dllm_gym.eval", *arguments], cwd=ROOT)
    try:
        metrics = tmp_path / "out" / "policy-seed0" / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size):
            assert running.poll() is None
            time.sleep(0.2)
        assert cli.main(arguments) == 2
        assert f"process {running.pid} on" in capsys.readouterr().err
        workers = psutil.Process(running.pid).children(recursive=True)
        running.send_signal(number)
        code = running.wait(timeout=60)
    finally:
        running.kill()
    assert workers and not psutil.wait_procs(workers, timeout=60)[1]
    assert bool(list(metrics.parent.glob("checkpoint-*"))) == (number == signal.SIGTERM), "asked to end, it saves"
    assert abs(code) == number if number == signal.SIGKILL else code == 128 + number
    assert not (tmp_path / "out" / "policy-seed1").exists(), "and begins nothing else"


def test_what_is_trained_again_is_evaluated_again(written, tmp_path):
    arguments = ["experiment", str(written), "--folder", str(tmp_path / "out"), "--workers", "1", "--seeds", "1"]
    assert cli.main(arguments) == 0
    results = tmp_path / "out" / "results"
    before = {path.name: read_results(path)[0].settings for path in results.glob("*.jsonl")}
    shutil.rmtree(tmp_path / "out" / "policy-seed0")
    (tmp_path / "out" / "policy-seed0.json").unlink()
    written.write_text(SMALL.replace("group: 2", "group: 3"))
    assert cli.main(arguments) == 0
    for path in results.glob("*.jsonl"):
        (cell,) = read_results(path)
        assert (cell.settings == before[path.name]) == (not path.name.startswith("learned"))


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("seeds:", "seed:", ["unknown 'seed'", "did you mean 'seeds'"]),
        ("num_envs: 8, block", "num_env: 8, block", ["cells.blocks.env", "'num_env'", "did you mean 'num_envs'"]),
        ("sampler: confidence", "samper: confidence", ["cells.blocks", "did you mean 'sampler'"]),
        ("second: blocks", "second: block", ["compare", "did you mean 'blocks'"]),
        ('"{policy}"', '"{polcy}"', ["cells.learned", "'polcy'", "did you mean 'policy'"]),
        ("algorithm: grpo", "algoritm: grpo", ["train.policy", "did you mean 'algorithm'"]),
        ("sampler: confidence", "split: test", ["cells.blocks", "sampler"]),
        ("claim: A", "claim: [A", ["not YAML"]),
        ("sampler: confidence", "sampler: confidense", ["'confidense'", "confidence"]),
        ("cells:", "cells:\nunused:", ["unknown 'unused'"]),
        ("metric: nfe", "metric: speed", ["metric='speed'"]),
        ("metric: nfe", "metric: pass@2", ["k=2: must be 1 to 1"]),
        ("algorithm: grpo", "algorithm: gpro", ["train.policy", "did you mean 'grpo'"]),
        ("iterations: 1,", "iteration: 1,", ["--iteration", "train.policy: not flags of grpo"]),
        ("iterations: 1,", "iterations: one,", ["--iterations", "train.policy: not flags of grpo"]),
        ("problems: 4", "problems: ten", ["cells.learned: problems and samples must be 1 or more"]),
        ("problems: 4", "problems: 8", ["compare learned and thresholds: other problems"]),
        ("&env {id: MaskedDiffusion-Countdown-v0", "&env {id: Countdown", ["env.id='Countdown': must be one of"]),
        ('sampler: "{policy}", env: &env {id', "sampler: , env: &env {id", ["cells.learned: sampler is empty"]),
    ],
)
def test_mistakes_are_one_line(old, new, named, written, tmp_path, capsys):
    written.write_text(SMALL.replace(old, new, 1))
    folder = ["--folder", str(tmp_path / "out"), "--workers", "1", "--seeds", "1"]
    assert cli.main(["experiment", str(written), *folder]) == 2
    line = capsys.readouterr().err
    assert all(text in line for text in named), line


def test_no_such_file(capsys):
    assert cli.main(["experiment", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_the_best_variant_is_chosen_on_validation_problems(tmp_path):
    """Of the last training problems; what is compared are the test problems."""
    path, folder = tmp_path / "chosen.yaml", tmp_path / "out"
    env = "{id: MaskedDiffusion-Countdown-v0, num_envs: 8}"
    path.write_text(
        f"claim: One is chosen.\nseeds: 1\ncells:\n  plain: {{sampler: confidence, env: {env}, problems: 4}}\n"
        f"  thresholds: {{sampler: [threshold:threshold=0.2, threshold:threshold=0.9], env: {env}, problems: 4, "
        f"validation: 3}}\ncompare:\n  - {{first: plain, second: thresholds}}\n"
    )
    assert cli.main(["experiment", str(path), "--folder", str(folder), "--workers", "1"]) == 0
    results = {path.stem: read_results(path)[0] for path in (folder / "results").glob("*.jsonl")}
    judged = [results[f"thresholds-{i}-seed0-validation"] for i in range(2)]
    assert [[record["index"] for record in cell.problems] for cell in judged] == [[999_997, 999_998, 999_999]] * 2
    assert all(cell.settings["split"] == "train" and not cell.films for cell in judged)
    best = max((0, 1), key=lambda i: judged[i].reward.mean())
    difference = results["plain-0-seed0"].reward.mean() - results[f"thresholds-{best}-seed0"].reward.mean()
    row = next(
        line for line in (folder / "table.md").read_text().splitlines() if line.startswith("| plain | thresholds")
    )
    assert f"threshold={(0.2, 0.9)[best]}" in row and f"{difference:+.3f} [" in row
