"""Training the sampler in two processes. Run by `torch.distributed.run`, this file is itself what they execute."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dllm_gym.agents import cli, load_policy
from dllm_gym.agents.environment import EnvConfig
from dllm_gym.agents.samplers.policy import PolicyConfig
from dllm_gym.agents.trainers.policy import grpo, ppo
from dllm_gym.agents.trainers.policy.comparison import ReportConfig
from dllm_gym.agents.trainers.policy.grpo import GRPOConfig
from dllm_gym.agents.trainers.policy.ppo import PPOConfig
from dllm_gym.agents.trainers.processes import Processes
from dllm_gym.agents.trainers.run import Run

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
ITERATIONS = 4


def configs(folder: Path) -> dict:
    """What is trained; 3 problems and 5 episodes, so that the processes have unequal shares."""
    shared = {
        "env": EnvConfig("MaskedDiffusion-Countdown-v0", temperature=1.0, num_envs=4),
        "policy": PolicyConfig(hidden_dim=16, mlp_dim=32),
        "report": ReportConfig(enabled=False),
        "iterations": ITERATIONS,
        "checkpoint_every": 1,
    }
    with_experts = shared | {"problems": 3, "group": 2, "experts": (0.7,), "expert_iterations": 2, "entropy_bonus": 0.1}
    return {
        "ppo": PPOConfig(episodes=5, minibatches=3, epochs=2, run_dir=str(folder / "ppo"), **shared),
        "grpo": GRPOConfig(run_dir=str(folder / "grpo"), **with_experts),
        "killed": GRPOConfig(run_dir=str(folder / "killed"), **with_experts),
    }


def work(folder: Path) -> None:
    """What each of the two processes does; in the last training, the second is killed in the third iteration."""
    assert int(os.environ["WORLD_SIZE"]) == 2
    trained = configs(folder)
    ppo.train(trained["ppo"])
    grpo.train(trained["grpo"])
    improve = grpo.improve

    def killed(envs, policy, optimizer, config, iteration, processes, *more):
        if iteration == 2 and processes.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return improve(envs, policy, optimizer, config, iteration, processes, *more)

    grpo.improve = killed
    flags = "--env.id MaskedDiffusion-Countdown-v0 --env.temperature 1 --env.num-envs 4 --policy.hidden-dim 16 "
    flags += "--policy.mlp-dim 32 --report.no-enabled --iterations 4 --checkpoint-every 1 --problems 3 --group 2 "
    flags += f"--experts 0.7 --expert-iterations 2 --entropy-bonus 0.1 --run-dir {folder / 'killed'}"
    sys.exit(cli.main(["grpo", *flags.split()]))


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> tuple[Path, str, float]:
    """Where two processes have done their `work`, what they wrote to stderr, and how long the killed one was missed."""
    folder = tmp_path_factory.mktemp("two")
    done = subprocess.run([*LAUNCH, __file__, str(folder)], cwd=ROOT, env=ENV, capture_output=True, text=True)
    ended = time.time()
    assert done.returncode != 0
    return folder, done.stderr, ended - (folder / "killed" / "metrics.jsonl").stat().st_mtime


def lines(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    assert len(lines(one)) == len(lines(other)) == ITERATIONS
    for ours, theirs in zip(lines(one), lines(other), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    weights = [dict(load_policy(folder / "policy").named_parameters()) for folder in (one, other)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_two_processes_train_as_one_does(name, launched, tmp_path):
    algorithm = {"grpo": grpo, "ppo": ppo}[name]
    algorithm.train(configs(tmp_path)[name])
    assert_same_run(tmp_path / name, launched[0] / name)
    assert len(list((launched[0] / name).glob("events.*"))) == 1


def test_a_killed_process_ends_the_others_and_the_run_resumes(launched):
    folder, shown, seconds = launched
    said = [line for line in shown.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "process 0 of 2 has lost the others" in said[0] and str(folder / "killed") in said[0]
    assert "Traceback" not in shown.partition("error:")[0] and seconds < 60
    assert len(lines(folder / "killed")) == 2
    config = configs(folder)["killed"]
    config.resume, config.run_dir = config.run_dir, None
    grpo.train(config)  # one process goes on where two were
    assert_same_run(folder / "grpo", folder / "killed")


class Two:
    """accelerate's part in two processes that differ, as far as `Processes` asks."""

    process_index, num_processes, device = 0, 2, torch.device("cpu")


def test_processes_must_agree(monkeypatch, tmp_path):
    other = {"dllm_gym": "0.0.1"}
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [*own, own[0] | other])
    with pytest.raises(ValueError, match=r"process 1 has dllm_gym '0.0.1', process 0 '"):
        Run("grpo", GRPOConfig(run_dir=str(tmp_path / "run")), Processes(Two()))
    assert not (tmp_path / "run").exists()
    other.clear()
    Run("grpo", GRPOConfig(run_dir=str(tmp_path / "run")), Processes(Two()))


@pytest.mark.parametrize("algorithm", ["sb3-ppo", "joint"])
def test_what_trains_in_one_process_says_so(algorithm, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main([algorithm]) == 2
    assert f"error: {algorithm} trains in one process, not in 2" in capsys.readouterr().err


def test_more_processes_than_problems_are_refused():
    with pytest.raises(ValueError, match="problems=1: must be at least the number of processes, 2"):
        Processes(Two()).check_share("problems", 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path(sys.argv[1]))
