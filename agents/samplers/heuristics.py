"""Samplers that learn nothing.

Each unmasks at least one eligible position in every row that has one; thresholds are decided per row.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from dllm_gym.agents.samplers.base import without_log_prob
from dllm_gym.decoding import best_n, with_best
from dllm_gym.names import find, hint
from dllm_gym.types import Observation


class Heuristic(ABC):
    """What all of them share; a subclass is a dataclass and gives ``__call__``. See `Sampler` for the attributes."""

    signals: tuple[str, ...] = ("confidence",)
    confidence_k = 1
    stepwise = True
    draws = False
    seed = 0
    ignores_tokens = True

    @abstractmethod
    def __call__(self, observation: Observation) -> Tensor:
        """The set to unmask, ``[B, L]`` bool."""

    def choose(
        self, observation: Observation, explore: bool = False, uniforms: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return without_log_prob(self(observation))

    def settings(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(cast(Any, self)) if field.init}


@dataclass
class Drawing(Heuristic):
    """Heuristics that draw; a subclass gives `pick`."""

    k: int = 1
    seed: int = 0
    draws = True
    generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self):
        _positive(self, "k")
        self.generator = torch.Generator().manual_seed(self.seed)

    @abstractmethod
    def pick(self, observation: Observation, uniforms: Tensor) -> Tensor:
        """The set to unmask, ``[B, L]`` bool, from uniform numbers ``[B, L]``."""

    def __call__(self, observation: Observation) -> Tensor:
        uniforms = torch.rand(observation.masked.shape, generator=self.generator)
        return self.pick(observation, uniforms.to(observation.masked.device))

    def choose(
        self, observation: Observation, explore: bool = False, uniforms: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return without_log_prob(self(observation) if uniforms is None else self.pick(observation, uniforms[:, :-1]))


@dataclass
class Random(Drawing):
    """k random positions per step."""

    signals = ()

    def pick(self, observation: Observation, uniforms: Tensor) -> Tensor:
        return best_n(uniforms, observation.eligible, self.k)


@dataclass
class Confidence(Heuristic):
    """The k most confident a step: LLaDA's low-confidence remasking (arXiv 2502.09992); k = L / steps."""

    k: int = 1

    def __post_init__(self):
        _positive(self, "k")

    def __call__(self, observation: Observation) -> Tensor:
        return best_n(observation.confidence[..., 0], observation.eligible, self.k)


@dataclass
class Margin(Heuristic):
    """The k positions with the largest difference between the two best probabilities. Needs confidence_k >= 2."""

    k: int = 1
    confidence_k = 2

    def __post_init__(self):
        _positive(self, "k")

    def __call__(self, observation: Observation) -> Tensor:
        if observation.confidence.shape[-1] < 2:
            raise ValueError("the margin sampler needs two probabilities per position: confidence_k=2 or more.")
        return best_n(observation.confidence[..., 0] - observation.confidence[..., 1], observation.eligible, self.k)


@dataclass
class Entropy(Heuristic):
    """The k positions with the lowest entropy."""

    k: int = 1
    signals = ("entropy",)

    def __post_init__(self):
        _positive(self, "k")

    def __call__(self, observation: Observation) -> Tensor:
        return best_n(-observation.entropy, observation.eligible, self.k)


@dataclass
class LeftToRight(Heuristic):
    """The k leftmost positions."""

    k: int = 1
    signals = ()

    def __post_init__(self):
        _positive(self, "k")

    def __call__(self, observation: Observation) -> Tensor:
        position = torch.arange(observation.masked.shape[1], device=observation.masked.device, dtype=torch.float32)
        return best_n(-position.expand(observation.masked.shape), observation.eligible, self.k)


@dataclass
class Threshold(Heuristic):
    """All with confidence above the threshold, at least the best one in each row (Fast-dLLM, arXiv 2505.22618)."""

    threshold: float = 0.9

    def __post_init__(self):
        if math.isnan(self.threshold):
            raise ValueError("threshold=nan: must be a number; from 1 on, one token per step.")

    def __call__(self, observation: Observation) -> Tensor:
        confident = (observation.confidence[..., 0] > self.threshold) & observation.eligible
        return with_best(confident, observation)


@dataclass
class Factor(Heuristic):
    """The n most confident, n the largest with ``(n + 1) * (1 - c_(n)) < factor`` (Fast-dLLM, arXiv 2505.22618)."""

    factor: float = 1.0

    def __post_init__(self):
        _positive(self, "factor")

    def __call__(self, observation: Observation) -> Tensor:
        confidence = observation.confidence[..., 0].masked_fill(~observation.eligible, -torch.inf)
        ordered = confidence.sort(dim=1, descending=True).values
        n = torch.arange(1, ordered.shape[1] + 1, device=ordered.device)
        holds = (n + 1) * (1 - ordered) < self.factor
        largest = (holds * n).amax(dim=1, keepdim=True).clamp(min=1)
        return best_n(observation.confidence[..., 0], observation.eligible, largest)


@dataclass
class EntropyBounded(Heuristic):
    """In order of rising entropy, the largest set with ``sum H - max H <= gamma`` (EB-Sampler, arXiv 2505.24857)."""

    gamma: float = 0.1
    signals = ("entropy",)

    def __post_init__(self):
        if not self.gamma >= 0:
            raise ValueError(f"gamma={self.gamma}: must be 0 or more.")

    def __call__(self, observation: Observation) -> Tensor:
        ordered = observation.entropy.masked_fill(~observation.eligible, torch.inf).sort(dim=1).values
        before = torch.cat([torch.zeros_like(ordered[:, :1]), ordered[:, :-1].cumsum(dim=1)], dim=1)
        largest = (before <= self.gamma).sum(dim=1, keepdim=True)
        return best_n(-observation.entropy, observation.eligible, largest)


@dataclass
class TemperedConfidence(Drawing):
    """k positions drawn by softmax of log-confidence / temperature, so that samples differ (arXiv 2604.09921)."""

    temperature: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        _positive(self, "temperature")

    def pick(self, observation: Observation, uniforms: Tensor) -> Tensor:
        gumbel = -torch.log(-torch.log1p(-uniforms.clamp(max=1 - 1e-7)) + 1e-30)
        return best_n(
            observation.confidence[..., 0].clamp(min=1e-30).log() / self.temperature + gumbel,
            observation.eligible,
            self.k,
        )


HEURISTICS: dict[str, type[Heuristic]] = {
    "random": Random,
    "confidence": Confidence,
    "margin": Margin,
    "entropy": Entropy,
    "left-to-right": LeftToRight,
    "threshold": Threshold,
    "factor": Factor,
    "entropy-bounded": EntropyBounded,
    "tempered-confidence": TemperedConfidence,
}


def make_policy(name: str, **arguments) -> Heuristic:
    """A heuristic sampler by name, in any case, for example ``make_policy("threshold", threshold=0.9)``.

    Returns:
        A callable from an `Observation` of B rows to the set to unmask, ``[B, L]`` bool.

    Raises:
        ValueError: an unknown name, an argument that the sampler does not take, or a value out of range.
    """
    name = find(name, HEURISTICS, "policy")
    known = [p for p in inspect.signature(HEURISTICS[name]).parameters]
    unknown = sorted(arguments.keys() - set(known))
    if unknown:
        takes = f"it takes {', '.join(known)}.{hint(unknown[0], known)}"
        raise ValueError(f"policy={name!r} does not take {', '.join(unknown)}; {takes}")
    return HEURISTICS[name](**arguments)


def _positive(policy, *names: str) -> None:
    for name in names:
        if not 0 < getattr(policy, name) < math.inf:
            raise ValueError(f"{name}={getattr(policy, name)}: must be more than 0, and finite.")
