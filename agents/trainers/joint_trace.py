"""Sampler and denoiser from the same episodes: one likelihood, that of the whole episode, has both as its factors.

    log p(episode) = sum over steps of  log pi(positions | confidences)  +  sum over them of  log p(token | canvas)

The policy gives the first factor, the denoiser the second. The denoiser is in the first too: the policy sees nothing of
a canvas but the denoiser's confidences. So ``A * grad log p(episode)``, taken through the confidences, is the policy
gradient of the expected reward with respect to both networks; a test compares it with enumeration. One return pays for
right answers and for few steps. `dllm_gym.agents.trainers.joint` trains in turns instead.

The policy takes GRPO's clipped updates (`dllm_gym.agents.trainers.policy.grpo`): it learns from all steps, which needs
no forward pass of the denoiser, and from experts. It learns slowly at first: a denoiser learns more from orders that
vary than from a policy that has settled early. The denoiser follows the policy gradient of the policy's own
episodes. Some steps of each are drawn, and weigh so that their sum estimates that of all steps. The environment fills
an empty set with the most confident position; which one that is has no derivative.

Metrics: those of `grpo`, whose ``entropy`` and ``gradient_norm`` are the policy's; and ``denoiser_entropy`` at the
positions that could be chosen, in nats; ``log_prob_positions`` and ``log_prob_tokens``, nats per scored step;
``denoiser_gradient_norm`` before clipping; ``denoiser_rate``; ``forwards`` rows of denoiser forward passes so far, in
decoding and updates, a backward pass being two; ``seconds`` of training so far.
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
from dllm_gym.agents.samplers.policy import UnmaskingPolicy, load_policy
from dllm_gym.agents.trainers.advantages import scale_negatives
from dllm_gym.agents.trainers.configs import SHARED, at_least_one, refuse_given
from dllm_gym.agents.trainers.denoiser.comparison import DenoiserReportConfig, compare
from dllm_gym.agents.trainers.denoiser.learner import let_train, make_optimizers
from dllm_gym.agents.trainers.denoiser.objective import OPTIMIZERS, LoRAConfig
from dllm_gym.agents.trainers.denoiser.trainer import load_trainable, trajectories
from dllm_gym.agents.trainers.denoiser.weights import TrainedWeights
from dllm_gym.agents.trainers.policy import grpo
from dllm_gym.agents.trainers.policy.networks import make_policy_network
from dllm_gym.agents.trainers.processes import Processes, alone, own_threads
from dllm_gym.agents.trainers.run import Run
from dllm_gym.agents.trainers.schedule import delayed_factor, rate_factor
from dllm_gym.decoding.trajectory import draw_steps, of_episodes
from dllm_gym.denoisers.base import Denoiser
from dllm_gym.envs.vector import UnmaskingVectorEnv
from dllm_gym.types import Canvas, Observation, Rollout, TokenSampling


@dataclass
class JointTraceConfig:
    """Train the sampler and the denoiser on the same episodes."""

    env: EnvConfig = field(
        default_factory=lambda: EnvConfig(
            id="MaskedDiffusion-Sudoku-v0", denoiser="embedded-early", temperature=0.5, num_envs=256
        )
    )
    """The environment. Its reward is the one return of both."""
    grpo: grpo.GRPOConfig = field(default_factory=grpo.GRPOConfig)
    """The policy, its updates, and the numbers of problems and episodes. Its env, seed and the like are set by the
    joint training's own flags, and refused here."""
    policy_after: float = 0.6
    """Share of the training after which the policy learns at its whole rate, and before which at a tenth of it. The
    denoiser learns more from a policy whose orders still vary."""
    start: str | None = None
    """Folder of a trained policy to start from; None: fresh weights."""
    report: DenoiserReportConfig = field(default_factory=DenoiserReportConfig)
    """The comparison at the end."""
    iterations: int = 60
    """Number of iterations; each samples, then updates."""
    forwards: int | None = None
    """Train for so many rows of denoiser forward passes, in sampling and updates, instead of ``iterations``. A backward
    pass counts as two."""
    steps: int = 2
    """Number of steps of each episode that the denoiser scores, drawn at random; all where an episode has no more."""
    optimizer: str = "muon"
    """The denoiser's: "muon" for linear layers, with AdamW for the rest, or "adamw"."""
    denoiser_rate: float = 4e-4
    """Peak learning rate of the denoiser; take a quarter with AdamW."""
    negative_scale: float = 0.0
    """Advantages below 0 are multiplied by this for the tokens, not for the positions. 0 leaves out what the denoiser
    drew in episodes that were no better than their group; 1 is the policy gradient."""
    through_confidences: bool = True
    """Differentiate the policy's choice through the confidences; without it, what the policy sees is a constant."""
    warmup: int = 10
    """Number of warm-up iterations."""
    max_grad_norm: float = 1.0
    """Maximum norm of the denoiser's gradient; larger gradients are scaled down."""
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


def checked(config: JointTraceConfig) -> JointTraceConfig:
    """The config, with what GRPO's shares. Raises ValueError for what would fail later, before anything is loaded."""
    at_least_one(config, "iterations", "steps", "microbatch", "checkpoint_every")
    at_least_one(config.report, "problems")
    refuse_given(config.grpo, "grpo", (*SHARED, "iterations", "warmup"))
    shared = {name: getattr(config, name) for name in ("env", "iterations", "forwards", "warmup", "seed", "threads")}
    config = replace(config, grpo=replace(config.grpo, **shared))
    grpo.check(config.grpo)
    if config.optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={config.optimizer!r}: must be one of {', '.join(OPTIMIZERS)}.")
    sampling = config.env.sampling
    if not sampling.temperature > 0:
        raise ValueError(f"env.temperature={sampling.temperature}: must be above 0, so that tokens have a probability.")
    if replace(sampling, temperature=0.0) != TokenSampling():
        raise ValueError(
            "env.top_p, env.top_k, env.end_token_penalty, env.end_tokens_last, env.confidence: the likelihood is that "
            "of softmax(logits / temperature), and of untempered confidences; leave them out."
        )
    if not 0 <= config.policy_after < 1:
        raise ValueError(f"policy_after={config.policy_after}: must be in [0, 1).")
    if not 0 <= config.negative_scale <= 1:
        raise ValueError(f"negative_scale={config.negative_scale}: must be in [0, 1].")
    return config


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


def denoiser_gradient(
    envs: list[UnmaskingVectorEnv],
    policy: UnmaskingPolicy,
    rollout: Rollout,
    advantage: Tensor,
    config: JointTraceConfig,
    generator: torch.Generator,
) -> dict[str, float]:
    """Add the gradient of the loss, ``-A * log p(episode)``, to the denoiser's weights; and to the policy's, unused.

    Args:
        envs: in which the episodes were played.
        policy: that played the E episodes of the rollout.
        advantage: ``[E]``.
        generator: of the steps that are drawn.
    """
    episodes = envs[0].episodes
    denoiser = episodes.denoiser
    taken = trajectories(rollout, episodes.empty_action, config.env.temperature)
    counts = torch.bincount(taken.episode, minlength=len(rollout))
    surprise = taken.doubt - rollout.log_prob  # of the tokens, and of the positions
    numbers, weight = draw_steps(of_episodes(surprise, counts), counts, config.steps, generator)
    learned = (weight > 0) & (advantage != 0)
    chosen, weight = (counts.cumsum(0) - counts + numbers)[learned], weight[learned]
    owner, seen = rollout.episode[chosen], rollout.observation[chosen]
    total = torch.zeros(2, device=weight.device)
    if len(chosen):
        prompts = [episodes.encode_prompt(rollout.problems[n]) for n in owner.tolist()]
        canvas = decoding.before(seen, prompts, denoiser.mask_token_id)
        steps = EpisodeSteps(canvas, seen, rollout.picks[chosen], taken.written[chosen])
        for rows in torch.arange(len(chosen), device=weight.device).split(config.microbatch):
            positions, tokens = step_log_probs(
                denoiser, policy, steps[rows], config.env.temperature, config.through_confidences
            )
            own = advantage[owner[rows]]
            surrogate = own * positions + scale_negatives(own, config.negative_scale) * tokens
            loss = -(weight[rows] * surrogate).sum() / (len(rollout) * episodes.gen_length)
            loss.backward()
            total += torch.stack([positions.detach().sum(), tokens.detach().sum()])
    eligible = rollout.observation.eligible
    positions, tokens = (total / max(1, len(chosen))).tolist()
    return {
        "log_prob_positions": positions,
        "log_prob_tokens": tokens,
        "denoiser_entropy": rollout.observation.entropy[eligible].mean().item(),
        "forwards": 3 * len(chosen),
    }


def improve(
    envs: list[UnmaskingVectorEnv],
    policy: UnmaskingPolicy,
    sampler_optimizer: torch.optim.Optimizer,
    weights: TrainedWeights,
    optimizers: list[torch.optim.Optimizer],
    config: JointTraceConfig,
    iteration: int,
    forwards: float,
) -> tuple[dict[str, float], np.ndarray]:
    """One iteration: play, compare within groups, update both. Returns the metrics and the indices of the problems.

    ``weights`` and ``optimizers`` are the denoiser's; ``forwards`` are those of the iterations before.
    """
    since = time.perf_counter()
    sampler_rate = config.grpo.learning_rate * delayed_factor(config, iteration, forwards, config.policy_after)
    denoiser_rate = config.denoiser_rate * rate_factor(config, iteration, forwards)
    played = grpo.play(envs, policy, config.grpo, iteration, Processes())
    seed = int(np.random.default_rng([config.seed, iteration, 1]).integers(2**32))
    generator = torch.Generator(played.advantage.device).manual_seed(seed)
    own = played.advantage[: len(played.by_policy)]
    metrics = denoiser_gradient(envs, policy, played.by_policy, own, config, generator)

    for group in sampler_optimizer.param_groups:
        group["lr"] = sampler_rate
    metrics |= grpo.update(
        policy, sampler_optimizer, played.rollout, played.advantage, played.expert, config.grpo, Processes()
    )
    weights.take_gradients()
    norm = torch.nn.utils.clip_grad_norm_(weights.masters.values(), config.max_grad_norm)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = denoiser_rate
        if norm.isfinite():  # else the weights stay what they are, and the run ends with what it logs
            optimizer.step()
        optimizer.zero_grad()
    weights.publish()
    sampling = grpo.summarise(played, config.grpo, envs[0].episodes.task.parts, Processes())
    return metrics | sampling | {
        "forwards": sampling["forwards"] + metrics["forwards"],
        "denoiser_gradient_norm": norm.item(),
        "learning_rate": sampler_rate,
        "denoiser_rate": denoiser_rate,
        "seconds": time.perf_counter() - since,
    }, played.problems


@own_threads
def train(config: JointTraceConfig) -> Path:
    """Train, then compare both denoisers with heuristics and the learned policy on held-out problems."""
    asked, config = config, checked(config)
    alone("joint-trace")
    denoiser = load_trainable(config.env, config.env.device)
    device = denoiser.device
    if denoiser.approximates(config.env.cache):
        raise ValueError(f"env.cache={config.env.cache!r}: an approximate cache shows other confidences; give 'none'.")
    envs = make_envs(config.env, denoiser=denoiser)
    let_train(denoiser, config.lora, config.seed)
    if config.start is None:
        policy = make_policy_network(config.grpo.policy, config.seed, device)
    else:
        policy = load_policy(config.start, device)
    weights = TrainedWeights(denoiser.model)
    sampler_optimizer = grpo.make_optimizer(policy, config.grpo)
    optimizers = make_optimizers(denoiser.model, weights.masters, config.optimizer, config.denoiser_rate)
    run = Run("joint-trace", asked)
    parts = {"policy": policy, "sampler_optimizer": sampler_optimizer, "weights": weights, "optimizers": optimizers}
    with run:
        for iteration in run.steps(config.iterations, parts, forwards=config.forwards):
            spent = run.totals["forwards"]
            metrics, problems = improve(envs, policy, sampler_optimizer, weights, optimizers, config, iteration, spent)
            run.record(metrics, problems)
        policy.save(run.folder / "policy", trained_in=vars(config.env))
        denoiser.save(run.folder / "denoiser")
        summary = {}
        if config.report.enabled:
            learned = {"learned policy": policy.seeded(0)}
            summary = compare(run.folder, config.report, config.env, denoiser, "joint-trace", learned)
        run.finish(summary)
    return run.folder
