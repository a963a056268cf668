"""A sampler of your own is a function: an `Observation` of B rows -> the set to unmask, ``[B, L]`` bool.

This one holds back what is not quite sure beside something surer: neighbours that are written together may contradict
each other.
"""

import gymnasium as gym
import torch
from torch import Tensor

import dllm_gym  # noqa: F401  (registers the ids)
from dllm_gym.agents import evaluate, make_policy
from dllm_gym.agents.evaluation import Evaluation
from dllm_gym.types import Observation


def spaced(observation: Observation) -> Tensor:
    """Confidence above 0.9, or above 0.5 and the highest of the five positions around it."""
    confidence = observation.confidence[..., 0] * observation.eligible
    peak = confidence == torch.nn.functional.max_pool1d(confidence, kernel_size=5, stride=1, padding=2)
    return (confidence > 0.9) | (confidence > 0.5) & peak  # where it is empty, the environment takes the best


def main(id: str = "MaskedDiffusion-GSM8K-v0", problems: int = 200) -> dict[str, Evaluation]:
    env = gym.make_vec(id, num_envs=100, split="test")
    samplers = {f"threshold {t}": make_policy("threshold", threshold=t) for t in (0.5, 0.6, 0.7)}
    held_out = range(5000, 5000 + problems)  # not those on which its three numbers were chosen
    results = {name: evaluate(env, sampler, held_out) for name, sampler in (samplers | {"spaced": spaced}).items()}
    for name, result in results.items():
        mean = result.summary()
        low, high = mean["reward_interval"]
        print(f"{name:13s} accuracy {100 * mean['accuracy']:4.1f} %, NFE {mean['nfe']:4.1f}, ", end="")
        print(f"reward {mean['reward']:.3f} [{low:.3f}, {high:.3f}]")
    return results


if __name__ == "__main__":
    main()
