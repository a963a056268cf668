"""Runs of the sampler's trainers and of sft: their folder, checkpoints, resuming, signals."""

import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interrupted import interrupted
from policies import TINY, see, truncate

from dllm_gym import load_denoiser
from dllm_gym.agents import load_policy
from dllm_gym.agents.environment import EnvConfig
from dllm_gym.agents.trainers import sft
from dllm_gym.agents.trainers.policy import grpo, ppo, sb3_ppo
from dllm_gym.agents.trainers.policy.comparison import ReportConfig
from dllm_gym.agents.trainers.policy.grpo import GRPOConfig
from dllm_gym.agents.trainers.policy.ppo import PPOConfig
from dllm_gym.agents.trainers.policy.sb3_ppo import SB3PPOConfig
from dllm_gym.agents.trainers.run import Run, handled
from dllm_gym.agents.trainers.sft import SFTConfig
from dllm_gym.tasks.countdown import Countdown

ROOT = Path(__file__).parents[2]

# Runs and resuming

COUNTDOWN = EnvConfig(id="MaskedDiffusion-Countdown-v0", num_envs=6)
SHARED = {"env": COUNTDOWN, "policy": TINY, "report": ReportConfig(enabled=False), "threads": 1, "checkpoint_every": 2}
RUNS = {
    "grpo": (grpo, GRPOConfig(**SHARED, iterations=4, problems=2, group=3, experts=(0.5,), warmup=1)),
    "ppo": (ppo, PPOConfig(**SHARED, iterations=4, episodes=5, epochs=2, minibatches=2, warmup=1)),
    "sb3-ppo": (
        sb3_ppo,
        SB3PPOConfig(**SHARED | {"checkpoint_every": 1}, timesteps=192, steps=4, batch_size=12, epochs=1),
    ),
    "sft": (
        sft,
        SFTConfig(
            {"countdown": 2}, steps=4, hidden_size=16, num_layers=1, num_heads=2, log_every=1, checkpoint_every=2
        ),
    ),
}


WEIGHTS = [(name, "policy/policy.safetensors") for name in ("grpo", "ppo")] + [("sft", "denoiser/model.safetensors")]


@pytest.fixture
def play(tmp_path, monkeypatch):
    """Train into ``tmp_path / name``; after line ``kill_at`` of the log it dies, after ``signal_at`` comes Ctrl-C."""
    monkeypatch.setattr(sft, "build_tokenizer", functools.partial(sft.build_tokenizer, samples=200))

    def play(
        algorithm: str, name: str, *, kill_at: int = 0, signal_at: int = 0, resume: bool = False, **changes
    ) -> Path:
        module, config = RUNS[algorithm]
        folder = tmp_path / name
        where = {"resume": str(folder)} if resume else {"run_dir": str(folder)}
        with interrupted(kill_at, signal_at):
            assert module.train(replace(config, **where, **changes)) == folder
        return folder

    return play


def metrics_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "examples_per_second")} for row in rows]


def contents(folder: Path) -> dict[Path, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".lock"))
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize(("algorithm", "weights"), WEIGHTS)
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(algorithm, weights, play):
    whole = play(algorithm, "whole")
    killed = play(algorithm, "killed", kill_at=3)
    assert len(metrics_of(killed)) == 3 and not (killed / weights).exists()
    resumed = play(algorithm, "killed", resume=True)
    assert (resumed / weights).read_bytes() == (whole / weights).read_bytes()
    assert metrics_of(resumed) == metrics_of(whole) and len(metrics_of(whole)) == 4
    assert (resumed / "summary.json").exists()


def test_sb3_resumes_from_its_checkpoint(play):
    folder = play("sb3-ppo", "run", kill_at=2)
    before = [row["step"] for row in metrics_of(folder)]
    assert before == sorted(set(before)) and max(before) < 192
    last = metrics_of(play("sb3-ppo", "run", resume=True))
    assert [row["step"] for row in last] == sorted({row["step"] for row in last}) and last[-1]["step"] == 192
    trained = load_policy(folder)
    play("sb3-ppo", "run", resume=True)  # nothing is left to train: the weights are the checkpoint's
    assert torch.equal(load_policy(folder).logits(see()), trained.logits(see()))


def newest(folder: Path) -> Path:
    return sorted(folder.glob("checkpoint-*"))[-1]


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
def test_truncated_checkpoint(file, play):
    folder = play("grpo", "run", kill_at=3)
    truncate(newest(folder) / file)
    before = contents(folder)
    with pytest.raises(ValueError) as caught:
        play("grpo", "run", resume=True)
    assert "checkpoint-000002" in str(caught.value) and "\n" not in str(caught.value)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("changes", "part"),
    [({"iterations": 9}, "iterations: 4 -> 9"), ({"env": replace(COUNTDOWN, alpha=2.0)}, "'alpha': 2.0")],
)
def test_resuming_into_another_config_damages_nothing(changes, part, play):
    folder = play("grpo", "run", kill_at=3)
    before = contents(folder)
    with pytest.raises(ValueError) as caught:
        play("grpo", "run", resume=True, **changes)
    assert part in str(caught.value) and "\n" not in str(caught.value)
    assert contents(folder) == before


def test_resuming_what_is_no_run_or_has_no_checkpoint(play):
    for kind in ("none", "early"):
        if kind == "early":
            play("grpo", "run", kill_at=1)
        with pytest.raises(ValueError, match="no checkpoint" if kind == "early" else "not the folder of a run"):
            play("grpo", "run", resume=True)


def test_a_folder_that_holds_a_run_is_refused(play):
    folder = play("grpo", "run", kill_at=1)
    before = contents(folder)
    with pytest.raises(FileExistsError, match="holds a run already"):
        play("grpo", "run")
    assert contents(folder) == before


def test_checkpoints_keep_the_newest_two_and_whatever_a_state_holds(tmp_path):
    state = {"a": {0: {"step": torch.tensor(3.0), "betas": [0.9, 0.99]}}, "b": [{"c": torch.arange(4)}, None, "x"]}
    with Run("grpo", GRPOConfig(run_dir=str(tmp_path / "run"))) as run:
        for step in (999_998, 999_999, 1_000_001):  # the last is not the last in alphabetical order
            run.save(step, state | {"number": step})
    assert sorted(path.name for path in run.folder.glob("checkpoint*")) == ["checkpoint-1000001", "checkpoint-999999"]
    step, loaded = Run("grpo", GRPOConfig(resume=str(run.folder))).load()
    assert (step, loaded["number"]) == (1_000_001, 1_000_001)
    torch.testing.assert_close(loaded["a"], state["a"])
    assert torch.equal(loaded["b"][0]["c"], torch.arange(4)) and loaded["b"][1:] == [None, "x"]


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_loss_that_is_not_finite_stops_with_step_and_problems(algorithm, play, monkeypatch):
    module = RUNS[algorithm][0]
    loss = getattr(module, f"{algorithm}_loss")
    monkeypatch.setattr(module, f"{algorithm}_loss", lambda *args: (loss(*args)[0] * math.nan, loss(*args)[1]))
    with pytest.raises(FloatingPointError, match=r"step 1: .*gradient_norm.* problems \[\d+, "):
        play(algorithm, "run")


@pytest.mark.parametrize(("algorithm", "result"), [*WEIGHTS, ("sb3-ppo", "policy/policy.safetensors")])
def test_control_c_leaves_a_checkpoint(algorithm, result, play):
    handler = signal.getsignal(signal.SIGINT)
    folder = play(algorithm, "run", signal_at=1)
    assert signal.getsignal(signal.SIGINT) is handler
    (last,) = metrics_of(folder)
    assert last["step"] <= int(newest(folder).name.split("-")[1]) and not (folder / result).exists()
    play(algorithm, "run", resume=True)
    assert (folder / result).exists() and len(metrics_of(folder)) > 1


def test_whoever_asks_again_does_not_want_to_wait(tmp_path, monkeypatch):
    """But a launcher passes Ctrl-C on to processes that have it already, and SIGTERM is always patient."""
    clock = [100.0]
    monkeypatch.setattr("dllm_gym.agents.trainers.run.time.monotonic", lambda: clock[0])
    with pytest.raises(KeyboardInterrupt), Run("grpo", GRPOConfig(run_dir=str(tmp_path / "run"))) as run:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert run.stop_requested
        clock[0] += 3
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the run goes on")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL, lambda *_: None])
def test_a_run_leaves_signals_as_they_were(tmp_path, before):
    """What is ignored stays ignored, as under nohup."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    old = [signal.signal(number, before) for number in numbers]
    try:
        with Run("grpo", GRPOConfig(run_dir=str(tmp_path / "run"))) as run:
            if before is signal.SIG_IGN:
                for number in numbers:
                    os.kill(os.getpid(), number)
            assert not run.stop_requested
            assert all((signal.getsignal(number) is before) == (before is signal.SIG_IGN) for number in numbers)
        assert all(signal.getsignal(number) is before for number in numbers)
    finally:
        for number, handler in zip(numbers, old, strict=True):
            signal.signal(number, handler)


def test_a_handler_from_outside_python_stays(monkeypatch):
    """`signal.getsignal` knows it as None, and `signal.signal` could not put it back."""
    look, before = signal.getsignal, signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(signal, "getsignal", lambda _: None)
    with handled(lambda *_: None, signal.SIGTERM):
        assert look(signal.SIGTERM) is before
    assert look(signal.SIGTERM) is before


def test_control_c_in_the_comparison_comes_too_late(tmp_path):
    with Run("grpo", GRPOConfig(run_dir=str(tmp_path / "run"))) as run:
        os.kill(os.getpid(), signal.SIGINT)
        run.finish({})


def test_the_comparison_may_change_when_a_run_is_resumed(play):
    play("grpo", "run", kill_at=3)
    folder = play("grpo", "run", resume=True, report=ReportConfig(enabled=False, problems=7))
    assert (folder / "summary.json").exists()


def test_a_reward_that_is_no_number_is_left_out_with_a_warning(play, monkeypatch, capsys):
    verify, seen = Countdown.verify, []

    def broken(task, problem, text):
        seen.append(problem.id)
        return replace(verify(task, problem, text), score=math.nan if len(seen) == 2 else 0.5 * (len(seen) % 2))

    monkeypatch.setattr(Countdown, "verify", broken)
    rows = metrics_of(play("grpo", "run"))
    warning = capsys.readouterr().err
    assert warning.count("excluded") == 1 and seen[1] in warning and len(rows) == 4


def test_sigterm_leaves_a_checkpoint_and_resume_finishes(tmp_path):
    folder = tmp_path / "run"
    flags = "--env.id MaskedDiffusion-Countdown-v0 --env.num-envs 4 --policy.hidden-dim 16 --policy.mlp-dim 32"
    flags += " --iterations 30 --problems 2 --group 2 --experts --threads 1 --checkpoint-every 1000"
    flags += " --report.problems 2 --report.validation-problems 2 --report.no-heuristics --report.thresholds 0.5"
    command = [sys.executable, "train_policy.py", "grpo"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *flags.split(), "--run-dir", str(folder)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        while process.poll() is None and not (folder / "metrics.jsonl").exists():
            time.sleep(0.02)
        process.terminate()
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 143
    assert f"--resume {folder}" in output
    steps = [row["step"] for row in metrics_of(folder)]
    assert 1 <= len(steps) < 30 and newest(folder).name == f"checkpoint-{len(steps):06d}"
    assert not (folder / "policy").exists()
    done = subprocess.run(
        [*command, "--resume", str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics_of(folder)] == list(range(1, 31))
    assert set(json.loads((folder / "summary.json").read_text())["rows"]) == {"untrained", "GRPO", "threshold 0.5"}


def test_sft_starts_from_a_denoiser(tmp_path):
    still = SFTConfig(
        init="embedded", steps=1, muon_lr=0.0, adamw_lr=0.0, weight_decay=0.0, bf16=False, run_dir=str(tmp_path / "run")
    )
    folder = sft.train(replace(still, batch={"countdown": 2, "gsm8k": 1, "sudoku": 1}))
    mine, theirs = (load_denoiser(name).model.state_dict() for name in (folder / "denoiser", "embedded"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"attention": "bidirectional"}, {"init": "oracle"}])
def test_sft_refuses_to_start_from_another_kind(change, tmp_path):
    config = SFTConfig(init="embedded", steps=1, run_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"init='\w+': has "):
        sft.train(replace(config, **change))
    assert not (tmp_path / "run").exists()


def test_sft_trains_bidirectional_denoisers_too(tmp_path):
    config = SFTConfig(attention="bidirectional", steps=1, hidden_size=16, num_heads=2, num_layers=1, bf16=False)
    folder = sft.train(replace(config, batch={"countdown": 2}, run_dir=str(tmp_path / "run")))
    denoiser = load_denoiser(folder / "denoiser")
    assert denoiser.pattern.name == "bidirectional" and denoiser.caches == ("none", "prefix", "dual")
