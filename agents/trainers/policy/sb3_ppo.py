"""Stable-Baselines3's PPO on the sampler's environment, with our policy network inside SB3's policy class.

SB3's own Bernoulli sums the log-probability over all positions, also those that could not be chosen; here it sums over
eligible positions only. Everything else (buffer, advantages, updates) is SB3's. `--resume` continues with weights,
optimiser and step count, but not bit for bit: SB3 saves neither environment nor generators.

Metrics, one row a rollout: ``reward``, ``accuracy``, ``nfe`` of the episodes that ended in it; ``forwards`` denoiser
rows forwarded so far; ``seconds`` of training so far; and SB3's own ``train/*``.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import BernoulliDistribution
from stable_baselines3.common.logger import configure
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor

from dllm_gym.agents.environment import EnvConfig, make_env
from dllm_gym.agents.samplers.policy import Critic, PolicyConfig, UnmaskingPolicy
from dllm_gym.agents.terminal import progress_bar
from dllm_gym.agents.trainers.configs import at_least_one
from dllm_gym.agents.trainers.policy.comparison import ReportConfig, report
from dllm_gym.agents.trainers.policy.networks import check_common, make_policy_network
from dllm_gym.agents.trainers.processes import alone, own_threads
from dllm_gym.agents.trainers.run import Run
from dllm_gym.agents.trainers.seeding import seeded
from dllm_gym.envs.sb3 import SB3VecEnv
from dllm_gym.envs.spaces import observation_from_dict


@dataclass
class SB3PPOConfig:
    """Train an unmasking policy with Stable-Baselines3's PPO."""

    env: EnvConfig = field(default_factory=lambda: EnvConfig(num_envs=64))
    """The environment."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The policy's architecture; the distribution must be "bernoulli"."""
    report: ReportConfig = field(default_factory=ReportConfig)
    """The table and the plot at the end."""
    timesteps: int = 40_000
    """Number of environment steps over all rows, each of which is a forward pass of one row."""
    steps: int = 16
    """Number of steps per row in each rollout."""
    batch_size: int = 256
    """Number of steps per update."""
    epochs: int = 4
    """Number of passes over each rollout."""
    gae_lambda: float = 0.95
    """Lambda of the generalised advantage estimate; the discount is 1."""
    clip: float = 0.2
    """The probability ratio is clipped to [1 - clip, 1 + clip]."""
    entropy_bonus: float = 0.0
    """Weight of the entropy of the set distribution."""
    learning_rate: float = 3e-4
    """Learning rate of Adam."""
    max_grad_norm: float = 0.5
    """Maximum norm of the gradient; larger gradients are scaled down."""
    seed: int = 0
    """Random seed for weights, problems and sampling."""
    threads: int = 0
    """Number of torch threads; 0 keeps torch's default."""
    checkpoint_every: int = 20
    """Number of rollouts between checkpoints."""
    run_dir: str | None = None
    """Folder of the run; None makes one in runs/."""
    resume: str | None = None
    """Folder of a run to continue."""


class EligibleBernoulli(BernoulliDistribution):
    """SB3's Bernoulli over sets, summed over the eligible positions only."""

    def proba_distribution(self, action_logits: Tensor, eligible: Tensor) -> EligibleBernoulli:
        self.eligible = eligible
        return super().proba_distribution(action_logits)

    def log_prob(self, actions: Tensor) -> Tensor:
        return (self.distribution.log_prob(actions) * self.eligible).sum(dim=1)

    def entropy(self) -> Tensor:
        return (self.distribution.entropy() * self.eligible).sum(dim=1)

    def sample(self) -> Tensor:
        return super().sample() * self.eligible

    def mode(self) -> Tensor:
        return super().mode() * self.eligible


class UnmaskingActorCriticPolicy(ActorCriticPolicy):
    """SB3 policy around an `UnmaskingPolicy` (actor) and a `Critic`; give ``policy_kwargs={"config": PolicyConfig()}``.

    Works on the Dict observation of `UnmaskingEnv` and its MultiBinary action, for example
    ``PPO(UnmaskingActorCriticPolicy, SB3VecEnv(...))``.
    """

    def __init__(self, observation_space, action_space, lr_schedule, config: PolicyConfig | None = None, **kwargs):
        self.unmasking_config = config or PolicyConfig()
        if self.unmasking_config.distribution != "bernoulli":
            raise ValueError(
                f"distribution={self.unmasking_config.distribution!r}: SB3's action is a set without an order, "
                f"so it must be 'bernoulli'; train an ordered one with `grpo` or `ppo`."
            )
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _build(self, lr_schedule) -> None:
        self.actor = UnmaskingPolicy(self.unmasking_config)
        self.critic = Critic(self.unmasking_config)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def forward(self, obs: dict[str, Tensor], deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        distribution = self.get_distribution(obs)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, self.predict_values(obs)[:, 0], distribution.log_prob(actions)

    def evaluate_actions(self, obs: dict[str, Tensor], actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        distribution = self.get_distribution(obs)
        return self.predict_values(obs)[:, 0], distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: dict[str, Tensor]) -> EligibleBernoulli:
        seen = observation_from_dict(obs, UnmaskingPolicy.signals)
        return EligibleBernoulli(seen.masked.shape[1]).proba_distribution(self.actor.logits(seen), seen.eligible)

    def predict_values(self, obs: dict[str, Tensor]) -> Tensor:
        return self.critic(observation_from_dict(obs, UnmaskingPolicy.signals))[:, None]

    def _predict(self, observation: dict[str, Tensor], deterministic: bool = False) -> Tensor:
        return self.get_distribution(observation).get_actions(deterministic=deterministic)


class _RunCallback(BaseCallback):
    """Writes each rollout's episodes to the run, and SB3's own numbers with them."""

    def __init__(self, run: Run, config: SB3PPOConfig, bar, seconds: float):
        super().__init__()
        self.run, self.config, self.bar = run, config, bar
        self.since, self.rollouts, self.ended = time.perf_counter() - seconds, 0, []

    def _on_step(self) -> bool:
        self.ended += [
            (info["episode"]["r"], info["correct"], info["nfe"]) for info in self.locals["infos"] if "episode" in info
        ]
        return not self.run.stop_requested

    def _on_rollout_end(self) -> None:
        self.rollouts += 1
        if not self.ended:
            return
        reward, correct, nfe = np.array(self.ended, dtype=np.float64).mean(axis=0).tolist()
        self.ended = []
        metrics = {"reward": reward, "accuracy": correct, "nfe": nfe}
        metrics |= {"forwards": self.num_timesteps, "seconds": time.perf_counter() - self.since}
        own = {k: float(v) for k, v in self.logger.name_to_value.items() if k.startswith("train/")}
        if not math.isfinite(own.get("train/explained_variance", 0.0)):
            del own["train/explained_variance"]  # undefined where all returns are equal
        self.run.log(self.num_timesteps, metrics | own)
        self.bar(self.num_timesteps, metrics)
        if self.rollouts % self.config.checkpoint_every == 0:
            self.save()

    def save(self) -> None:
        state = {"policy": self.model.policy.state_dict(), "optimizer": self.model.policy.optimizer.state_dict()}
        self.run.save(self.num_timesteps, state | {"seconds": time.perf_counter() - self.since})


@own_threads
def train(config: SB3PPOConfig) -> Path:
    """Train, then compare with the heuristics on held-out problems. Returns the run's folder."""
    alone("sb3-ppo")
    at_least_one(config, "steps", "batch_size", "epochs")
    check_common(config)
    env = make_env(config.env)
    with seeded(config.seed):
        model = PPO(
            UnmaskingActorCriticPolicy,
            SB3VecEnv(env),
            policy_kwargs={"config": config.policy},
            learning_rate=config.learning_rate,
            n_steps=config.steps,
            batch_size=config.batch_size,
            n_epochs=config.epochs,
            gamma=1.0,
            gae_lambda=config.gae_lambda,
            clip_range=config.clip,
            ent_coef=config.entropy_bonus,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            device=env.episodes.device,
        )
        actor = model.policy.actor
        untrained = make_policy_network(config.policy, config.seed, env.episodes.device)
        actor.load_state_dict(untrained.state_dict())
        model.set_logger(configure(None, []))
        run = Run("sb3-ppo", config, totals=("seconds",))
        model.num_timesteps = run.restore({"policy": model.policy, "optimizer": model.policy.optimizer})
        with run, progress_bar(config.timesteps, model.num_timesteps) as bar:
            callback = _RunCallback(run, config, bar, run.totals["seconds"])
            left = config.timesteps - model.num_timesteps
            if left > 0:
                model.learn(left, callback=callback, reset_num_timesteps=False)
                callback.save()
            if run.stop_requested:
                return run.folder
            actor.save(run.folder / "policy", trained_in=vars(config.env))
            run.finish(report(run.folder, config.report, config.env, {"untrained": untrained, "SB3 PPO": actor}))
    return run.folder
