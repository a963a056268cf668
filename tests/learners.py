"""What the tests of the denoiser's trainer share: a learner on a few random completions."""

import itertools

import torch
from accelerate import Accelerator
from torch import Tensor

import dllm_gym
from dllm_gym import make_task
from dllm_gym.agents.trainers.denoiser.learner import Learner


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
