"""Stable-Baselines3's PPO, unchanged, learns how many of the most confident tokens to unmask at each step.

`make_sb3_env` decodes all rows in one forward pass; SB3's own `make_vec_env` takes the id too, with one pass per row.
For whole sets of positions see docs/sb3-ppo.md.
"""

from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy

from dllm_gym.envs.sb3 import make_sb3_env


def main(timesteps: int = 2048, episodes: int = 50) -> PPO:
    env = make_sb3_env("MaskedDiffusion-GSM8K-TopK-v0", num_envs=8, seed=0)
    test = make_sb3_env("MaskedDiffusion-GSM8K-TopK-v0", num_envs=8, seed=0, split="test")
    model = PPO("MlpPolicy", env, n_steps=64, batch_size=128, learning_rate=1e-3, gamma=1.0, seed=0)
    print(f"untrained: reward {evaluate_policy(model, test, episodes)[0]:.3f}")
    model.learn(timesteps)
    print(f"trained:   reward {evaluate_policy(model, test, episodes)[0]:.3f}")
    return model


if __name__ == "__main__":
    main()
