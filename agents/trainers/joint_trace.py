"""Sampler and denoiser from the same episodes: one likelihood, that of the whole episode, has both as its factors.

    log p(episode) = sum over steps of  log pi(positions | confidences)  +  sum over them of  log p(token | canvas)

The policy gives the first factor, the denoiser the second. The denoiser is in the first too: the policy sees nothing of
a canvas but the denoiser's confidences. So ``A * grad log p(episode)``, taken through the confidences, is the policy
gradient of the expected reward with respect to both networks; a test compares it with enumeration. One return pays for
right answers and for few steps. `dllm_gym.agents.trainers.joint` trains in turns instead.

REINFORCE with leave-one-out advantages. Some steps of each episode are drawn, and weigh so that their sum estimates
that of all steps. The environment fills an empty set with the most confident position; which one that is has no
derivative.

Metrics: ``reward``, ``accuracy``, ``nfe`` of the episodes; ``set_size`` positions picked a step; ``entropy`` of the
denoiser at the positions that could be chosen, in nats; ``equal_groups`` share of groups without any difference in
reward; ``log_prob_sampler`` and ``log_prob_denoiser``, nats per step; ``gradient_norm_sampler`` and
``gradient_norm_denoiser`` before clipping; ``forwards`` rows of denoiser forward passes so far, a backward pass being
two; ``seconds`` of training so far.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dllm_gym import decoding
from dllm_gym.agents.environment import EnvConfig, make_envs
from dllm_gym.agents.samplers.policy import PolicyConfig, UnmaskingPolicy, load_policy
from dllm_gym.agents.samplers.rollout import collect
from dllm_gym.agents.trainers.advantages import check_group, group_advantages, scale_negatives
from dllm_gym.agents.trainers.denoiser.comparison import DenoiserReportConfig, compare
from dllm_gym.agents.trainers.denoiser.learner import let_train
from dllm_gym.agents.trainers.denoiser.objective import LoRAConfig
from dllm_gym.agents.trainers.denoiser.trainer import load_trainable, trajectories
from dllm_gym.agents.trainers.denoiser.weights import TrainedWeights
from dllm_gym.agents.trainers.policy.networks import make_policy_network
from dllm_gym.agents.trainers.processes import alone, own_threads
from dllm_gym.agents.trainers.run import Run, at_least_one, check_budget
from dllm_gym.agents.trainers.schedule import rate_factor
from dllm_gym.decoding.trajectory import draw_steps
from dllm_gym.denoisers.base import Denoiser
from dllm_gym.envs.vector import UnmaskingVectorEnv
from dllm_gym.types import Canvas, Observation, TokenSampling


@dataclass
class JointTraceConfig:
    """Train the sampler and the denoiser on the same episodes."""

    env: EnvConfig = field(
        default_factory=lambda: EnvConfig(
            id="MaskedDiffusion-Sudoku-v0", denoiser="embedded-early", temperature=1.0, num_envs=256
        )
    )
    """The environment. Its reward is the one return of both."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The policy's architecture."""
    start: str | None = None
    """Folder of a trained policy to start from; None: fresh weights."""
    report: DenoiserReportConfig = field(default_factory=DenoiserReportConfig)
    """The comparison at the end."""
    iterations: int = 60
    """Number of iterations; each samples, then updates."""
    forwards: int | None = None
    """Train for so many rows of denoiser forward passes, in sampling and updates, instead of ``iterations``. A backward
    pass counts as two."""
    problems: int = 32
    """Number of problems per iteration."""
    group: int = 8
    """Number of episodes per problem (G)."""
    steps: int = 4
    """Number of steps of each episode that are scored, drawn at random; all where an episode has no more."""
    sampler_rate: float = 1e-3
    """Peak learning rate of the policy; 0 keeps it as it is."""
    denoiser_rate: float = 1e-4
    """Peak learning rate of the denoiser; 0 keeps it as it is."""
    negative_scale: float = 1.0
    """Advantages below 0 are multiplied by this for the tokens, not for the positions. 0 leaves out what the denoiser
    drew in episodes that were no better than their group."""
    through_confidences: bool = True
    """Differentiate the policy's choice through the confidences; without it, what the policy sees is a constant."""
    warmup: int = 5
    """Number of warm-up iterations."""
    max_grad_norm: float = 1.0
    """Maximum norm of each network's gradient; larger gradients are scaled down."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Low-rank adapters, in place of training all weights of the denoiser."""
    microbatch: int = 256
    """Number of steps per forward and backward pass. It affects memory but not the result."""
    seed: int = 0
    """Random seed for weights, problems, episodes and steps."""
    threads: int = 0
    """Number of torch threads; 0 keeps torch's default."""
    checkpoint_every: int = 20
    """Number of iterations between checkpoints."""
    run_dir: str | None = None
    """Folder of the run; None makes one in runs/."""
    resume: str | None = None
    """Folder of a run to continue."""


def check(config: JointTraceConfig) -> None:
    """Refuse what would fail later, before anything is loaded. Raises ValueError."""
    at_least_one(config, "iterations", "problems", "steps", "microbatch", "checkpoint_every")
    at_least_one(config.report, "problems")
    check_group(config.group, "leave-one-out")
    check_budget(config.forwards, config.problems * config.group)
    sampling = config.env.sampling
    if not sampling.temperature > 0:
        raise ValueError(f"env.temperature={sampling.temperature}: must be above 0, so that tokens have a probability.")
    if replace(sampling, temperature=0.0) != TokenSampling():
        raise ValueError(
            "env.top_p, env.top_k, env.end_token_penalty, env.end_tokens_last, env.confidence: the likelihood is that "
            "of softmax(logits / temperature), and of untempered confidences; leave them out."
        )
    if not 0 <= config.negative_scale <= 1:
        raise ValueError(f"negative_scale={config.negative_scale}: must be in [0, 1].")
    if config.policy.confidence_k > config.env.confidence_k:
        raise ValueError(
            f"policy.confidence_k={config.policy.confidence_k}: must be at most env.confidence_k="
            f"{config.env.confidence_k}, what the environment shows."
        )


@dataclass
class EpisodeSteps:
    """N steps, each with the canvas before it."""

    canvas: Canvas
    observation: Observation
    """What the policy saw."""
    picks: Tensor
    """``[N, L]`` int64: what it picked."""
    written: Tensor
    """``[N, L]`` bool: where tokens were written: its picks, or the position that the environment adds to none."""

    def __getitem__(self, rows: Tensor) -> EpisodeSteps:
        return EpisodeSteps(self.canvas[rows], self.observation[rows], self.picks[rows], self.written[rows])


def step_log_probs(
    denoiser: Denoiser,
    policy: UnmaskingPolicy,
    steps: EpisodeSteps,
    temperature: float,
    through_confidences: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[N]`` of the positions, by the policy, and of their tokens, by the denoiser."""
    seen = steps.observation
    predicted = seen.masked & (seen.confidence[..., 0] > 0)
    log_prob, confidence = denoiser.score_step(
        steps.canvas, seen.token, predicted, seen.confidence.shape[-1], temperature
    )
    if through_confidences:
        seen = replace(seen, confidence=confidence)
    positions = policy.distribution.log_prob(policy.logits(seen), seen.eligible, steps.picks)
    return positions, torch.where(steps.written, log_prob, 0.0).sum(dim=1)


def improve(
    envs: list[UnmaskingVectorEnv],
    policy: UnmaskingPolicy,
    weights: TrainedWeights,
    optimizers: list[torch.optim.Optimizer],
    config: JointTraceConfig,
    iteration: int,
    forwards: float,
) -> tuple[dict[str, float], np.ndarray]:
    """One iteration: play, compare within groups, update both. Returns the metrics and the indices of the problems.

    ``weights`` are the denoiser's; ``optimizers`` are the policy's, then theirs; ``forwards`` are those of the
    iterations before.
    """
    since, episodes = time.perf_counter(), envs[0].episodes
    denoiser, device = episodes.denoiser, episodes.device
    rng = np.random.default_rng([config.seed, iteration])  # a resumed run needs no generator state
    problems = rng.integers(len(episodes.task), size=config.problems)
    decoding_seed, steps_seed = (int(n) for n in rng.integers(2**32, size=2))
    rollout = collect(envs, policy, np.repeat(problems, config.group), seed=decoding_seed, explore=True)

    groups = rollout.reward.view(-1, config.group)
    advantage = group_advantages(groups, "leave-one-out").flatten()
    counts = torch.bincount(rollout.episode)
    alike = torch.ones(len(counts), int(counts.max()), device=device)
    numbers, weight = draw_steps(alike, counts, config.steps, torch.Generator(device).manual_seed(steps_seed))
    learned = (weight > 0) & (advantage != 0)
    chosen, weight = (counts.cumsum(0) - counts + numbers)[learned], weight[learned]
    owner = rollout.episode[chosen]
    seen = rollout.observation[chosen]
    prompts = [episodes.encode_prompt(rollout.problems[n]) for n in owner.tolist()]
    totals = {"sampler": 0.0, "denoiser": 0.0}
    for optimizer in optimizers:
        optimizer.zero_grad()
    if prompts:
        canvas = decoding.before(seen, prompts, denoiser.mask_token_id)
        written = trajectories(rollout, episodes.empty_action, config.env.temperature).written[chosen]
        steps = EpisodeSteps(canvas, seen, rollout.picks[chosen], written)
        for rows in torch.arange(len(chosen), device=device).split(config.microbatch):
            positions, tokens = step_log_probs(
                denoiser, policy, steps[rows], config.env.temperature, config.through_confidences
            )
            own = advantage[owner[rows]]
            surrogate = own * positions + scale_negatives(own, config.negative_scale) * tokens
            loss = -(weight[rows] * surrogate).sum()
            (loss / (len(rollout) * episodes.gen_length)).backward()
            totals["sampler"] += positions.detach().sum().item()
            totals["denoiser"] += tokens.detach().sum().item()
    weights.take_gradients()
    norms = []
    for optimizer, rate in zip(optimizers, (config.sampler_rate, config.denoiser_rate), strict=True):
        group = optimizer.param_groups[0]
        group["lr"] = rate * rate_factor(config, iteration, forwards)
        norms.append(torch.nn.utils.clip_grad_norm_(group["params"], config.max_grad_norm))
        if rate and norms[-1].isfinite():  # else the weights stay what they are, and the run ends with what it logs
            optimizer.step()
    weights.publish()
    eligible = rollout.observation.eligible
    count = max(1, len(chosen))
    return {
        "reward": rollout.reward.mean().item(),
        "accuracy": rollout.correct.float().mean().item(),
        "nfe": rollout.nfe.float().mean().item(),
        "set_size": ((rollout.picks > 0).sum() / len(rollout.episode)).item(),
        "entropy": rollout.observation.entropy[eligible].mean().item(),
        "equal_groups": (groups == groups[:, :1]).all(dim=1).float().mean().item(),
        "log_prob_sampler": totals["sampler"] / count,
        "log_prob_denoiser": totals["denoiser"] / count,
        "gradient_norm_sampler": norms[0].item(),
        "gradient_norm_denoiser": norms[1].item(),
        "forwards": int(rollout.nfe.sum()) + 3 * len(chosen),
        "seconds": time.perf_counter() - since,
    }, problems


@own_threads
def train(config: JointTraceConfig) -> Path:
    """Train, then compare both denoisers with heuristics and the learned policy on held-out problems."""
    check(config)
    alone("joint-trace")
    denoiser = load_trainable(config.env, config.env.device)
    device = denoiser.device
    if denoiser.approximates(config.env.cache):
        raise ValueError(f"env.cache={config.env.cache!r}: an approximate cache shows other confidences; give 'none'.")
    envs = make_envs(config.env, denoiser=denoiser)
    let_train(denoiser, config.lora, config.seed)
    if config.start is None:
        policy = make_policy_network(config.policy, config.seed, device)
    else:
        policy = load_policy(config.start, device)
    weights = TrainedWeights(denoiser.model)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=decay)
        for parameters, decay in ((policy.parameters(), 0.1), (weights.masters.values(), 0.0))
    ]
    run = Run("joint-trace", config)
    parts = {"policy": policy, "optimizers": optimizers, "weights": weights}
    with run:
        for iteration in run.steps(config.iterations, parts, forwards=config.forwards):
            spent = run.totals["forwards"]
            metrics, problems = improve(envs, policy, weights, optimizers, config, iteration, spent)
            run.record(metrics, problems)
        policy.save(run.folder / "policy", trained_in=vars(config.env))
        denoiser.save(run.folder / "denoiser")
        summary = {}
        if config.report.enabled:
            learned = {"learned policy": policy.seeded(0)}
            summary = compare(run.folder, config.report, config.env, denoiser, "joint-trace", learned)
        run.finish(summary)
    return run.folder
