"""PPO in one file that knows nothing but Gymnasium: any id with a Box observation and a Discrete action will do.

python docs/examples/cleanrl_ppo.py --env-id CartPole-v1 --total-timesteps 30000
"""

from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.distributions import Categorical

import dllm_gym  # noqa: F401  (registers the ids, and nothing else here is ours)


@dataclass
class Args:
    env_id: str = "MaskedDiffusion-Countdown-TopK-v0"
    total_timesteps: int = 4096
    num_envs: int = 8
    num_steps: int = 64
    epochs: int = 4
    minibatches: int = 4
    learning_rate: float = 1e-3
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    entropy: float = 0.01
    seed: int = 1


class Agent(nn.Module):
    def __init__(self, env: gym.vector.VectorEnv):
        super().__init__()
        inputs, actions = int(np.prod(env.single_observation_space.shape)), int(env.single_action_space.n)
        self.actor = mlp(inputs, actions, scale=0.01)
        self.critic = mlp(inputs, 1, scale=1.0)

    def act(self, observation: torch.Tensor) -> Categorical:
        return Categorical(logits=self.actor(observation))

    def value(self, observation: torch.Tensor) -> torch.Tensor:
        return self.critic(observation)[..., 0]


def mlp(inputs: int, outputs: int, scale: float) -> nn.Sequential:
    layers = [nn.Linear(inputs, 64), nn.Linear(64, 64), nn.Linear(64, outputs)]
    for layer, gain in zip(layers, (2**0.5, 2**0.5, scale), strict=True):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Flatten(), layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def make_rows(env_id: str, num_envs: int) -> gym.vector.VectorEnv:
    """The id's own vector environment, or copies of the single one: no step of theirs is a mere reset."""
    same_step = gym.vector.AutoresetMode.SAME_STEP
    env = gym.make_vec(env_id, num_envs=num_envs)
    if env.metadata["autoreset_mode"] is same_step:
        return env
    env.close()
    copies = {"vectorization_mode": "sync", "vector_kwargs": {"autoreset_mode": same_step}}
    return gym.make_vec(env_id, num_envs=num_envs, **copies)


def train(args: Args) -> tuple[Agent, list[float]]:
    """The agent and the return of every episode, in the order in which they ended."""
    torch.manual_seed(args.seed)
    env = gym.wrappers.vector.RecordEpisodeStatistics(make_rows(args.env_id, args.num_envs))
    agent = Agent(env)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    shape = (args.num_steps, args.num_envs)
    observations = torch.zeros(*shape, *env.single_observation_space.shape)
    actions, log_probs, rewards, ends, values = (torch.zeros(shape) for _ in range(5))
    returns: list[float] = []
    observation = torch.as_tensor(env.reset(seed=args.seed)[0], dtype=torch.float32)
    rollouts = args.total_timesteps // (args.num_steps * args.num_envs)
    for rollout in range(rollouts):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - rollout / rollouts)
        since = len(returns)
        with torch.no_grad():
            for step in range(args.num_steps):
                policy = agent.act(observation)
                action = policy.sample()
                observations[step], actions[step] = observation, action
                log_probs[step], values[step] = policy.log_prob(action), agent.value(observation)
                following, reward, terminated, truncated, infos = env.step(action.numpy())
                rewards[step] = torch.as_tensor(reward)
                ends[step] = torch.as_tensor(terminated | truncated)
                observation = torch.as_tensor(following, dtype=torch.float32)
                if "episode" in infos:
                    returns += infos["episode"]["r"][infos["_episode"]].tolist()

            advantages, ahead, next_value = torch.zeros(shape), 0.0, agent.value(observation)
            for step in reversed(range(args.num_steps)):
                goes_on = 1 - ends[step]
                delta = rewards[step] + args.gamma * next_value * goes_on - values[step]
                advantages[step] = ahead = delta + args.gamma * args.gae_lambda * goes_on * ahead
                next_value = values[step]

        batch = [x.flatten(0, 1) for x in (observations, actions, log_probs, advantages, advantages + values)]
        for _ in range(args.epochs):
            for rows in torch.randperm(args.num_steps * args.num_envs).chunk(args.minibatches):
                seen, action, old_log_prob, advantage, target = (x[rows] for x in batch)
                policy = agent.act(seen)
                ratio = (policy.log_prob(action) - old_log_prob).exp()
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                gain = torch.min(advantage * ratio, advantage * ratio.clamp(1 - args.clip, 1 + args.clip))
                value_loss = (agent.value(seen) - target).square().mean()
                loss = -gain.mean() + 0.25 * value_loss - args.entropy * policy.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
        ended = returns[since:]
        if ended:
            steps = (rollout + 1) * args.num_steps * args.num_envs
            print(f"{steps:7d} steps: mean return {np.mean(ended):.3f} of {len(ended)} episodes", flush=True)
    env.close()
    return agent, returns


if __name__ == "__main__":
    train(tyro.cli(Args))
