"""The evaluation's command line and the throughput benchmark, on the embedded Countdown task."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dllm_gym
from dllm_gym import agents
from dllm_gym.agents.config import EnvConfig, make_env
from dllm_gym.agents.heuristics import HEURISTICS
from dllm_gym.agents.policy import PolicyConfig, UnmaskingPolicy
from dllm_gym.agents.samplers import make_sampler
from dllm_gym.eval import throughput
from dllm_gym.eval.cli import main

ROOT = Path(__file__).parents[1]
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
    for text in ("MaskedDiffusion-Countdown-v0, 6 test problems", *samplers[1::2], "accuracy %", "NFE", "reward"):
        assert text in shown
    assert shown.count("minus threshold:threshold=0.5: accuracy") == 2

    threshold, confidence, margin = (json.loads(line) for line in output.read_text().splitlines())
    assert [r["sampler"] for r in (threshold, confidence, margin)] == samplers[1::2]
    assert threshold["policy_settings"] == {"threshold": 0.5} and margin["policy_settings"] == {"k": 1}
    for record in (threshold, confidence, margin):
        env = record["env"]
        assert env["id"] == "MaskedDiffusion-Countdown-v0" and env["dataset"] == "embedded"
        assert (env["gen_length"], env["block_length"], env["confidence_k"], env["num_envs"]) == (12, 4, 2, 4)
        assert (record["problems"], record["split"], record["seed"]) == (6, "test", 3)
        assert record["version"] == dllm_gym.__version__
        assert record["problem_id"] == [f"countdown/embedded/test/{i}" for i in range(6)]
        assert len(record["completion"]) == 6 and all(isinstance(text, str) for text in record["completion"])
        assert record["summary"]["accuracy"] == np.mean(record["correct"])
        assert record["summary"]["reward"] == pytest.approx(np.mean(record["reward"]))
        rewards = [score * (13 - n) / 12 for score, n in zip(record["score"], record["nfe"], strict=True)]
        assert record["reward"] == pytest.approx(rewards)
    # Twelve a step is a whole block of 4 a step; and one a step is the slowest.
    assert set(confidence["nfe"]) == {3}
    assert all(3 <= n <= 12 for n in threshold["nfe"]) and np.mean(margin["nfe"]) > np.mean(threshold["nfe"])
    assert f"{12 / 3:.2f}" in shown
    paired = np.mean(confidence["reward"]) - np.mean(threshold["reward"])
    assert f"reward {paired:+.3f}" in shown


def test_results_do_not_depend_on_the_company(tmp_path):
    """Rows, problems and other samplers change nothing of what one sampler does on one problem."""
    alone, beside = tmp_path / "alone.jsonl", tmp_path / "beside.jsonl"
    drawn = ["--env.temperature", "0.7", "--problems", "3"]
    assert main([*COUNTDOWN, *THRESHOLD, *drawn, "--output", str(alone)]) == 0
    more = [*COUNTDOWN, "--env.num-envs", "2", "--sampler", "entropy-bounded:gamma=1.0", *THRESHOLD]
    assert main([*more, *drawn, "--output", str(beside)]) == 0
    (first,), (_, second) = ([json.loads(line) for line in f.read_text().splitlines()] for f in (alone, beside))
    for key in ("completion", "nfe", "correct", "reward"):
        assert first[key] == second[key]


def test_an_existing_file_is_kept_unless_told(tmp_path, capsys):
    output = tmp_path / "results.jsonl"
    output.write_text("mine\n")
    flags = [*COUNTDOWN, *THRESHOLD, "--problems", "1", "--output", str(output)]
    assert main(flags) == 2
    assert str(output) in error_line(capsys) and output.read_text() == "mine\n"
    assert main([*flags, "--overwrite"]) == 0
    assert json.loads(output.read_text())["sampler"] == THRESHOLD[1]
    assert list(tmp_path.iterdir()) == [output]


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
        record = json.loads(output.read_text())
        assert record["env"]["confidence_k"] == 2 and record["env"]["gen_length"] == length
        assert record["policy_settings"]["hidden_dim"] == 16
        assert all(1 <= n < length for n in record["nfe"])


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
    for line in ("time in the denoiser's forward", "vector environment", "bare forward", "decoding"):
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
