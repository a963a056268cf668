"""What an objective is: a config, and a pure function ``loss(batch, config) -> (loss, metrics)``, in a file of its own.

The loss is a weighted sum over completions, so microbatches and processes add up to the same gradient however they are
cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dllm_gym.agents.environment import EnvConfig
from dllm_gym.agents.samplers.spec import make_stepwise
from dllm_gym.agents.trainers.advantages import check_group, group_advantages
from dllm_gym.agents.trainers.configs import at_least_one, check_budget
from dllm_gym.agents.trainers.denoiser.comparison import DenoiserReportConfig
from dllm_gym.decoding.corruption import Corruption, corrupt
from dllm_gym.decoding.trajectory import Trajectories
from dllm_gym.types import Score

OPTIMIZERS = ("adamw", "muon")


@dataclass
class CorruptionConfig:
    """How completions are masked for training, see `dllm_gym.decoding.corruption`."""

    kind: str = "uniform"
    """How tokens are chosen: "uniform", "bernoulli", "coupled", "block" or "full"."""
    maskings: int = 2
    """Number of maskings per completion and inner iteration (n)."""
    block_length: int | None = None
    """Block length for "block"; None takes the environment's."""
    p_mask_prompt: float = 0.0
    """Probability of masking a clean token of the prompt or of an earlier block."""


@dataclass
class LoRAConfig:
    """Low-rank adapters (peft) instead of full fine-tuning."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights instead."""
    alpha: float = 64.0
    """Scale: the adapters' output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout of the adapters' input. With dropout, the ratio of new to old is not 1 at the start."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the modules that receive an adapter."""


@dataclass
class TrainerConfig:
    """What every objective shares."""

    env: EnvConfig = field(
        default_factory=lambda: EnvConfig(
            id="MaskedDiffusion-Sudoku-v0", denoiser="embedded-early", temperature=1.0, alpha=0.0, num_envs=256
        )
    )
    """The environment. With alpha 0, the reward is the verifier's score."""
    sampler: str = "threshold:threshold=0.9"
    """Sampler to decode with: a heuristic with its arguments, or the folder of a trained policy."""
    report: DenoiserReportConfig = field(default_factory=DenoiserReportConfig)
    """The comparison at the end."""
    iterations: int = 60
    """Number of iterations; each samples, then updates."""
    forwards: int | None = None
    """Train for so many rows of denoiser forward passes, in sampling and updates, instead of ``iterations``. A backward
    pass counts as two."""
    problems: int = 32
    """Number of problems per iteration, over all processes."""
    group: int = 8
    """Number of completions per problem (G)."""
    inner_iterations: int = 2
    """Number of updates per batch; each draws its own masks."""
    corruption: CorruptionConfig = field(default_factory=CorruptionConfig)
    """How completions are masked."""
    baseline: str = "group-mean"
    """Baseline of the advantage: "group-mean" or "leave-one-out"."""
    divide_by_std: bool = False
    """Divide advantages by the group's standard deviation."""
    negative_scale: float = 1.0
    """Advantages below 0 are multiplied by this. 0 leaves out the completions that were no better than their group."""
    negative_floor: float = 0.0
    """Probability below which a token of a completion with advantage below 0 is not lowered any more."""
    optimizer: str = "adamw"
    """"adamw", or "muon": Muon for linear layers, with updates scaled to AdamW's size, and AdamW for the rest."""
    learning_rate: float = 1e-4
    """Peak learning rate; linear warm-up, then a cosine to zero. The papers use 3e-6 for 8B denoisers."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's betas."""
    weight_decay: float = 0.0
    """Weight decay of both optimisers."""
    warmup: int = 5
    """Number of warm-up iterations."""
    max_grad_norm: float = 1.0
    """Maximum norm of the gradient; larger gradients are scaled down."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Low-rank adapters, in place of training all weights."""
    shard: bool = False
    """Spread float32 weights, gradients and optimiser states over the processes (FSDP2). Each still holds the whole
    denoiser in its own dtype, to decode with."""
    gradient_checkpointing: bool = False
    """Recompute the denoiser's blocks in the backward pass, which saves memory and takes a third more time."""
    microbatch: int = 64
    """Number of completions per forward and backward pass of a process. It affects memory but not the result, except
    for rounding with bfloat16 weights, in which gradients add up."""
    seed: int = 0
    """Random seed for problems, completions and masks."""
    threads: int = 0
    """Number of torch threads; 0 keeps torch's default."""
    checkpoint_every: int = 20
    """Number of iterations between checkpoints."""
    run_dir: str | None = None
    """Folder of the run; None makes one in runs/."""
    resume: str | None = None
    """Folder of a run to continue."""

    uses_old: ClassVar[bool] = False
    """Whether the loss reads the scores before the update."""
    uses_trajectory: ClassVar[bool] = False
    """Whether `maskings` reads how the completions were written."""

    @property
    def uses_reference(self) -> bool:
        """Whether the loss reads what the reference says."""
        return False

    def check(self) -> None:
        """Refuse what would fail later, before anything is loaded. Raises ValueError."""
        at_least_one(self, "iterations", "problems", "inner_iterations", "microbatch", "checkpoint_every")
        at_least_one(self.report, "problems")
        for sampler in (self.sampler, *self.report.samplers):
            make_stepwise(sampler)
        if not self.report.samplers:
            raise ValueError("report.samplers is empty: give at least one, or --report.no-enabled.")
        check_group(self.group, self.baseline)
        check_budget(self.forwards, self.problems * self.group)
        if not 0 <= self.negative_scale <= 1 or not 0 <= self.negative_floor < 1:
            raise ValueError(
                f"negative_scale={self.negative_scale}, negative_floor={self.negative_floor}: the scale must be in "
                f"[0, 1], the floor, a probability, in [0, 1)."
            )
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r}: must be one of {', '.join(OPTIMIZERS)}.")
        if self.shard and self.optimizer == "muon":
            raise ValueError("shard: Muon needs whole matrices; give --optimizer adamw.")
        if self.env.quantization and not self.lora.rank:
            raise ValueError(
                "env.quantization: weights in 4 bits are not trained; give --lora.rank for adapters on them."
            )
        if self.env.quantization and self.shard:
            raise ValueError("env.quantization: weights in 4 bits cannot be sharded; leave --shard out.")
        if self.lora.rank < 0:
            raise ValueError(f"lora.rank={self.lora.rank}: must be 0 (train all weights) or more.")
        if not self.env.temperature > 0:
            raise ValueError(
                f"env.temperature={self.env.temperature}: must be above 0, so that the completions of a problem differ."
            )

    def advantages(self, reward: Tensor) -> Tensor:
        """``[groups, group]`` rewards, some perhaps not finite -> advantages of the same shape, before
        ``negative_scale``."""
        return group_advantages(reward, self.baseline, self.divide_by_std)

    def learns_from(self, advantage: Tensor) -> Tensor:
        """``[B]`` advantages -> ``[B]`` bool: completions whose loss has a gradient. The others are not forwarded."""
        return advantage > 0 if self.negative_scale == 0 else torch.ones_like(advantage, dtype=torch.bool)

    def maskings(
        self, completion: Tensor, prompt_mask: Tensor, generator: torch.Generator, trajectories: Trajectories | None
    ) -> Corruption:
        """What one update scores.

        Args:
            completion: ``[E, L]`` bool: up to the end token. prompt_mask: ``[E, P]`` bool.
            generator: all that is drawn comes from it.
            trajectories: how the completions were written, if ``uses_trajectory``.
        """
        kind = self.corruption
        return corrupt(
            kind.kind,
            completion,
            prompt_mask,
            kind.maskings,
            generator,
            block_length=kind.block_length or self.env.block_length or completion.shape[1],
            p_mask_prompt=kind.p_mask_prompt,
        )


@dataclass
class Batch:
    """What a loss sees: n maskings of B completions of L tokens."""

    new: Score
    """Scores ``[n, B, L]`` of the denoiser in training, with gradients; zeros where not scored."""
    old: Score | None
    """Scores before the update, under the same maskings; None if the config's ``uses_old`` is False."""
    reference: Score | None
    """Scores of the reference; None if the config's ``uses_reference`` is False."""
    corruption: Corruption
    """The maskings: which tokens are scored, and with which weights."""
    length: Tensor
    """``[B]`` float32: number of tokens in the completion, including its end token."""
    advantage: Tensor
    """``[B]`` float32."""
    weight: Tensor
    """``[B]`` float32: weight of each completion, 1 / (number of completions in the whole step); 0 if it is
    excluded."""


Loss = Callable[[Batch, TrainerConfig], tuple[Tensor, dict[str, Tensor]]]
"""A scalar, the sum over completions of weight times the completion's loss, and metrics summed in the same way."""


def floored(score: Score, advantage: Tensor, probability: float) -> Score:
    """Log-probabilities ``[n, B, L]`` of which those of bad completions are at least ``log(probability)``.

    Below it they are constant, so that nothing lowers them further. Centred logits stay as they are.
    """
    if not probability:
        return score
    held = score.log_prob.clamp(min=math.log(probability))
    return Score(torch.where(advantage[:, None] < 0, held, score.log_prob), score.centred_logit)


def required(score: Score | None) -> Score:
    """Old or reference scores that a loss reads. Raises ValueError if its config did not ask for them."""
    if score is None:
        raise ValueError(
            "the loss reads scores that were not computed: let its config's uses_old or uses_reference be True."
        )
    return score
