"""What the tests of the denoiser's trainers share: small configs, and a learner on a few random completions."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from policies import TINY
from torch import Tensor

import dllm_gym
from dllm_gym import make_task
from dllm_gym.agents.environment import EnvConfig
from dllm_gym.agents.trainers.denoiser.comparison import DenoiserReportConfig
from dllm_gym.agents.trainers.denoiser.espo import ESPOConfig
from dllm_gym.agents.trainers.denoiser.learner import Learner
from dllm_gym.agents.trainers.joint import JointConfig
from dllm_gym.agents.trainers.policy.grpo import GRPOConfig

SUDOKU = EnvConfig(
    id="MaskedDiffusion-Sudoku-v0", denoiser="embedded-early", temperature=1.0, alpha=0.0, num_envs=8, device="cpu"
)
TIMING = ("seconds", "tokens_per_second", "sampling_share", "peak_memory_gb")


def early(dtype: str = "float32"):
    return dllm_gym.load_denoiser("embedded-early", device="cpu", dtype=dtype)


def weights_of(denoiser) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in denoiser.model.named_parameters()}


def completions_of(denoiser, rows: int = 7, length: int = 12) -> tuple[Tensor, list[Tensor]]:
    """Random words, ending at random places; the second ends at once. Prompts of two lengths."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, 100, (rows, length), generator=generator)
    for row, end in enumerate(torch.randint(1, length, (rows,), generator=generator).tolist()):
        tokens[row, 0 if row == 1 else end :] = denoiser.eos_token_id
    tasks = itertools.cycle([make_task("sudoku"), make_task("countdown")])
    texts = [next(tasks)[i].prompt for i in range(rows)]
    return tokens, [torch.tensor(denoiser.tokenizer(text)["input_ids"]) for text in texts]


def make_learner(config, loss, denoiser=None, sgd: float | None = None) -> Learner:
    learner = Learner(denoiser or early(), config, loss, Accelerator(cpu=True))
    if sgd:  # of Adam, the first steps are signs of gradients, whatever their size
        learner.optimizers = [torch.optim.SGD(learner.weights.masters.values(), lr=sgd)]
    return learner


def update(
    learner: Learner, advantage: Tensor, seed: int = 0, rate: float = 0.1, weight: Tensor | None = None
) -> dict[str, float]:
    """On the first completions; they weigh the same unless said otherwise."""
    n = len(advantage)
    weight = torch.full((n,), 1 / n) if weight is None else weight
    tokens, prompts = completions_of(learner.denoiser)
    return learner.update(tokens[:n], prompts[:n], advantage, weight, torch.Generator().manual_seed(seed), rate)


ADVANTAGE = torch.tensor([1.0, -0.5, 0.3, -2.0, 0.7, 0.0, -0.1])


def metrics_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k.split("/")[-1] not in TIMING} for row in rows]


def changeable(denoiser) -> list[Tensor]:
    """The matrices; what the output does not depend on need not change."""
    return [p for name, p in denoiser.model.named_parameters() if p.ndim == 2 and "embed" not in name]


def joint_config(**changes) -> JointConfig:
    own = {"problems": 2, "group": 2, "iterations": 2, "inner_iterations": 2, "warmup": 1}
    return JointConfig(
        objective="espo",
        rounds=2,
        env=replace(SUDOKU, temperature=0.0, alpha=1.0),
        grpo=GRPOConfig(**own, policy=TINY, experts=()),
        denoiser=ESPOConfig(**own),
        report=DenoiserReportConfig(enabled=False),
        threads=1,
        checkpoint_every=2,
        **changes,
    )
