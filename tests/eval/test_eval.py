"""The evaluation's command line and the throughput benchmark, on the embedded Countdown task."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import dllm_gym
from dllm_gym import agents
from dllm_gym.agents.environment import EnvConfig, make_env
from dllm_gym.agents.samplers.heuristics import HEURISTICS
from dllm_gym.agents.samplers.policy import PolicyConfig, UnmaskingPolicy
from dllm_gym.agents.samplers.spec import make_sampler
from dllm_gym.eval.benchmarks import decoding as throughput
from dllm_gym.eval.cli import main
from dllm_gym.eval.evaluate import CellConfig, evaluate_cell
from dllm_gym.eval.metrics import aup
from dllm_gym.eval.results import read_results
from dllm_gym.eval.tables import fronts, print_cells, settings_that_differ

ROOT = Path(__file__).parents[2]
COUNTDOWN = ["--env.id", "MaskedDiffusion-Countdown-v0", "--env.num-envs", "4"]
THRESHOLD = ["--sampler", "threshold:threshold=0.5"]


@pytest.fixture
def policy_folder(tmp_path) -> Path:
    """An untrained policy that reads two confidences, and unmasks often."""
    config = PolicyConfig(confidence_k=2, hidden_dim=16, mlp_dim=32, initial_bias=0.0)
    return UnmaskingPolicy(config).save(tmp_path / "untrained")


def error_line(capsys) -> str:
    """The one line of an error, nothing but its hint beside it."""
    shown = capsys.readouterr().err.strip().splitlines()
    (line,) = (line for line in shown if line.startswith("error: "))
    assert len(shown) <= 2
    return line


def plain(text: str) -> str:
    """A table's text without its lines and line breaks."""
    return " ".join("".join(" " if c in "│┃" else c for c in text).split())


def test_table_and_output_file(tmp_path, capsys):
    output = tmp_path / "new" / "results.jsonl"
    samplers = [*THRESHOLD, "--sampler", "confidence:k=12", "--sampler", "margin"]
    flags = ["--env.block-length", "4", "--problems", "6", "--seed", "3", "--output", str(output)]
    assert main([*COUNTDOWN, *samplers, *flags]) == 0
    shown = plain(capsys.readouterr().out)
    for text in ("MaskedDiffusion-Countdown-v0, embedded, 6 test problems", *samplers[1::2], "accuracy %", "NFE"):
        assert text in shown
    assert shown.count("minus threshold:threshold=0.5: accuracy") == 2

    cells = read_results(output)
    threshold, confidence, margin = cells
    assert [cell.settings["sampler"] for cell in cells] == samplers[1::2]
    assert threshold.settings["policy_settings"] == {"threshold": 0.5}
    assert margin.settings["policy_settings"] == {"k": 1} and margin.settings["policy"] == "Margin"
    assert [cell.settings["env"]["confidence_k"] for cell in cells] == [1, 1, 2]
    for cell in cells:
        settings, env = cell.settings, cell.settings["env"]
        assert env["id"] == "MaskedDiffusion-Countdown-v0" and env["dataset"] == env["denoiser"] == "embedded"
        assert (env["gen_length"], env["block_length"], env["num_envs"]) == (12, 4, 4)
        assert [settings[name] for name in ("problems", "samples", "split", "seed")] == [6, 1, "test", 3]
        assert settings["version"] == dllm_gym.__version__
        rewards = cell.score * (13 - cell.nfe) / 12
        assert cell.reward == pytest.approx(rewards) and cell.length.max() <= 12
    # Twelve a step is a whole block of 4 a step; and one a step is the slowest.
    assert (confidence.nfe == 3).all()
    assert ((threshold.nfe >= 3) & (threshold.nfe <= 12)).all() and margin.nfe.mean() > threshold.nfe.mean()
    assert f"{confidence.length.sum() / confidence.nfe.sum():.2f}" in shown
    assert "accuracy under parallelism" not in shown
    assert f"reward {np.mean(confidence.reward) - np.mean(threshold.reward):+.3f}" in shown


def test_settings_that_differ_are_columns(tmp_path, capsys):
    drawn = replace(EnvConfig(id="MaskedDiffusion-Countdown-v0", num_envs=4), temperature=0.7)
    cells = [
        evaluate_cell(CellConfig("threshold", drawn, problems=2, films=0)),
        evaluate_cell(CellConfig("threshold", replace(drawn, temperature=0.9, num_envs=2), problems=2, films=0)),
    ]
    assert settings_that_differ(cells) == {"env.temperature": [0.7, 0.9], "env.num_envs": [4, 2]}
    print_cells(cells)
    shown = plain(capsys.readouterr().out)
    assert "temperature num_envs accuracy %" in shown and "0.7" in shown and "0.9" in shown


def test_the_number_of_threads_changes_nothing():
    env = EnvConfig(id="MaskedDiffusion-Countdown-v0", num_envs=8, temperature=0.7)
    cells = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        cells.append(evaluate_cell(CellConfig("threshold", env, problems=7, samples=2, films=0)))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    one, three = ([{**p, "log_likelihood": None} for p in cell.problems] for cell in cells)
    assert one == three and cells[0].key == cells[1].key


def test_chains_that_are_not_exact_are_labelled(capsys):
    env = EnvConfig(id="MaskedDiffusion-Oracle-v0", num_envs=8, temperature=1.0)
    text = "metropolis:steps=2,likelihood=elbo,maskings=2,proposal=threshold"
    print_cells([evaluate_cell(CellConfig(text, env, problems=2))])
    assert "(approximate)" in plain(capsys.readouterr().out)


def test_fronts_of_samplers_with_several_settings():
    env = EnvConfig(id="MaskedDiffusion-Countdown-v0", num_envs=8)
    texts = ("threshold:threshold=0.3", "threshold:threshold=0.9", "confidence:k=1")
    cells = [evaluate_cell(CellConfig(text, env, problems=8, films=0)) for text in texts]
    best = max(cell.correct.mean() for cell in cells)
    points = [(cell.length.sum() / cell.nfe.sum(), cell.correct.mean()) for cell in cells[:2]]
    assert fronts(cells) == {"threshold": pytest.approx(aup(*zip(*points, strict=True), best))}
    blocks = [evaluate_cell(CellConfig(text, replace(env, block_length=4), problems=8, films=0)) for text in texts[:2]]
    assert set(fronts([*cells, *blocks])) == {"threshold, block_length None", "threshold, block_length 4"}


def test_metropolis_and_samples_from_the_command_line(tmp_path, capsys):
    output = tmp_path / "results.jsonl"
    chains = ["--sampler", "metropolis:alpha=4,steps=3,proposal=left-to-right"]
    drawn = ["--env.temperature", "1", "--samples", "4", "--problems", "3"]
    assert main([*COUNTDOWN, *chains, "--sampler", "random", *drawn, "--output", str(output)]) == 0
    shown = plain(capsys.readouterr().out)
    assert "pass@2 pass@4" in shown
    chain, random = read_results(output)
    assert chain.settings["policy_settings"]["proposal"] == "left-to-right"
    assert chain.settings["policy_settings"]["approximate"] is False and "approximate" not in shown
    assert (chain.nfe == 4 * 12).all() and (random.nfe == 12).all() and chain.correct.shape == (3, 4)
    assert len(chain.end["chain"]["acceptance"]) == 3 and len(chain.end["chain"]["log_likelihood"]) == 4
    assert not chain.films and len(random.films) == 3


def test_results_do_not_depend_on_the_company(tmp_path):
    """Rows, problems and other samplers change nothing of what one sampler does on one problem."""
    alone, beside = tmp_path / "alone.jsonl", tmp_path / "beside.jsonl"
    drawn = ["--env.temperature", "0.7", "--problems", "3"]
    assert main([*COUNTDOWN, *THRESHOLD, *drawn, "--output", str(alone)]) == 0
    more = [*COUNTDOWN, "--env.num-envs", "2", "--sampler", "entropy-bounded:gamma=1.0", *THRESHOLD]
    assert main([*more, *drawn, "--output", str(beside)]) == 0
    (first,), (_, second) = read_results(alone), read_results(beside)
    for key in ("completion", "nfe", "correct", "reward"):
        assert [p[key] for p in first.problems] == [p[key] for p in second.problems]


def test_a_file_of_something_else_is_left_alone(tmp_path, capsys):
    output = tmp_path / "results.jsonl"
    output.write_text("mine\n")
    assert main([*COUNTDOWN, *THRESHOLD, "--problems", "1", "--output", str(output)]) == 2
    assert f"{str(output)!r}, line 1: not a result" in error_line(capsys) and output.read_text() == "mine\n"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], ["--sampler"]),
        (["--sampler", "treshold"], ["'treshold'", *HEURISTICS]),
        (["--sampler", "threshold:level=0.9"], ["'threshold'", "level", "threshold"]),
        (["--sampler", "threshold:0.9"], ["'threshold:0.9'", "argument=number"]),
        (["--sampler", "confidence:k=two"], ["k=two"]),
        (["--sampler", "confidence:k=0"], ["k=0"]),
        (["--sampler", "runs/nowhere"], ["'runs/nowhere'", "folder"]),
        (["--sampler", "{empty}"], ["{empty}", "policy.safetensors"]),
        ([*THRESHOLD, "--env.id", "MaskedDiffusion-Chess-v0"], ["Diffusion-Chess-v0", "MaskedDiffusion-GSM8K-v0"]),
        ([*THRESHOLD, "--env.block-length", "5"], ["block_length=5", "gen_length=12"]),
        ([*THRESHOLD, "--split", "validation"], ["'validation'", "'test'"]),
        ([*THRESHOLD, "--problems", "0"], ["problems=0"]),
        ([*THRESHOLD, "--samples", "0"], ["samples=0"]),
        ([*THRESHOLD, "--samples", "2"], ["samples=2: threshold", "draws nothing"]),
        (["--sampler", "metropolis:alpha=0"], ["alpha=0"]),
        (["--sampler", "metropolis:alfa=4"], ["does not take alfa", "alpha"]),
        (["--sampler", "metropolis:steps=2.5"], ["steps=2.5"]),
        (["--sampler", "metropolis:proposal=best"], ["proposal='best'", "left-to-right"]),
        (["--sampler", "metropolis"], ["temperature=0.0", "1.0"]),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(flags, named, tmp_path, capsys):
    empty, output = tmp_path / "empty", tmp_path / "results.jsonl"
    empty.mkdir()
    flags = [flag.format(empty=empty) for flag in flags]
    assert main([*COUNTDOWN, "--output", str(output), *flags]) == 2
    line = error_line(capsys)
    assert all(text.format(empty=empty) in line for text in named)
    assert not output.exists()


def test_a_saved_policy_is_evaluated_on_two_tasks(policy_folder, tmp_path):
    for task, length in (("Countdown", 12), ("Sudoku", 16)):
        output = tmp_path / f"{task}.jsonl"
        flags = ["--env.id", f"MaskedDiffusion-{task}-v0", "--problems", "2", "--env.num-envs", "2"]
        assert main([*flags, "--sampler", str(policy_folder), "--output", str(output)]) == 0
        (cell,) = read_results(output)
        assert cell.settings["env"]["confidence_k"] == 2 and cell.settings["env"]["gen_length"] == length
        assert cell.settings["policy_settings"]["hidden_dim"] == 16
        assert ((cell.nfe >= 1) & (cell.nfe < length)).all()


def test_seed_reaches_samplers_that_draw(policy_folder):
    assert make_sampler("random:k=2", seed=5).seed == 5
    assert make_sampler("random:k=2,seed=1", seed=5).seed == 1
    assert make_sampler(str(policy_folder), seed=5).generator.initial_seed() == 5


def test_public_names_of_the_agents():
    env = make_env(EnvConfig(id="MaskedDiffusion-Countdown-v0", num_envs=2))
    policy = agents.make_policy("threshold", threshold=0.5)
    evaluation, rollout = agents.evaluate(env, policy, [0, 1, 2]), agents.collect(env, policy, [0, 1, 2])
    assert evaluation.completions == rollout.completions and len(rollout) == 3
    assert agents.load_policy.__name__ == "load_policy"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = agents.no_such_name


def test_help_from_a_bare_checkout():
    done = subprocess.run([sys.executable, "-m", "dllm_gym.eval", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--sampler" in done.stdout and "--env.block-length" in done.stdout


def test_throughput_prints_every_line(capsys):
    flags = ["--episodes", "5", "--steps", "3", "--repeats", "1", "--threads", "1", "--env.block-length", "6"]
    assert throughput.main([*COUNTDOWN, "--env.num-envs", "2", *flags]) == 0
    shown = plain(capsys.readouterr().out)
    for line in ("time in the denoiser's forward", "vector environment", "bare forward", "evaluation"):
        assert line in shown
    assert "identical completions 5 of 5" in shown
    assert "MaskedDiffusion-Countdown-v0" in shown and "1 threads" in shown


def test_throughput_leaves_the_denoiser_as_it_was(embedded):
    env = make_env(EnvConfig(id="MaskedDiffusion-Countdown-v0", denoiser=embedded, num_envs=2))
    share = throughput.step_vector(env, 2, 0.5)
    assert 0 < share <= 1 and "predict" not in vars(embedded)


def test_the_static_baseline_decodes_what_the_environment_does(embedded):
    env = make_env(EnvConfig(id="MaskedDiffusion-Sudoku-v0", denoiser=embedded, num_envs=4), "test")
    texts = throughput.decode_static(env.episodes, list(range(6)), rows=4, threshold=0.6)
    policy = agents.make_policy("threshold", threshold=0.6)
    assert texts == agents.evaluate(env, policy, range(6)).completions


def test_throughput_mistake(capsys):
    assert throughput.main(["--repeats", "0"]) == 2
    assert "repeats=0" in error_line(capsys)


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dllm_gym.eval.cli.evaluate_cell", interrupted)
    assert main([*COUNTDOWN, *THRESHOLD]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"
