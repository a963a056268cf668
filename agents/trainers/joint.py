"""Joint training: sampler and denoiser in turns, so that each adapts to what the other has become.

A round is a phase of GRPO for the unmasking policy, the denoiser frozen, and a phase of an objective for the denoiser,
whose completions that policy decodes. Both phases are the iterations of the trainers on their own
(`dllm_gym.agents.trainers.policy.grpo`, `dllm_gym.agents.trainers.denoiser.trainer`), in environments of their own on
the one denoiser: the sampler's at temperature 0 with a cost of steps, the denoiser's at a temperature and without one.
Learning rates run over all rounds. No published work that we know trains both in turns.

Metrics: those of the trainer whose iteration it is, as ``sampler/...`` or ``denoiser/...``; ``forwards`` rows of
denoiser forward passes and ``seconds`` of training so far, of both.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dllm_gym.agents.environment import EnvConfig, make_envs
from dllm_gym.agents.trainers.configs import SHARED, at_least_one, refuse_given
from dllm_gym.agents.trainers.denoiser import load_objective, trainer
from dllm_gym.agents.trainers.denoiser.comparison import DenoiserReportConfig, compare
from dllm_gym.agents.trainers.denoiser.learner import Learner
from dllm_gym.agents.trainers.denoiser.objective import TrainerConfig
from dllm_gym.agents.trainers.policy import grpo
from dllm_gym.agents.trainers.policy.networks import make_policy_network
from dllm_gym.agents.trainers.processes import Processes, alone, own_threads
from dllm_gym.agents.trainers.run import Run


@dataclass
class JointConfig:
    """Train the sampler and the denoiser in turns."""

    objective: str = "gdsd"
    """Objective for the denoiser: the name of any algorithm that trains one."""
    rounds: int = 4
    """Number of rounds; the iterations of both trainers are divided among them."""
    forwards: int | None = None
    """Train for so many rows of denoiser forward passes instead of the iterations of both; each phase has as many. The
    learning rates follow what is spent, and warm-up counts the iterations of both."""
    env: EnvConfig = field(default_factory=lambda: EnvConfig(id="MaskedDiffusion-Sudoku-v0", denoiser="embedded-early"))
    """The sampler's environment."""
    temperature: float = 1.0
    """Sampling temperature in the denoiser's phases, where alpha is 0."""
    grpo: grpo.GRPOConfig = field(default_factory=grpo.GRPOConfig)
    """The sampler's trainer. Its env, seed and the like are set by the joint training's own flags, and refused here."""
    denoiser: TrainerConfig = None  # type: ignore[assignment]
    """The denoiser's trainer. Its env, seed and the like are set by the joint training's own flags, and refused
    here."""
    report: DenoiserReportConfig = field(default_factory=DenoiserReportConfig)
    """The comparison at the end."""
    seed: int = 0
    """Random seed of both trainers."""
    threads: int = 0
    """Number of torch threads; 0 keeps torch's default."""
    checkpoint_every: int = 20
    """Number of iterations, of either kind, between checkpoints."""
    run_dir: str | None = None
    """Folder of the run; None makes one in runs/."""
    resume: str | None = None
    """Folder of a run to continue."""

    def __post_init__(self):
        if self.denoiser is None:
            self.denoiser = load_objective(self.objective)[0]()


KINDS = ("sampler", "denoiser")


def phases(config: JointConfig) -> list[tuple[str, int]]:
    """Every iteration of the training in order: ("sampler" or "denoiser", its index among those of its kind)."""
    totals = dict(zip(KINDS, (config.grpo.iterations, config.denoiser.iterations), strict=True))
    return [
        (kind, i)
        for turn in range(config.rounds)
        for kind, total in totals.items()
        for i in range(turn * total // config.rounds, (turn + 1) * total // config.rounds)
    ]


@own_threads
def train(config: JointConfig) -> Path:
    """Train, then compare both denoisers with heuristics and the learned policy on held-out problems."""
    policy_config, denoiser_config = _configs(config)
    alone("joint")
    accelerator = trainer.make_accelerator(denoiser_config)
    denoiser = trainer.load_trainable(config.env, accelerator.device)
    sampler_envs = make_envs(policy_config.env, denoiser=denoiser)
    denoiser_envs = make_envs(denoiser_config.env, denoiser=denoiser)
    trainer.check_masking(denoiser_config, denoiser_envs[0])
    policy = make_policy_network(policy_config.policy, config.seed, accelerator.device)
    optimizer = grpo.make_optimizer(policy, policy_config)
    learner = Learner(denoiser, denoiser_config, load_objective(config.objective)[1], accelerator)
    run = Run("joint", config)
    order = phases(config)
    with run:
        parts = {"policy": policy, "optimizer": optimizer, "learner": learner}
        for step in run.steps(len(order), parts, forwards=config.forwards):
            spent = run.totals["forwards"]
            if config.forwards is None:
                kind, iteration = order[step]
            else:
                kind, iteration = KINDS[int(2 * config.rounds * spent / config.forwards) % 2], step
            if kind == "sampler":
                metrics, problems = grpo.improve(
                    sampler_envs, policy, optimizer, policy_config, iteration, Processes(), spent
                )
            else:
                metrics, problems = trainer.improve(learner, denoiser_envs, policy, iteration, spent)
            run.record(metrics, problems, prefix=f"{kind}/")
        policy.save(run.folder / "policy", trained_in=vars(policy_config.env))
        denoiser.save(run.folder / "denoiser")
        summary = {}
        if config.report.enabled:
            learned = {"learned policy": policy.seeded(0)}
            summary = compare(run.folder, config.report, policy_config.env, denoiser, "joint", learned)
        run.finish(summary)
    return run.folder


def _configs(config: JointConfig) -> tuple[grpo.GRPOConfig, TrainerConfig]:
    """Both trainers' configs, with what the joint config gives. Raises ValueError."""
    at_least_one(config, "rounds", "checkpoint_every")
    if not config.temperature > 0:
        raise ValueError(
            f"temperature={config.temperature}: must be above 0, so that the completions of a problem differ."
        )
    refuse_given(config.grpo, "grpo", SHARED)
    refuse_given(config.denoiser, "denoiser", SHARED)
    if config.denoiser.sampler != TrainerConfig.sampler:
        raise ValueError(
            f"denoiser.sampler={config.denoiser.sampler!r}: cannot be chosen: the policy in training decodes."
        )
    shared: dict[str, Any] = {"forwards": config.forwards, "seed": config.seed, "threads": config.threads}
    policy_config = replace(config.grpo, env=config.env, **shared)
    env = replace(config.env, temperature=config.temperature, alpha=0.0)
    denoiser_config = replace(config.denoiser, env=env, report=config.report, **shared)
    grpo.check(policy_config)
    denoiser_config.check()
    return policy_config, denoiser_config
