"""GRPO for the sampler, with expert steering (arXiv 2512.09106, section 4).

For each problem, the policy plays G episodes, and threshold samplers, the "experts", play E. An episode's advantage is
its reward minus the mean reward of its group. Each step carries the advantage of its episode in a clipped ratio
objective, and all episodes have the same total weight, however many steps they take.

Deviations from the paper, for small problems on a CPU: the learning rate is 3e-4 instead of 3e-5, the batch is smaller,
and the gradient norm is clipped at 1 instead of 0.2. The policy also reads the index of each position and log(1 - c).

Metrics, one row an iteration: ``reward``, ``accuracy``, ``nfe`` of the policy's own episodes (not the experts');
``entropy`` in nats per eligible position; ``set_size`` positions picked a step; ``loss``; ``clip_fraction`` of steps;
``equal_groups`` share of groups without any difference in reward (they teach nothing); ``gradient_norm`` before
clipping; ``learning_rate``; ``forwards`` denoiser rows forwarded so far; ``seconds`` of training so far.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dllm_gym.agents.environment import EnvConfig, make_envs
from dllm_gym.agents.samplers.heuristics import Threshold
from dllm_gym.agents.samplers.policy import PolicyConfig, UnmaskingPolicy
from dllm_gym.agents.samplers.rollout import collect
from dllm_gym.agents.trainers.advantages import check_group, group_advantages
from dllm_gym.agents.trainers.by_task import means_by_task, sums_by_task
from dllm_gym.agents.trainers.configs import at_least_one, check_budget
from dllm_gym.agents.trainers.policy.comparison import ReportConfig, report
from dllm_gym.agents.trainers.policy.networks import check_common, make_policy_network
from dllm_gym.agents.trainers.processes import Processes, launched, own_threads
from dllm_gym.agents.trainers.run import Run
from dllm_gym.agents.trainers.schedule import rate_factor
from dllm_gym.agents.workers import side_by_side, worker_count
from dllm_gym.envs.vector import UnmaskingVectorEnv
from dllm_gym.types import Rollout


@dataclass
class GRPOConfig:
    """Train an unmasking policy with GRPO."""

    env: EnvConfig = field(default_factory=EnvConfig)
    """The environment."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The policy's architecture."""
    report: ReportConfig = field(default_factory=ReportConfig)
    """The table and the plot at the end."""
    iterations: int = 80
    """Number of iterations; each samples, then updates."""
    forwards: int | None = None
    """Train for so many rows of denoiser forward passes instead of ``iterations``."""
    problems: int = 16
    """Number of problems per iteration, over all processes."""
    group: int = 8
    """Number of the policy's episodes per problem (G)."""
    experts: tuple[float, ...] = (0.5, 0.7, 0.9)
    """Thresholds of the expert episodes in each group, E in number; leave it empty for no experts."""
    expert_iterations: int = 20
    """Number of iterations with experts; the policy continues alone."""
    divide_by_std: bool = False
    """Divide advantages by the group's standard deviation."""
    inner_iterations: int = 2
    """Number of updates per batch."""
    clip: float = 0.5
    """Each step's probability ratio is clipped to [1 - clip, 1 + clip]."""
    entropy_bonus: float = 0.0
    """Weight of the mean entropy per eligible position."""
    learning_rate: float = 3e-4
    """Peak learning rate of AdamW, betas (0.9, 0.99); linear warm-up, then a cosine to zero."""
    warmup: int = 10
    """Number of warm-up iterations."""
    weight_decay: float = 0.1
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Maximum norm of the gradient; larger gradients are scaled down."""
    microbatch: int = 4096
    """Number of steps per backward pass. It affects memory but not the result."""
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


def steer(log_prob: Tensor, expert: Tensor, group: int, experts: int) -> Tensor:
    """Log-probability of the mixture of policy and experts where an expert acted: ``log(G/(G+E) pi + 1/(G+E))``.

    ``log_prob`` ``[N]``, ``expert`` ``[N]`` bool; the other steps keep the policy's own.
    """
    total = group + experts
    mixture = torch.logaddexp(log_prob + np.log(group / total), torch.full_like(log_prob, -np.log(total)))
    return torch.where(expert, mixture, log_prob)


def surest_first(rollout: Rollout) -> Rollout:
    """Picks of a sampler that has no order, in one: what an ordered distribution is asked the probability of."""
    picked = rollout.picks > 0
    sure = rollout.observation.confidence[..., 0].masked_fill(~picked, -1.0)
    order = sure.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1
    return replace(rollout, picks=torch.where(picked, order, 0))


def grpo_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, weight: Tensor, clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped ratio objective over steps, to be minimised.

    Args:
        log_prob, old_log_prob: ``[N]``, of the sampled sets, under the policy and under the one that sampled.
        advantage: ``[N]``, of the step's episode.
        weight: ``[N]``, 1 / (steps of the episode x episodes); the loss is a weighted sum, so batches may be split.
        clip: the ratio is held in [1 - clip, 1 + clip].

    Returns:
        The loss and ``clip_fraction``, the weighted share of steps whose ratio is outside.
    """
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    loss = -(weight * torch.minimum(ratio * advantage, clipped * advantage)).sum()
    outside = ((ratio - 1).abs() > clip).float()
    return loss, {"clip_fraction": (weight * outside).sum().detach()}


def update(
    policy: UnmaskingPolicy,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    advantage: Tensor,
    expert: Tensor,
    config: GRPOConfig,
    processes: Processes,
) -> dict[str, float]:
    """The inner iterations on one batch. ``advantage`` and ``expert`` (bool) are ``[E]``, one entry an episode.

    Each process has its own episodes; all of them take the step that one would take with all episodes.
    """
    total = processes.sum({"episodes": len(rollout)})["episodes"]
    steps_of = torch.bincount(rollout.episode, minlength=len(rollout))
    weight = 1.0 / (steps_of * total)[rollout.episode]
    step_advantage, step_expert = advantage[rollout.episode], expert[rollout.episode]
    steps = torch.arange(len(rollout.episode), device=weight.device)
    parameters, experts = list(policy.parameters()), len(config.experts)
    old_log_prob = torch.empty_like(weight)

    def step_log_prob(rows: Tensor) -> tuple[Tensor, Tensor]:
        seen, picks = rollout.observation[rows], rollout.picks[rows]
        logits = policy.logits(seen)
        log_prob = policy.distribution.log_prob(logits, seen.eligible, picks)
        entropy = policy.distribution.entropy(logits, seen.eligible, picks)
        return steer(log_prob, step_expert[rows], config.group, experts), entropy / seen.eligible.sum(dim=1)

    def gradient(worker_rows: Tensor, inner: int) -> tuple[list[Tensor], dict[str, float]]:
        gradients = [torch.zeros_like(p) for p in parameters]
        totals = {"clip_fraction": 0.0, "entropy": 0.0, "loss": 0.0}
        for rows in worker_rows.split(config.microbatch):
            log_prob, entropy = step_log_prob(rows)
            if inner == 0:  # the policy that sampled is still the policy
                old_log_prob[rows] = log_prob.detach()
            loss, metrics = grpo_loss(log_prob, old_log_prob[rows], step_advantage[rows], weight[rows], config.clip)
            mean_entropy = (weight[rows] * entropy).sum()
            own = torch.autograd.grad(loss - config.entropy_bonus * mean_entropy, parameters)
            gradients = [total + part for total, part in zip(gradients, own, strict=True)]
            metrics |= {"entropy": mean_entropy.detach(), "loss": loss.detach()}
            totals = {name: total + metrics[name].item() for name, total in totals.items()}
        return gradients, totals

    for inner in range(config.inner_iterations):
        shares = [partial(gradient, rows, inner) for rows in steps.chunk(worker_count(steps.device))]
        gradients, metrics = zip(*side_by_side(shares), strict=True)
        for parameter, *parts in zip(parameters, *gradients, strict=True):
            parameter.grad = torch.stack(parts).sum(dim=0)
        processes.sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()
    totals = {name: sum(part[name] for part in metrics) for name in metrics[0]}
    return processes.sum(totals) | {"gradient_norm": norm.item()}


@dataclass
class Played:
    """The episodes of an iteration, of this process: the policy's, then the experts'."""

    rollout: Rollout
    """E episodes."""
    by_policy: Rollout
    """Those of the policy, the first of them."""
    advantage: Tensor
    """``[E]`` float32: reward minus the mean of the problem's group, experts included."""
    problems: np.ndarray
    """Indices of the problems, of all processes."""

    @property
    def expert(self) -> Tensor:
        """``[E]`` bool."""
        return torch.arange(len(self.rollout), device=self.advantage.device) >= len(self.by_policy)


def play(
    envs: list[UnmaskingVectorEnv], policy: UnmaskingPolicy, config: GRPOConfig, iteration: int, processes: Processes
) -> Played:
    """The episodes of one iteration. Several processes draw the same problems, and each plays its own."""
    rng = np.random.default_rng([config.seed, iteration])  # a resumed run needs no generator state
    problems = rng.integers(len(envs[0].episodes.task), size=config.problems)
    decoding_seed = int(rng.integers(2**32))
    groups = np.arange(config.problems * config.group).reshape(-1, config.group)  # an episode's number, its draws
    own, numbers = processes.own(problems), processes.own(groups).flatten()
    by_policy = collect(envs, policy, np.repeat(own, config.group), seed=decoding_seed, numbers=numbers)
    rollouts = [by_policy]
    if iteration < config.expert_iterations:
        for n, threshold in enumerate(config.experts, start=1):
            played = collect(
                envs, Threshold(threshold), own, seed=[decoding_seed, n], numbers=processes.own(groups[:, 0])
            )
            rollouts.append(surest_first(played))
    rollout = Rollout.cat(rollouts)
    for i in (~rollout.reward.isfinite()).nonzero()[:, 0].tolist():
        print(f"warning: reward {rollout.reward[i].item()} for {rollout.problems[i].id}: excluded", file=sys.stderr)
    reward = [part.reward.view(len(own), -1) for part in rollouts]
    advantage = group_advantages(torch.cat(reward, dim=1), divide_by_std=config.divide_by_std)
    by_part = advantage.split([part.shape[1] for part in reward], dim=1)
    return Played(rollout, by_policy, torch.cat([part.flatten() for part in by_part]), problems)


def summarise(played: Played, config: GRPOConfig, parts: tuple[str, ...], processes: Processes) -> dict[str, float]:
    """The metrics of the episodes of all processes; ``parts`` are those of a mixture of tasks."""
    by_policy = played.by_policy
    finite = by_policy.reward.isfinite()
    sums: dict[str, float] = processes.sum({
        "reward": by_policy.reward[finite].sum(),
        "finite": finite.sum(),
        "correct": by_policy.correct.sum(),
        "nfe": by_policy.nfe.sum(),
        "picked": (by_policy.picks > 0).sum(),
        "steps": torch.tensor(len(by_policy.episode)),
        "equal_groups": (by_policy.reward.view(-1, config.group).std(dim=1) == 0).sum(),
        "forwards": played.rollout.nfe.sum(),
    } | sums_by_task(by_policy, parts))  # fmt: skip
    episodes = config.problems * config.group
    return means_by_task(sums, parts) | {
        "reward": sums["reward"] / sums["finite"] if sums["finite"] else np.nan,
        "accuracy": sums["correct"] / episodes,
        "nfe": sums["nfe"] / episodes,
        "set_size": sums["picked"] / sums["steps"],
        "equal_groups": sums["equal_groups"] / config.problems,
        "forwards": int(sums["forwards"]),
    }


def improve(
    envs: list[UnmaskingVectorEnv],
    policy: UnmaskingPolicy,
    optimizer: torch.optim.Optimizer,
    config: GRPOConfig,
    iteration: int,
    processes: Processes,
    forwards: float = 0,
) -> tuple[dict[str, float], np.ndarray]:
    """One iteration: play, compare within groups, update. Returns the metrics and the indices of the problems.

    With several processes the result is that of one. ``forwards`` are those of the iterations before.
    """
    since = time.perf_counter()
    rate = config.learning_rate * rate_factor(config, iteration, forwards)
    optimizer.param_groups[0]["lr"] = rate
    played = play(envs, policy, config, iteration, processes)
    metrics = update(policy, optimizer, played.rollout, played.advantage, played.expert, config, processes)
    metrics |= summarise(played, config, envs[0].episodes.task.parts, processes)
    return metrics | {"learning_rate": rate, "seconds": time.perf_counter() - since}, played.problems


def make_optimizer(policy: UnmaskingPolicy, config: GRPOConfig) -> torch.optim.Optimizer:
    """AdamW as the config says."""
    return torch.optim.AdamW(
        policy.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay
    )


def check(config: GRPOConfig) -> None:
    """Refuse what would fail later, before anything is loaded. Raises ValueError."""
    at_least_one(config, "problems", "inner_iterations", "microbatch")
    check_budget(config.forwards, config.problems * (config.group + len(config.experts)))
    check_common(config)
    check_group(config.group)


@own_threads
def train(config: GRPOConfig) -> Path:
    """Train, then compare with the heuristics on held-out problems. Returns the run's folder.

    Several processes (`torchrun`, `accelerate launch`) share the problems of an iteration.
    """
    check(config)
    processes = launched(config.env.device)
    processes.check_share("problems", config.problems)
    envs = make_envs(config.env, device=processes.device)
    device = envs[0].episodes.device
    policy = make_policy_network(config.policy, config.seed, device)
    optimizer = make_optimizer(policy, config)
    run = Run("grpo", config, processes)
    with run:
        parts = {"policy": policy, "optimizer": optimizer}
        for iteration in run.steps(config.iterations, parts, forwards=config.forwards):
            spent = run.totals["forwards"]
            metrics, problems = improve(envs, policy, optimizer, config, iteration, processes, spent)
            run.record(metrics, problems)
        if run.main:
            policy.save(run.folder / "policy", trained_in=vars(config.env))
            untrained = make_policy_network(config.policy, config.seed, device)
            run.finish(report(run.folder, config.report, config.env, {"untrained": untrained, "GRPO": policy}))
    return run.folder
