"""PPO for the sampler, with a value network (arXiv 1707.06347; the setting is that of arXiv 2512.09106).

An iteration plays whole episodes, so nothing is bootstrapped at a cut, every episode counts once whatever its length,
and a resumed run needs no environment state. Advantages are generalised estimates (arXiv 1506.02438) with discount 1,
normalised over the batch.

Metrics, one row an iteration: ``reward``, ``accuracy``, ``nfe`` of the episodes; ``policy_loss``, ``value_loss``;
``explained_variance`` of the returns by the values before the update; ``entropy`` in nats per eligible position;
``set_size``; ``clip_fraction``; ``approximate_kl`` in nats (mean of ratio - 1 - log ratio); ``gradient_norm`` before
clipping; ``learning_rate``; ``forwards`` denoiser rows forwarded so far; ``seconds`` of training so far.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dllm_gym.agents.environment import EnvConfig, make_envs
from dllm_gym.agents.samplers.policy import PolicyConfig
from dllm_gym.agents.samplers.rollout import collect
from dllm_gym.agents.trainers.by_task import means_by_task, sums_by_task
from dllm_gym.agents.trainers.configs import at_least_one
from dllm_gym.agents.trainers.policy.comparison import ReportConfig, report
from dllm_gym.agents.trainers.policy.networks import check_common, make_critic, make_policy_network
from dllm_gym.agents.trainers.processes import launched, own_threads
from dllm_gym.agents.trainers.run import Run
from dllm_gym.agents.trainers.schedule import cosine


@dataclass
class PPOConfig:
    """Train an unmasking policy with PPO."""

    env: EnvConfig = field(default_factory=EnvConfig)
    """The environment."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The policy's architecture; the value network has the same trunk."""
    report: ReportConfig = field(default_factory=ReportConfig)
    """The table and the plot at the end."""
    iterations: int = 60
    """Number of iterations; each samples, then updates."""
    episodes: int = 128
    """Number of episodes per iteration, each on its own problem."""
    gae_lambda: float = 0.95
    """Lambda of the generalised advantage estimate; the discount is 1."""
    epochs: int = 4
    """Number of passes over each batch."""
    minibatches: int = 4
    """Number of minibatches per pass, each with one update."""
    clip: float = 0.2
    """The probability ratio is clipped to [1 - clip, 1 + clip]."""
    value_weight: float = 0.5
    """Weight of the value loss."""
    entropy_bonus: float = 0.0
    """Weight of the mean entropy per eligible position."""
    learning_rate: float = 3e-4
    """Peak learning rate of Adam; linear warm-up, then a cosine to zero."""
    warmup: int = 5
    """Number of warm-up iterations."""
    max_grad_norm: float = 0.5
    """Maximum norm of the gradient; larger gradients are scaled down."""
    seed: int = 0
    """Random seed for weights, problems and sampling."""
    threads: int = 0
    """Number of torch threads; 0 keeps torch's default."""
    checkpoint_every: int = 20
    """Number of iterations between checkpoints."""
    run_dir: str | None = None
    """Folder of the run; None makes one in runs/."""
    resume: str | None = None
    """Folder of a run to continue."""


def episode_advantages(
    values: Tensor, episode: Tensor, step: Tensor, reward: Tensor, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates of whole episodes with a reward at the end only, discount 1.

    Args:
        values: ``[N]``, of the states. episode: ``[N]`` int64 in 0..E-1. step: ``[N]`` int64, from 0 without gaps in
            each episode. reward: ``[E]``.

    Returns:
        Advantages and returns (advantage + value), both ``[N]``.
    """
    steps = int(step.max()) + 1
    dense = values.new_zeros(len(reward), steps + 1)
    dense[episode, step] = values
    taken = torch.zeros_like(dense, dtype=torch.bool)
    taken[episode, step] = True
    advantage = torch.zeros_like(dense)
    for t in range(steps - 1, -1, -1):
        last = taken[:, t] & ~taken[:, t + 1]
        delta = torch.where(last, reward, dense[:, t + 1]) - dense[:, t]
        advantage[:, t] = torch.where(taken[:, t], delta + gae_lambda * advantage[:, t + 1], 0.0)
    advantage = advantage[episode, step]
    return advantage, advantage + values


def ppo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    value: Tensor,
    target: Tensor,
    weight: float,
    clip: float,
    value_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate and squared value error of ``[N]`` steps, to be minimised; and the metrics of the update.

    All are sums of what belongs to the steps times ``weight``, 1 / (steps of the whole minibatch), of which a process
    may have a part.
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    policy_loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).sum() * weight
    value_loss = F.mse_loss(value, target, reduction="sum") * weight
    metrics = {
        "policy_loss": policy_loss.detach(),
        "value_loss": value_loss.detach(),
        "clip_fraction": ((ratio - 1).abs() > clip).float().sum() * weight,
        "approximate_kl": (ratio - 1 - log_ratio).sum().detach() * weight,
    }
    return policy_loss + value_weight * value_loss, metrics


@own_threads
def train(config: PPOConfig) -> Path:
    """Train, then compare with the heuristics on held-out problems. Returns the run's folder.

    Several processes (`torchrun`, `accelerate launch`) share the episodes of an iteration, and take the steps that one
    would take with all of them.
    """
    at_least_one(config, "episodes", "epochs", "minibatches")
    check_common(config)
    processes = launched(config.env.device)
    processes.check_share("episodes", config.episodes)
    envs = make_envs(config.env, device=processes.device)
    episodes, device = envs[0].episodes, envs[0].episodes.device
    policy = make_policy_network(config.policy, config.seed, device)
    critic = make_critic(config.policy, config.seed, device)
    parameters = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, eps=1e-5)
    run = Run("ppo", config, processes)
    with run:
        for iteration in run.steps(config.iterations, {"policy": policy, "critic": critic, "optimizer": optimizer}):
            since = time.perf_counter()
            # Everything drawn follows from (seed, iteration), so a resumed run needs no generator state.
            rng = np.random.default_rng([config.seed, iteration])
            rate = cosine(iteration, config.iterations, config.warmup) * config.learning_rate
            optimizer.param_groups[0]["lr"] = rate
            problems = rng.integers(len(episodes.task), size=config.episodes)
            own = processes.own(np.arange(config.episodes))
            rollout = collect(envs, policy, problems[own], seed=int(rng.integers(2**32)), numbers=own)
            seen = rollout.observation
            lengths = torch.bincount(rollout.episode, minlength=len(own))
            step = torch.arange(len(rollout.episode), device=device) - (lengths.cumsum(0) - lengths)[rollout.episode]
            with torch.no_grad():
                values = critic(seen)
            advantage, target = episode_advantages(values, rollout.episode, step, rollout.reward, config.gae_lambda)
            error, spread = processes.moments(target - values)[1], processes.moments(target)[1]
            mean, std = processes.moments(advantage)
            advantage = (advantage - mean) / (std + 1e-8)
            # The steps of all processes are numbered by episode, then step; minibatches are drawn from the numbers.
            all_lengths = processes.whole(lengths, config.episodes)
            total = int(all_lengths.sum())
            first = processes.own(all_lengths.cumsum(0) - all_lengths)
            number = first[rollout.episode] + step
            size = -(-total // config.minibatches)

            log: list[dict[str, float]] = []
            norms: list[float] = []
            for _ in range(config.epochs):
                place = torch.as_tensor(rng.permutation(total), device=device)[number]
                for start in range(0, total, size):
                    rows = ((place >= start) & (place < start + size)).nonzero()[:, 0]
                    weight = 1 / min(size, total - start)
                    logits = policy.logits(seen[rows])
                    eligible, picks = seen.eligible[rows], rollout.picks[rows]
                    log_prob = policy.distribution.log_prob(logits, eligible, picks)
                    entropies = policy.distribution.entropy(logits, eligible, picks) / eligible.sum(dim=1)
                    entropy = entropies.sum() * weight
                    loss, metrics = ppo_loss(
                        log_prob, rollout.log_prob[rows], advantage[rows], critic(seen[rows]), target[rows],
                        weight, config.clip, config.value_weight,
                    )  # fmt: skip
                    optimizer.zero_grad()
                    (loss - config.entropy_bonus * entropy).backward()
                    processes.sum_gradients(parameters)
                    norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                    optimizer.step()
                    metrics["entropy"] = entropy.detach()
                    norms.append(norm.item())
                    log.append({name: value.item() for name, value in metrics.items()})

            means = processes.sum({name: sum(row[name] for row in log) / len(log) for name in log[0]})
            sums = processes.sum({
                "reward": rollout.reward.sum(),
                "correct": rollout.correct.sum(),
                "nfe": rollout.nfe.sum(),
                "picked": (rollout.picks > 0).sum(),
            } | sums_by_task(rollout, episodes.task.parts))  # fmt: skip
            means |= means_by_task(sums, episodes.task.parts) | {
                "reward": sums["reward"] / config.episodes,
                "accuracy": sums["correct"] / config.episodes,
                "nfe": sums["nfe"] / config.episodes,
                "set_size": sums["picked"] / total,
                "explained_variance": 1 - error**2 / (spread**2 + 1e-8),
                "gradient_norm": sum(norms) / len(norms),
                "learning_rate": rate,
                "forwards": int(sums["nfe"]),
                "seconds": time.perf_counter() - since,
            }
            run.record(means, problems)
        if run.main:
            policy.save(run.folder / "policy", trained_in=vars(config.env))
            untrained = make_policy_network(config.policy, config.seed, device)
            run.finish(report(run.folder, config.report, config.env, {"untrained": untrained, "PPO": policy}))
    return run.folder
