"""What an objective is: a config, and a pure function ``loss(batch, config) -> (loss, metrics)``, in a file of its own.

The loss is a weighted sum over completions, so microbatches and processes add up to the same gradient however they are
cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dllm_gym.agents.environment import EnvConfig
from dllm_gym.agents.samplers.spec import make_stepwise
from dllm_gym.agents.trainers.advantages import check_group, group_advantages
from dllm_gym.agents.trainers.denoiser.comparison import DenoiserReportConfig
from dllm_gym.agents.trainers.run import at_least_one
from dllm_gym.decoding.corruption import Corruption
from dllm_gym.types import Score

OPTIMIZERS = ("adamw", "muon")


@dataclass
class CorruptionConfig:
    """How completions are masked for training, see `dllm_gym.decoding.corruption`."""

    kind: str = "uniform"
    """"uniform", "bernoulli", "coupled", "block" or "full"."""
    maskings: int = 2
    """Of each completion in each inner iteration (n)."""
    block_length: int | None = None
    """Of "block"; None: the environment's block_length."""
    p_mask_prompt: float = 0.0
    """Probability of masking a clean token of the prompt or of an earlier block."""


@dataclass
class LoRAConfig:
    """Low-rank adapters (peft) instead of full fine-tuning."""

    rank: int = 0
    """0: train all weights."""
    alpha: float = 64.0
    """Scale; the adapters' output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Of the adapters' input; with dropout a ratio of new to old is not 1 at the start."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the modules that get an adapter."""


@dataclass
class TrainerConfig:
    """What every objective shares."""

    env: EnvConfig = field(
        default_factory=lambda: EnvConfig(
            id="MaskedDiffusion-Sudoku-v0", denoiser="embedded-early", temperature=1.0, alpha=0.0, num_envs=256
        )
    )
    """The environment; with alpha 0 the reward is the verifier's score."""
    sampler: str = "threshold:threshold=0.9"
    """What decodes: a heuristic with its arguments, or the folder of a trained policy."""
    report: DenoiserReportConfig = field(default_factory=DenoiserReportConfig)
    """The comparison at the end."""
    iterations: int = 60
    """Iterations: sample, then update."""
    problems: int = 32
    """Problems an iteration, over all processes."""
    group: int = 8
    """Completions a problem (G)."""
    inner_iterations: int = 2
    """Updates on each batch, each with masks of its own."""
    corruption: CorruptionConfig = field(default_factory=CorruptionConfig)
    """How completions are masked."""
    baseline: str = "group-mean"
    """Of the advantage: "group-mean" or "leave-one-out"."""
    divide_by_std: bool = False
    """Divide advantages by the group's standard deviation."""
    optimizer: str = "adamw"
    """"adamw", or "muon": Muon for the weights of linear layers, with steps of AdamW's size, AdamW for the rest."""
    learning_rate: float = 1e-4
    """Linear warm-up, then a cosine to zero. For an 8B denoiser the papers use 3e-6."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Of AdamW."""
    weight_decay: float = 0.0
    """Of both."""
    warmup: int = 5
    """Iterations of warm-up."""
    max_grad_norm: float = 1.0
    """Gradient norm is clipped at it."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Low-rank adapters."""
    gradient_checkpointing: bool = False
    """Recompute the denoiser's blocks in the backward pass: less memory, a third more time."""
    microbatch: int = 64
    """Completions in one forward and backward pass of a process; memory only, not the result (but for rounding, where
    the weights are bfloat16: gradients add up in it)."""
    seed: int = 0
    """Of problems, completions and masks."""
    threads: int = 0
    """Torch threads; 0: torch's choice."""
    checkpoint_every: int = 20
    """Iterations between two checkpoints."""
    run_dir: str | None = None
    """Folder of the run."""
    resume: str | None = None
    """Folder of a run to continue."""

    uses_old: ClassVar[bool] = False
    """Whether the loss reads what the denoiser said before the update."""

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
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r}: must be one of {', '.join(OPTIMIZERS)}.")
        if self.lora.rank < 0:
            raise ValueError(f"lora.rank={self.lora.rank}: must be 0 (train all weights) or more.")
        if not self.env.temperature > 0:
            raise ValueError(
                f"env.temperature={self.env.temperature}: the completions of a problem must differ, give more than 0."
            )

    def advantages(self, reward: Tensor) -> Tensor:
        """``[groups, group]`` rewards, some perhaps not finite -> advantages of the same shape."""
        return group_advantages(reward, self.baseline, self.divide_by_std)

    def learns_from(self, advantage: Tensor) -> Tensor:
        """``[B]`` advantages -> ``[B]`` bool: completions whose loss has a gradient. The others are not forwarded."""
        return torch.ones_like(advantage, dtype=torch.bool)


@dataclass
class Batch:
    """What a loss sees: n maskings of B completions of L tokens."""

    new: Score
    """``[n, B, L]``, with gradients; zeros where not scored."""
    old: Score
    """The same before the update, under the same maskings; that of now, detached, where the objective ignores it."""
    reference: Score
    """The same of the reference, or as ``old``."""
    corruption: Corruption
    """The maskings: which tokens are scored, with what weight."""
    length: Tensor
    """``[B]`` float32: tokens of the completion, its end token included."""
    advantage: Tensor
    """``[B]`` float32."""
    weight: Tensor
    """``[B]`` float32: what a completion counts, 1 / (completions of the whole step); 0 where it is excluded."""


Loss = Callable[[Batch, TrainerConfig], tuple[Tensor, dict[str, Tensor]]]
"""A scalar, the sum over completions of weight times the completion's loss, and metrics summed in the same way."""
