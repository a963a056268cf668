"""Sampler and denoiser from one likelihood: its gradient against enumeration, and the trainer."""

import itertools
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from masked import seeded

import dllm_gym
from dllm_gym import decoding
from dllm_gym.agents.cli import main
from dllm_gym.agents.samplers.policy import PolicyConfig, UnmaskingPolicy, load_policy
from dllm_gym.agents.trainers.joint_trace import EpisodeSteps, step_log_probs
from dllm_gym.agents.trainers.seeding import seeded as everything_seeded
from dllm_gym.denoisers.oracle import TabularDenoiser
from dllm_gym.types import Action, Canvas

LENGTH, WORDS = 3, 2
TEMPERATURE = 0.8


def tiny_policy(distribution: str, seed: int = 0) -> UnmaskingPolicy:
    with everything_seeded(seed):
        policy = UnmaskingPolicy(PolicyConfig(hidden_dim=8, mlp_dim=8, initial_bias=0.0, distribution=distribution))
        for p in policy.parameters():
            torch.nn.init.normal_(p, std=0.6)
    return policy


def choices_of(eligible: list[int], distribution: str) -> list[torch.Tensor]:
    """All picks of the positions: sets, or ordered sets that are not empty."""
    found = []
    for size in range(len(eligible) + 1):
        if distribution == "bernoulli":
            chosen = [dict.fromkeys(one, 1) for one in itertools.combinations(eligible, size)]
        else:
            orders = itertools.permutations(eligible, size) if size else []
            chosen = [{position: n + 1 for n, position in enumerate(order)} for order in orders]
        found += [torch.tensor([one.get(i, 0) for i in range(LENGTH)]) for one in chosen]
    return found


def reward_of(canvas: Canvas) -> float:
    """Some completions are right, and steps cost."""
    number = int((canvas.tokens[0] * WORDS ** torch.arange(LENGTH)).sum())
    return float(number in (1, 4, 6)) * (1 - int(canvas.steps[0]) / (2 * LENGTH))


def enumerate_steps(denoiser, policy, canvas: Canvas):
    """Of one row: every way to take a step, with the step, and the canvas after it."""
    with torch.no_grad():
        seen = decoding.observe(canvas, denoiser.predict(canvas), LENGTH)
    distribution = policy.config.distribution
    for picks in choices_of(canvas.masked[0].nonzero()[:, 0].tolist(), distribution):
        written = decoding.with_best(picks[None] > 0, seen) & seen.eligible
        places = written[0].nonzero()[:, 0].tolist()
        for words in itertools.product(range(WORDS), repeat=len(places)):
            token = canvas.tokens.clone()
            token[0, places] = torch.tensor(words)
            seen_here = replace(seen, token=torch.where(canvas.masked & ~written, 0, token))
            step = EpisodeSteps(canvas, seen_here, picks[None], written)
            after = decoding.commit(
                canvas, replace(seen, token=token), Action.unmasking(written), mask_token_id=denoiser.mask_token_id,
                eos_token_id=denoiser.eos_token_id, eos_token_ids=None,
            )  # fmt: skip
            yield step, after


def expected_reward(denoiser, policy, canvas: Canvas) -> float:
    """Exactly, by recursion over everything that can happen."""
    if not canvas.masked.any():
        return reward_of(canvas)
    total = 0.0
    for step, after in enumerate_steps(denoiser, policy, canvas):
        with torch.no_grad():
            log_p = sum(part.item() for part in step_log_probs(denoiser, policy, step, TEMPERATURE))
        total += np.exp(log_p) * expected_reward(denoiser, policy, after)
    return total


def surrogate(denoiser, policy, canvas: Canvas, probability: float, log_p, through: bool):
    """``sum over episodes of p * R * log p(episode)``, p a constant."""
    if not canvas.masked.any():
        return probability * reward_of(canvas) * log_p
    total = 0.0
    for step, after in enumerate_steps(denoiser, policy, canvas):
        parts = step_log_probs(denoiser, policy, step, TEMPERATURE, through)
        own = sum(parts)[0]
        total = total + surrogate(denoiser, policy, after, probability * own.exp().item(), log_p + own, through)
    return total


@pytest.mark.parametrize("distribution", ["bernoulli", "dpls"])
def test_one_likelihood_has_the_policy_gradient_of_both(distribution):
    """For a denoiser that comes from no joint distribution; without the confidences' path it is another gradient."""
    denoiser, policy = TabularDenoiser.random(WORDS, LENGTH, seed=1), tiny_policy(distribution)
    start = decoding.blank([torch.zeros(1, dtype=torch.int64)], LENGTH, denoiser.mask_token_id)
    weights = [denoiser.model.table, *policy.parameters()]
    gradients = {
        through: torch.autograd.grad(
            surrogate(denoiser, policy, start, 1.0, torch.zeros(()), through), weights, allow_unused=True
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
                    values.append(expected_reward(denoiser, policy, start))
                    for p, direction in zip(weights[part], directions, strict=True):
                        p -= sign * 2e-3 * direction
            slope = (values[0] - values[1]) / 4e-3
            pairs = zip(gradients[True][part], directions, strict=True)
            along = sum(float((gradient * direction).sum()) for gradient, direction in pairs if gradient is not None)
            assert along == pytest.approx(slope, rel=1e-2, abs=2e-4), part


def test_probabilities_of_all_episodes_sum_to_one():
    denoiser, policy = TabularDenoiser.random(WORDS, LENGTH, seed=2), tiny_policy("bernoulli", 3)
    start = decoding.blank([torch.zeros(1, dtype=torch.int64)], LENGTH, denoiser.mask_token_id)

    def total(canvas: Canvas) -> float:
        if not canvas.masked.any():
            return 1.0
        with torch.no_grad():
            return sum(
                np.exp(sum(part.item() for part in step_log_probs(denoiser, policy, step, TEMPERATURE))) * total(after)
                for step, after in enumerate_steps(denoiser, policy, canvas)
            )

    assert total(start) == pytest.approx(1.0, abs=1e-5)


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
        ("--env.cache dual", "env.cache='dual': an approximate cache"),
        ("--start nowhere", "policy='nowhere'"),
    ],
)
def test_mistakes(flags, message, tmp_path, capsys):
    assert main(["joint-trace", *flags.split(), "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and not (tmp_path / "run").exists()
