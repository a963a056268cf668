"""Sampler and denoiser from one likelihood: its gradient against enumeration, and the trainer."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from masked import seeded

import dllm_gym
from dllm_gym.agents.cli import main
from dllm_gym.agents.samplers.policy import load_policy
from dllm_gym.agents.trainers.joint_trace import JointTraceConfig
from dllm_gym.agents.trainers.schedule import delayed_factor, rate_factor
from dllm_gym.denoisers.oracle import TabularDenoiser
from dllm_gym.eval.benchmarks.enumeration import blank, expected_reward, policy_gradient_surrogate, tiny_policy
from dllm_gym.types import Canvas

LENGTH, WORDS = 3, 2


def reward(canvas: Canvas) -> float:
    """Some completions are right, and steps cost."""
    number = int((canvas.tokens[0] * WORDS ** torch.arange(LENGTH)).sum())
    return float(number in (1, 4, 6)) * (1 - int(canvas.steps[0]) / (2 * LENGTH))


@pytest.mark.parametrize("distribution", ["bernoulli", "dpls"])
def test_one_likelihood_has_the_policy_gradient_of_both(distribution):
    """For a denoiser that comes from no joint distribution; without the confidences' path it is another gradient."""
    denoiser, policy = TabularDenoiser.random(WORDS, LENGTH, seed=1), tiny_policy(distribution)
    weights = [denoiser.model.table, *policy.parameters()]
    gradients = {
        through: torch.autograd.grad(
            policy_gradient_surrogate(denoiser, policy, reward, blank(denoiser), through_confidences=through),
            weights,
            allow_unused=True,
        )
        for through in (True, False)
    }
    of_table = [of[0] for of in gradients.values()]
    assert (of_table[0] - of_table[1]).norm() > 0.02 * of_table[0].norm()
    for seed in range(4):
        for part in (slice(0, 1), slice(1, None)):
            directions = [torch.randn(p.shape, generator=seeded(seed), dtype=p.dtype) for p in weights[part]]
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    for p, direction in zip(weights[part], directions, strict=True):
                        p += sign * 2e-3 * direction
                    values.append(expected_reward(denoiser, policy, reward, blank(denoiser)).item())
                    for p, direction in zip(weights[part], directions, strict=True):
                        p -= sign * 2e-3 * direction
            slope = (values[0] - values[1]) / 4e-3
            pairs = zip(gradients[True][part], directions, strict=True)
            along = sum(float((gradient * direction).sum()) for gradient, direction in pairs if gradient is not None)
            assert along == pytest.approx(slope, rel=1e-2, abs=2e-4), part


def test_probabilities_of_all_episodes_sum_to_one():
    denoiser, policy = TabularDenoiser.random(WORDS, LENGTH, seed=2), tiny_policy("bernoulli", 3)
    with torch.no_grad():
        total = expected_reward(denoiser, policy, lambda canvas: 1.0, blank(denoiser))
    assert total == pytest.approx(1.0, abs=1e-5)


FLAGS = (
    "--env.num-envs 8 --iterations 2 --grpo.problems 2 --grpo.group 3 --grpo.experts 0.7 --grpo.expert-iterations 1 "
    "--grpo.policy.hidden-dim 16 --grpo.policy.mlp-dim 16 --steps 2 --report.problems 2 "
    "--report.samplers confidence:k=8 --threads 1 --checkpoint-every 1"
)


def test_both_train_and_a_stopped_run_continues(tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert main(["joint-trace", *FLAGS.split(), "--run-dir", str(whole)]) == 0
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["gradient_norm"] > 0 and row["denoiser_gradient_norm"] > 0 for row in rows)
    summary = json.loads((whole / "summary.json").read_text())
    assert set(summary["rows"]["learned policy"]) == {"before", "joint-trace"}
    trained, before = dllm_gym.load_denoiser(whole / "denoiser"), dllm_gym.load_denoiser("embedded-early")
    assert not torch.equal(*(d.model.model.layers[0].mlp.down_proj.weight for d in (trained, before)))
    load_policy(whole / "policy")

    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoint-000002")
    (half / "summary.json").unlink()
    assert main(["joint-trace", "--resume", str(half)]) == 0
    for name in ("policy/policy.safetensors", "denoiser/model.safetensors"):
        assert (whole / name).read_bytes() == (half / name).read_bytes(), name


def test_microbatches_change_nothing(tmp_path):
    rows = []
    for size in (3, 1000):
        folder = tmp_path / str(size)
        flags = [*FLAGS.split(), "--microbatch", str(size), "--report.no-enabled", "--run-dir", str(folder)]
        assert main(["joint-trace", *flags]) == 0
        rows.append(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]))
    for name in ("gradient_norm", "denoiser_gradient_norm", "log_prob_positions", "log_prob_tokens"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-3)


def test_the_scale_of_bad_episodes_concerns_their_tokens_only(tmp_path):
    rows = []
    for scale in ("1", "0"):
        folder = tmp_path / scale
        more = ["--negative-scale", scale, "--no-through-confidences", "--report.no-enabled", "--run-dir", str(folder)]
        assert main(["joint-trace", *FLAGS.split(), *more]) == 0
        rows.append(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]))
    assert rows[0]["gradient_norm"] == pytest.approx(rows[1]["gradient_norm"], rel=1e-6)
    assert rows[0]["denoiser_gradient_norm"] != pytest.approx(rows[1]["denoiser_gradient_norm"], rel=0.02)


@pytest.mark.parametrize("forwards", [None, 1000])
def test_the_policy_waits_for_the_denoiser(forwards):
    """A tenth of its rate up to a share of the training, then the whole one, down to zero at the end."""
    config = JointTraceConfig(iterations=100, forwards=forwards, warmup=0)
    factors = [delayed_factor(config, done, 10 * done, 0.6) for done in (0, 59, 60, 80, 100)]
    assert factors == pytest.approx([0.1, 0.1, 1.0, 0.5, 0.0])
    config.warmup = 4
    assert delayed_factor(config, 0, 0, 0.6) == pytest.approx(0.025)
    assert delayed_factor(config, 50, 500, 0.0) == pytest.approx(rate_factor(replace(config, warmup=0), 50, 500))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--env.temperature 0", "env.temperature=0"),
        ("--env.top-p 0.9", "env.top_p"),
        ("--env.dtype float16", "float16: gradients underflow"),
        ("--grpo.policy.confidence-k 2", "policy.confidence_k=2"),
        ("--grpo.group 1", "group=1"),
        ("--grpo.iterations 3", "grpo.iterations: is set by the joint training"),
        ("--optimizer sgd", "optimizer='sgd'"),
        ("--steps 0", "steps=0"),
        ("--negative-scale 2", "negative_scale=2"),
        ("--policy-after 1", "policy_after=1"),
        ("--env.cache dual", "env.cache='dual': an approximate cache"),
        ("--start nowhere", "policy='nowhere'"),
    ],
)
def test_mistakes(flags, message, tmp_path, capsys):
    assert main(["joint-trace", *flags.split(), "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and not (tmp_path / "run").exists()
