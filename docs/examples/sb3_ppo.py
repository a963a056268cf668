"""Stable-Baselines3's PPO, unchanged, learns how many of the most confident tokens to unmask at each step.

For whole sets of positions, all rows in one forward, see `dllm_gym.envs.sb3.make_sb3_env` in docs/sb3-ppo.md.
"""

from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

import dllm_gym  # noqa: F401  (registers the ids)


def main(timesteps: int = 2048, episodes: int = 50) -> PPO:
    env = make_vec_env("MaskedDiffusion-GSM8K-TopK-v0", n_envs=8, seed=0)
    test = make_vec_env("MaskedDiffusion-GSM8K-TopK-v0", n_envs=8, seed=0, env_kwargs={"split": "test"})
    model = PPO("MlpPolicy", env, n_steps=64, batch_size=128, learning_rate=1e-3, gamma=1.0, seed=0)
    print(f"untrained: reward {evaluate_policy(model, test, episodes)[0]:.3f}")
    model.learn(timesteps)
    print(f"trained:   reward {evaluate_policy(model, test, episodes)[0]:.3f}")
    return model


if __name__ == "__main__":
    main()
