"""Joint training in turns: its phases, its budget, both trainers."""

import functools
import itertools
import json

import pytest
import torch
from learners import changeable, early, joint_config, metrics_of

import dllm_gym
from dllm_gym.agents import load_policy
from dllm_gym.agents.cli import main
from dllm_gym.agents.trainers import joint
from dllm_gym.agents.trainers.joint import phases


@pytest.mark.parametrize(
    ("rounds", "sampler", "denoiser"), [(1, 3, 2), (2, 4, 4), (3, 7, 2), (5, 2, 3), (2, 1, 1), (4, 100, 30)]
)
def test_phases(rounds, sampler, denoiser):
    config = joint_config()
    config.rounds, config.grpo.iterations, config.denoiser.iterations = rounds, sampler, denoiser
    order = phases(config)
    for kind, total in (("sampler", sampler), ("denoiser", denoiser)):
        assert [i for name, i in order if name == kind] == list(range(total))
    runs = [(kind, len(list(group))) for kind, group in itertools.groupby(order, key=lambda step: step[0])]
    assert len(runs) <= 2 * rounds
    for kind, total in (("sampler", sampler), ("denoiser", denoiser)):
        if min(sampler, denoiser) >= rounds:
            sizes = [size for name, size in runs if name == kind]
            assert len(sizes) == rounds and max(sizes) - min(sizes) <= 1 and sum(sizes) == total
            assert runs[0][0] == "sampler"


def test_a_budget_is_shared_by_the_phases_of_joint(tmp_path):
    """Each of the four phases ends with the iteration that spends its quarter; rates fall with what is left."""
    config = joint_config(run_dir=str(tmp_path / "run"))
    config.forwards = 600
    joint.train(config)
    rows = metrics_of(tmp_path / "run")
    spent = [0, *(int(row["forwards"]) for row in rows)]
    assert spent[-2] < 600 <= spent[-1]
    for before, after, row in zip(spent, spent[1:], rows, strict=False):
        kind = ("sampler", "denoiser", "sampler", "denoiser")[before // 150]
        assert {name.split("/")[0] for name in row if "/" in name} == {kind}
        assert row[f"{kind}/forwards"] == after - before
    assert rows[0]["sampler/learning_rate"] > rows[-1]["denoiser/learning_rate"] > 0


@pytest.mark.parametrize(("algorithm", "prefix"), [("grpo", ""), ("joint-trace", "grpo.")])
def test_a_budget_of_forward_passes_ends_a_training(algorithm, prefix, tmp_path):
    flags = (
        "--env.id MaskedDiffusion-Sudoku-v0 --env.denoiser embedded-early --env.num-envs 8 --threads 1 --warmup 1 "
        f"--{prefix}problems 2 --{prefix}group 2 --{prefix}policy.hidden-dim 16 --{prefix}policy.mlp-dim 16 "
        "--forwards 120 --report.no-enabled"
    )
    assert main([algorithm, *flags.split(), "--run-dir", str(tmp_path / "run")]) == 0
    spent = [row["forwards"] for row in metrics_of(tmp_path / "run")]
    assert len(spent) > 1 and spent[-2] < 120 <= spent[-1]


def test_joint_trains_both_from_the_command_line(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    envs = []
    for module, position in ((joint.grpo, 0), (joint.trainer, 1)):
        spy = functools.partial(lambda plain, n, *args: envs.append(args[n]) or plain(*args), module.improve, position)
        monkeypatch.setattr(module, "improve", spy)
    flags = (
        "--objective gdsd-tlc --env.id MaskedDiffusion-Sudoku-v0 --env.num-envs 8 --rounds 2 --threads 1 "
        "--grpo.iterations 2 --grpo.problems 2 --grpo.group 2 --grpo.policy.hidden-dim 16 --grpo.policy.mlp-dim 32 "
        "--grpo.experts --grpo.inner-iterations 1 --denoiser.iterations 2 --denoiser.problems 2 --denoiser.group 2 "
        "--denoiser.inner-iterations 1 --denoiser.psi 2 --report.problems 2 --report.samplers confidence:k=8"
    )
    assert main(["joint", *flags.split(), "--run-dir", str(folder)]) == 0
    rows = metrics_of(folder)
    kinds = [{name.split("/")[0] for name in row if "/" in name} for row in rows]
    assert kinds == [{"sampler"}, {"denoiser"}] * 2
    settings = [(env[0].episodes.sampling.temperature, env[0].episodes.alpha) for env in envs]
    assert settings == [(0.0, 1.0), (1.0, 0.0)] * 2
    assert len({id(one.episodes.denoiser) for env in envs for one in env}) == 1
    assert json.loads((folder / "config.json").read_text())["denoiser"]["score"] == "centred-logit"
    load_policy(folder / "policy")
    trained, before = dllm_gym.load_denoiser(folder / "denoiser"), early()
    assert all(not torch.equal(*pair) for pair in zip(*map(changeable, (trained, before)), strict=True))
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["rows"]) == {"confidence:k=8", "learned policy"}
    assert set(summary["rows"]["learned policy"]) == {"before", "joint"}
