"""Trainers of the sampler: losses, the policy network, and that they learn."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from policies import TINY, see, tiny_policy, truncate
from scripted import A, B, ScriptedDenoiser, ScriptedTask

from dllm_gym import load_denoiser
from dllm_gym.agents import collect, load_policy
from dllm_gym.agents.environment import EnvConfig, make_env, make_envs
from dllm_gym.agents.samplers.distributions import Bernoulli
from dllm_gym.agents.samplers.heuristics import Threshold
from dllm_gym.agents.samplers.policy import Critic, PolicyConfig, UnmaskingPolicy
from dllm_gym.agents.trainers.advantages import group_advantages
from dllm_gym.agents.trainers.policy import grpo, ppo, sb3_ppo
from dllm_gym.agents.trainers.policy.comparison import ReportConfig
from dllm_gym.agents.trainers.policy.grpo import GRPOConfig, grpo_loss, steer, update
from dllm_gym.agents.trainers.policy.networks import make_policy_network
from dllm_gym.agents.trainers.policy.ppo import PPOConfig, episode_advantages, ppo_loss
from dllm_gym.agents.trainers.policy.sb3_ppo import EligibleBernoulli, SB3PPOConfig, UnmaskingActorCriticPolicy
from dllm_gym.agents.trainers.processes import Processes
from dllm_gym.envs.sb3 import SB3VecEnv
from dllm_gym.envs.vector import UnmaskingVectorEnv
from dllm_gym.types import Rollout, Verdict


def tensor(*values: float, **settings) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, **settings)


# Advantages


def test_group_advantages():
    reward = torch.tensor([[1.0, 0.0, 0.5, 0.5], [0.3, 0.3, 0.3, 0.3]])
    advantage = group_advantages(reward)
    torch.testing.assert_close(advantage, torch.tensor([[0.5, -0.5, 0.0, 0.0], [0.0] * 4]))
    torch.testing.assert_close(group_advantages(reward + 3), advantage)
    scaled = group_advantages(reward, divide_by_std=True)
    torch.testing.assert_close(scaled[0].std(), torch.tensor(1.0), atol=1e-4, rtol=0)
    for value in (0.1, 0.3, 0.7, 1 / 3):  # 8 times 0.1 in float32 is not 0.8
        for group in (3, 6, 8, 11):
            assert not group_advantages(torch.full((1, group), value), divide_by_std=True).any()


def test_an_expert_is_asked_of_the_order_of_its_confidence(rollout):
    """To Plackett and Luce picks have an order; a threshold's are all 1."""
    seen = see(3)
    seen.confidence[:, :, 0] = torch.tensor([[0.1, 0.9, 0.5, 0.7, 0.0, 0.0, 0.0, 0.0]])
    picks = torch.zeros(3, 8, dtype=torch.int64)
    picks[0, :4] = picks[2, 1] = 1
    ordered = grpo.surest_first(replace(rollout, observation=seen, picks=picks)).picks
    assert ordered.tolist() == [[4, 1, 3, 2, 0, 0, 0, 0], [0] * 8, [0, 1, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("gae_lambda", [0.0, 0.9, 1.0])
def test_episode_advantages_against_a_loop(gae_lambda):
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 1, 5, 2]
    order = torch.randperm(sum(lengths), generator=generator)  # steps of the episodes in any order
    episode = torch.cat([torch.full((n,), e) for e, n in enumerate(lengths)])[order]
    step = torch.cat([torch.arange(n) for n in lengths])[order]
    values, reward = torch.randn(len(order), generator=generator), torch.randn(4, generator=generator)
    advantage, target = episode_advantages(values, episode, step, reward, gae_lambda)
    for e, length in enumerate(lengths):
        rows = [int(((episode == e) & (step == t)).nonzero()) for t in range(length)]
        follows = 0.0
        for t in reversed(range(length)):
            ahead = values[rows[t + 1]] if t + 1 < length else reward[e]
            follows = float(ahead - values[rows[t]]) + gae_lambda * follows
            assert advantage[rows[t]].item() == pytest.approx(follows, abs=1e-5)
    torch.testing.assert_close(target, advantage + values)
    if gae_lambda == 1:
        torch.testing.assert_close(target, reward[episode])


# Losses


@pytest.mark.parametrize(("group", "experts"), [(8, 3), (4, 1), (5, 0)])
def test_steer(group, experts):
    probability = tensor(0.9, 0.9, 1e-6, 1e-300)
    expert = torch.tensor([True, False, True, True]) & (experts > 0)
    mixture = steer(probability.log(), expert, group, experts)
    total = group + experts
    for value, p, acted in zip(mixture.tolist(), probability.tolist(), expert.tolist(), strict=True):
        assert value == pytest.approx(math.log(group / total * p + 1 / total) if acted else math.log(p))


def test_grpo_loss_by_hand():
    ratio = tensor(1.2, 2.0, 2.0, 0.25, 0.25)
    advantage, weight = tensor(1, 1, -1, 2, -2), tensor(0.1, 0.2, 0.3, 0.15, 0.25)
    loss, metrics = grpo_loss(ratio.log() - 0.3, tensor(*[-0.3] * 5), advantage, weight, clip=0.5)
    # The worse of both: 1.2, min(2, 1.5), min(-2, -1.5), min(0.5, 1), min(-0.5, -1)
    assert loss.item() == pytest.approx(-(0.1 * 1.2 + 0.2 * 1.5 - 0.3 * 2 + 0.15 * 0.5 - 0.25 * 1))
    assert metrics["clip_fraction"].item() == pytest.approx(0.9)


def test_ppo_loss_by_hand():
    ratio, advantage = tensor(1.1, 1.5, 1.5, 0.5), tensor(1, 1, -1, -1)
    value, target = tensor(0, 1, 0, 0), tensor(0, 0, 2, 0)
    loss, metrics = ppo_loss(
        ratio.log() - 2, tensor(*[-2] * 4), advantage, value, target, weight=1 / 4, clip=0.2, value_weight=0.5
    )
    policy_loss, value_loss = -(1.1 + 1.2 - 1.5 - 0.8) / 4, 5 / 4
    assert loss.item() == pytest.approx(policy_loss + 0.5 * value_loss)
    assert metrics["policy_loss"].item() == pytest.approx(policy_loss)
    assert metrics["value_loss"].item() == pytest.approx(value_loss)
    assert metrics["clip_fraction"].item() == pytest.approx(0.75)
    kl = sum(r - 1 - math.log(r) for r in (1.1, 1.5, 1.5, 0.5)) / 4
    assert metrics["approximate_kl"].item() == pytest.approx(kl)


RATIOS, SIGNS = (0.3, 0.9, 1.0, 1.1, 1.9), (1.0, -1.0)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_loss_gradients(algorithm):
    """Finite differences; none where the ratio is clipped, else of the sign that raises what was good."""
    old, number = tensor(*[-1.0] * 10), 10
    advantage = tensor(*(sign for sign in SIGNS for _ in RATIOS))
    log_prob = (tensor(*(RATIOS * 2)).log() - 1).requires_grad_()
    value, target = torch.linspace(0, 1, number).double().requires_grad_(), tensor(*range(number))

    def loss(log_prob, value):
        if algorithm == "grpo":
            return grpo_loss(log_prob, old, advantage, torch.linspace(0.1, 1, number).double(), 0.5)[0]
        return ppo_loss(log_prob, old, advantage, value, target, 1 / len(log_prob), 0.5, 0.7)[0]

    assert torch.autograd.gradcheck(loss, (log_prob, value))
    loss(log_prob, value).backward()
    clipped = [ratio > 1.5 if sign > 0 else ratio < 0.5 for sign in SIGNS for ratio in RATIOS]
    expected = torch.where(torch.tensor(clipped), 0.0, -advantage)
    assert torch.equal(log_prob.grad.sign(), expected.sign())
    if algorithm == "ppo":
        assert torch.equal(value.grad.sign(), (value - target).detach().sign())


# One update


@pytest.fixture
def rollout(scripted, task) -> Rollout:
    """Six episodes of a tiny policy, then three of a threshold."""
    env = UnmaskingVectorEnv(task, 4, denoiser=scripted, empty_action="noop")
    parts = [collect(env, tiny_policy(), [0, 1, 2] * 2), collect(env, Threshold(0.65), [0, 1, 2])]
    return Rollout.cat(parts)


def log_prob_of(policy: UnmaskingPolicy, rollout: Rollout) -> torch.Tensor:
    seen = rollout.observation
    return policy.distribution.log_prob(policy.logits(seen), seen.eligible, rollout.picks).detach()


def update_of(rollout: Rollout, advantage: torch.Tensor, **changes) -> tuple[UnmaskingPolicy, dict[str, float]]:
    """A fresh tiny policy after one plain gradient step, and the metrics."""
    policy = tiny_policy()
    config = GRPOConfig(**{"group": 2, "experts": (0.65,), "inner_iterations": 1, "max_grad_norm": 1e9} | changes)
    expert = torch.arange(len(rollout)) >= 6
    return policy, update(
        policy, torch.optim.SGD(policy.parameters(), lr=0.02), rollout, advantage, expert, config, Processes()
    )


def test_update_adds_up_over_microbatches(rollout):
    advantage = torch.linspace(-1, 1, len(rollout))
    settings = {"entropy_bonus": 0.1}
    (whole, metrics), (split, same) = (update_of(rollout, advantage, microbatch=n, **settings) for n in (4096, 7))
    assert len(rollout.episode) > 14
    for one, other in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-7, rtol=1e-4)
    assert same == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def test_update_starts_at_ratio_one_and_weighs_episodes_alike(rollout):
    _, metrics = update_of(rollout, torch.linspace(-1, 2, len(rollout)))
    assert metrics["clip_fraction"] == 0 and metrics["loss"] == pytest.approx(-0.5, abs=1e-5)


def test_inner_iterations_compare_with_the_policy_that_sampled(rollout):
    _, metrics = update_of(rollout, torch.linspace(-1, 2, len(rollout)), inner_iterations=2, clip=1e-6)
    assert metrics["clip_fraction"] > 0.6


@pytest.mark.parametrize("sign", [1, -1])
def test_update_raises_what_was_good(rollout, sign):
    """Only the first episode has an advantage; its steps weigh the same."""
    advantage = torch.zeros(len(rollout))
    advantage[0] = sign
    rose = log_prob_of(update_of(rollout, advantage)[0], rollout) - log_prob_of(tiny_policy(), rollout)
    assert sign * rose[rollout.episode == 0].mean() > 1e-4


def test_entropy_bonus_raises_the_entropy(rollout):
    policies = [update_of(rollout, torch.zeros(len(rollout)), entropy_bonus=bonus)[0] for bonus in (0.0, 0.5)]
    seen = rollout.observation
    low, high = (p.distribution.entropy(p.logits(seen), seen.eligible, rollout.picks).sum() for p in policies)
    assert high > low + 1e-4


# The policy network


def test_parameter_count_and_start():
    policy = make_policy_network(PolicyConfig(), 0, torch.device("cpu"))
    assert 250_000 < sum(p.numel() for p in policy.parameters()) < 400_000
    assert policy.logits(see(64)).sigmoid().mean().item() == pytest.approx(1 / (1 + math.exp(1)), abs=0.06)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    one, same, other = (tiny_policy(seed).logits(see()) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, same) and not torch.allclose(one, other)


@pytest.mark.parametrize("network", [UnmaskingPolicy, Critic])
def test_a_row_alone_equals_the_row_in_a_batch(network):
    torch.manual_seed(0)
    network, seen = network(PolicyConfig(confidence_k=2)), see(k=3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    function = network.logits if isinstance(network, UnmaskingPolicy) else network
    whole = function(seen)
    assert whole[1:].std(dim=0).min() > 1e-3, "rows differ"
    for row in range(len(seen)):
        torch.testing.assert_close(function(seen[row : row + 1])[0], whole[row], atol=1e-5, rtol=1e-5)


def test_every_signal_reaches_the_logits():
    policy, seen = tiny_policy(), see()
    for changes in (
        {"confidence": seen.confidence.flip(1)},
        {"eligible": ~seen.eligible},
        {"masked": torch.ones_like(seen.masked)},
        {"progress": seen.progress + 0.5},
    ):
        for parameter in policy.trunk.modulation.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        assert not torch.allclose(policy.logits(replace(seen, **changes)), policy.logits(seen), atol=1e-4)


def test_temperature_divides_the_logits():
    torch.testing.assert_close(tiny_policy(temperature=0.5).logits(see()), 2 * tiny_policy().logits(see()))


def test_too_few_confidences():
    with pytest.raises(ValueError, match=r"reads 2 .* shows 1.*confidence_k=2"):
        tiny_policy(confidence_k=2).logits(see())


@pytest.mark.parametrize("changes", [{"distribution": "gauss"}, {"temperature": 0.0}])
def test_bad_policy_config(changes):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        tiny_policy(**changes)


def test_an_empty_draw_is_forced_when_called_and_kept_in_act():
    """The forced position has the best logit, not the best confidence, and is eligible."""
    policy, seen = tiny_policy(), see()
    eligible = torch.zeros_like(seen.eligible)
    eligible[1:, 2:5] = True
    seen = replace(seen, eligible=eligible, confidence=torch.linspace(0.1, 0.9, 8).expand(5, 8)[..., None])
    policy.logits = lambda _: -60 + torch.tensor([9.0, 8, 1, 3, 2, 0, 0, 0]).expand(5, -1)
    picks, log_prob = policy.act(seen)
    assert not picks.any() and log_prob.abs().max() < 1e-6
    expected = torch.zeros(5, 8, dtype=torch.bool)
    expected[1:, 3] = True
    assert torch.equal(policy(seen), expected)
    policy.deterministic = True
    assert torch.equal(policy(seen), expected)
    policy.logits = lambda _: torch.tensor([9.0, 8, 1, -3, 2, 0, 0, 5]).expand(5, -1)
    expected[1:] = torch.tensor([False, False, True, False, True, False, False, False])
    assert torch.equal(policy(seen), expected)


@pytest.mark.parametrize("distribution", ["bernoulli", "dpls"])
def test_act_tells_the_log_probability_of_what_it_drew(distribution):
    policy, seen = tiny_policy(distribution=distribution), see(200)
    picks, log_prob = policy.act(seen)
    torch.testing.assert_close(log_prob, policy.distribution.log_prob(policy.logits(seen), seen.eligible, picks))
    again = policy.seeded(0).act(seen)[0]
    assert torch.equal(picks, again) and not torch.equal(picks, policy.act(seen)[0])


@pytest.mark.parametrize("inside_a_run", [False, True])
def test_save_and_load(inside_a_run, tmp_path):
    policy = tiny_policy(distribution="dpls", temperature=0.5)
    policy.save(tmp_path / "policy" if inside_a_run else tmp_path, trained_in={"id": "x"})
    loaded = load_policy(tmp_path)
    assert loaded.config == policy.config and torch.equal(loaded.logits(see()), policy.logits(see()))


def edit(path: Path, **changes) -> None:
    config = json.loads(path.read_text())
    config["policy"] |= changes
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "policy.safetensors").unlink(),
        lambda folder: truncate(folder / "config.json"),
        lambda folder: truncate(folder / "policy.safetensors"),
        lambda folder: edit(folder / "config.json", hidden_dim=32),
        lambda folder: edit(folder / "config.json", colour="red"),
        lambda folder: edit(folder / "config.json", distribution="gauss"),
        lambda folder: (folder / "config.json").write_text("[]"),
        lambda folder: folder.rename(folder.with_name("elsewhere")),
    ],
)
def test_a_damaged_policy_folder_is_one_clear_line(damage, tmp_path):
    folder = tiny_policy().save(tmp_path / "trained")
    damage(folder)
    with pytest.raises(ValueError) as caught:
        load_policy(folder)
    message = str(caught.value)
    assert repr(str(folder)) in message and "policy.safetensors" in message and "\n" not in message


# Stable-Baselines3


def test_eligible_bernoulli_is_ours():
    seen = see(200)
    logits = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    theirs = EligibleBernoulli(8).proba_distribution(logits, seen.eligible)
    torch.manual_seed(0)
    actions = theirs.sample()
    assert not actions[~seen.eligible].any() and actions.any()
    torch.testing.assert_close(theirs.log_prob(actions), Bernoulli().log_prob(logits, seen.eligible, actions.long()))
    # Bits outside the eligible positions, as a user's own action may have, count for nothing.
    flipped = torch.where(seen.eligible, actions, 1.0)
    torch.testing.assert_close(theirs.log_prob(flipped), theirs.log_prob(actions))
    torch.testing.assert_close(theirs.entropy(), Bernoulli().entropy(logits, seen.eligible, actions.long()))
    assert torch.equal(theirs.mode(), ((logits > 0) & seen.eligible).float())


def test_sb3_policy_evaluates_what_it_did(scripted, task):
    env = SB3VecEnv(UnmaskingVectorEnv(task, 3, denoiser=scripted))
    policy = UnmaskingActorCriticPolicy(env.observation_space, env.action_space, lambda _: 1e-3, config=TINY)
    shown, _ = policy.obs_to_tensor(env.reset())
    actions, values, log_prob = policy(shown)
    again = policy.evaluate_actions(shown, actions)
    torch.testing.assert_close(again[0], values)
    torch.testing.assert_close(again[1], log_prob)
    assert again[2].shape == (3,) and (again[2] > 0).all()


def test_sb3_refuses_an_ordered_distribution(tmp_path):
    config = SB3PPOConfig(policy=replace(TINY, distribution="dpls"), run_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"distribution='dpls'.*bernoulli.*grpo"):
        sb3_ppo.train(config)
    assert not (tmp_path / "run").exists()


# Learning


LENGTH, PAIR = 6, (2, 3)


class OneOfThePair(ScriptedTask):
    """Right: "b" at exactly one of the pair, "a" everywhere else."""

    def verify(self, problem, completion: str) -> Verdict:
        words = completion.split()
        at_b = [i for i, word in enumerate(words) if word == "b"]
        correct = len(words) == LENGTH and at_b in [[i] for i in PAIR]
        return Verdict(correct, float(correct), completion)


def pair_table(canvas: torch.Tensor) -> torch.Tensor:
    """Everything says "a", until one of the pair is unmasked: then the other says "b"."""
    table = torch.tensor([0.9, 0.1]).repeat(len(canvas), LENGTH, 1)
    for mine, other, p in ((*PAIR, 0.75), (*PAIR[::-1], 0.55)):
        table[:, mine] = torch.where(canvas[:, other, None] == A, torch.tensor([0.1, 0.9]), torch.tensor([p, 1 - p]))
    return table


def pair_env(config: EnvConfig, split: str = "train", **changes) -> UnmaskingVectorEnv:
    task = OneOfThePair(["a a a b a a"])
    return UnmaskingVectorEnv(task, config.num_envs, denoiser=ScriptedDenoiser(pair_table, LENGTH))


SMALL = PolicyConfig(hidden_dim=32, mlp_dim=64)
QUIET = {"policy": SMALL, "report": ReportConfig(enabled=False), "threads": 1, "seed": 0}
LEARNERS = {
    "grpo": (grpo, GRPOConfig(**QUIET, iterations=40, problems=8, experts=(), warmup=2, learning_rate=3e-3)),
    "ppo": (ppo, PPOConfig(**QUIET, iterations=30, episodes=64, epochs=2, warmup=2, learning_rate=1e-3)),
    "sb3-ppo": (sb3_ppo, SB3PPOConfig(**QUIET, timesteps=10_000, steps=8, batch_size=128, learning_rate=1.5e-3)),
}


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_learns_that_two_positions_must_not_go_together(algorithm, tmp_path, monkeypatch):
    """Best possible: two steps, everything but one of the pair in the first: reward 5/6. All at once: 0."""
    module, config = LEARNERS[algorithm]
    if algorithm == "sb3-ppo":
        monkeypatch.setattr(module, "make_env", pair_env)
    else:
        monkeypatch.setattr(module, "make_envs", lambda config, **_: [pair_env(config), pair_env(config)])
    folder = module.train(replace(config, env=EnvConfig(num_envs=64), run_dir=str(tmp_path / "run")))
    env = pair_env(EnvConfig(num_envs=64))
    untrained, trained = (
        collect(env, policy.seeded(0), [0] * 256, explore=False)
        for policy in (make_policy_network(SMALL, 0, torch.device("cpu")), load_policy(folder))
    )
    assert trained.reward.mean() > 0.65 > untrained.reward.mean() + 0.3
    assert trained.correct.float().mean() > 0.9
    assert trained.nfe.float().mean() < untrained.nfe.float().mean() - 1
    assert B in trained.tokens[trained.correct][0]


def steps_by_episode(rollout) -> list[tuple[list, list, float]]:
    """What each episode saw and did, in its own order."""
    episodes = []
    for n in range(len(rollout)):
        own = rollout.episode == n
        episodes.append(
            (rollout.picks[own].tolist(), rollout.observation.masked[own].tolist(), rollout.reward[n].item())
        )
    return episodes


@pytest.mark.parametrize("distribution", ["bernoulli", "dpls"])
def test_a_rollout_is_the_same_in_any_number_of_environments_and_rows(distribution):
    config, denoiser = EnvConfig("MaskedDiffusion-Countdown-v0", temperature=1.0), load_denoiser("embedded-early")
    policy, problems = tiny_policy(distribution=distribution), [3, 3, 5, 8, 8, 8, 1]
    rollouts = [
        collect(
            [make_env(config, denoiser=denoiser, num_envs=rows) for _ in range(count)], policy, problems, seed=[4, 2]
        )
        for count, rows in ((1, 7), (2, 2), (3, 1))
    ]
    for other in rollouts[1:]:
        assert torch.equal(other.tokens, rollouts[0].tokens)
        assert steps_by_episode(other) == steps_by_episode(rollouts[0])


def test_workers_side_by_side_take_the_same_step(tmp_path):
    config = GRPOConfig(problems=2, group=2, experts=(0.5,), policy=SMALL, microbatch=7, entropy_bonus=0.1)
    weights, metrics = [], []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            envs = make_envs(replace(config.env, num_envs=6))
            assert len(envs) == threads
            policy = make_policy_network(config.policy, 0, torch.device("cpu"))
            metrics.append(grpo.improve(envs, policy, grpo.make_optimizer(policy, config), config, 0, Processes())[0])
            weights.append(torch.cat([p.flatten() for p in policy.parameters()]).detach())
        finally:
            torch.set_num_threads(before)
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=2e-5)
    for name in metrics[0].keys() - {"seconds"}:
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-4, abs=1e-5), name
