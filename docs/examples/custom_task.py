"""A task of your own, a denoiser trained for it from scratch, and what decoding it in parallel costs.

Letters are to be sorted, upwards or downwards: both are right, but half of each is not. For problems from a file see
docs/data.md.
"""

import tempfile

import gymnasium as gym
import numpy as np

from dllm_gym import load_denoiser
from dllm_gym.agents import evaluate, make_policy
from dllm_gym.agents.evaluation import Evaluation
from dllm_gym.agents.trainers.sft import SFTConfig, train
from dllm_gym.tasks import TASKS
from dllm_gym.tasks.base import GeneratedTask
from dllm_gym.types import Problem, Verdict


class Sort(GeneratedTask):
    """Five of eight letters. `Problem.answer`: the letters in order."""

    name = "sort"
    gen_length = 5

    def generate(self, rng: np.random.Generator):
        letters = rng.choice(list("abcdefgh"), size=5, replace=False).tolist()
        return " ".join(letters), sorted(letters), letters  # by the last, train and test are told apart

    def demonstrate(self, letters: list[str], rng: np.random.Generator) -> str:
        return " ".join(sorted(letters, reverse=bool(rng.integers(2))))

    def verify(self, problem: Problem, completion: str) -> Verdict:
        letters = completion.split()
        correct = letters in (problem.answer, problem.answer[::-1])
        return Verdict(correct, float(correct), completion)


def main(steps: int = 200, problems: int = 200) -> dict[str, Evaluation]:
    TASKS["sort"] = Sort  # the trainers know tasks by name
    size = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "warmup": 10, "ema": 0.98, "bf16": False}
    with tempfile.TemporaryDirectory() as folder:
        run = train(SFTConfig(batch={"sort": 64}, steps=steps, **size, run_dir=f"{folder}/sort"))
        denoiser = load_denoiser(run / "denoiser")
    # Any id will do: its own task gives way.
    env = gym.make_vec("MaskedDiffusion-Countdown-v0", num_envs=64, task=Sort(split="test"), denoiser=denoiser)
    samplers = {
        "one at a time": make_policy("confidence", k=1),
        "threshold 0.9": make_policy("threshold", threshold=0.9),
        "all at once": make_policy("confidence", k=5),
    }
    results = {name: evaluate(env, sampler, range(problems)) for name, sampler in samplers.items()}
    for name, result in results.items():
        print(f"{name}: {100 * result.correct.mean():.0f} % right in {result.nfe.mean():.1f} steps")
        print(f"    {result.problem_ids[0]}: {result.completions[0]}")
    return results


if __name__ == "__main__":
    main()
