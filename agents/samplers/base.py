"""What a sampler is, and how a plain function becomes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from dllm_gym.types import Observation


@runtime_checkable
class Sampler(Protocol):
    """Chooses the positions to unmask, one step after the other.

    Heuristics, learned policies and `as_sampler` of a plain function are samplers. Metropolis-Hastings has the same
    attributes, except ``ignores_tokens``, but makes whole completions: its ``stepwise`` is False, and it has `play` in
    place of `choose`.
    """

    @property
    def signals(self) -> tuple[str, ...]:
        """What it reads of an observation."""
        ...

    @property
    def confidence_k(self) -> int:
        """Number of probabilities per position that it reads."""
        ...

    @property
    def stepwise(self) -> bool:
        """Whether it chooses step by step; if not, it makes whole completions."""
        ...

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers."""
        ...

    @property
    def ignores_tokens(self) -> bool:
        """Whether its choice never depends on the tokens that were drawn for positions that stay masked."""
        ...

    @property
    def seed(self) -> int:
        """What its draws follow from, beside the episode's own seed; 0 if it draws nothing."""
        ...

    def choose(
        self, observation: Observation, explore: bool = False, uniforms: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Choose for B rows.

        Args:
            observation: of B rows.
            explore: choose as in training, where a set may be empty; else at least one eligible position is picked.
            uniforms: ``[B, L + 1]`` float32 in [0, 1), all that it draws, from the rows' own generators, so that what
                a row does is the same beside any others. None: it draws from a generator of its own.

        Returns:
            ``picks`` ``[B, L]`` int64, 0 where not picked and n for the n-th pick, and their log-probability ``[B]``,
            0 if the sampler has none.
        """
        ...

    def settings(self) -> dict[str, Any]:
        """All that its choices follow from, as JSON."""
        ...


@dataclass
class PlainSampler:
    """A function ``Observation -> [B, L] bool`` as a `Sampler`; see `as_sampler`."""

    function: Callable[[Observation], Tensor]
    signals = ()
    confidence_k = 1
    stepwise = True
    draws = False
    seed = 0
    ignores_tokens = False

    def choose(
        self, observation: Observation, explore: bool = False, uniforms: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return without_log_prob(self.function(observation))

    def settings(self) -> dict[str, Any]:
        return {"function": getattr(self.function, "__qualname__", type(self.function).__name__)}


def as_sampler(sampler: Sampler | Callable[[Observation], Tensor]) -> Sampler:
    """A sampler as it is, or a plain function ``Observation -> [B, L] bool`` wrapped into one."""
    return cast(Sampler, sampler) if hasattr(sampler, "choose") else PlainSampler(sampler)


def without_log_prob(positions: Tensor) -> tuple[Tensor, Tensor]:
    """What `Sampler.choose` returns for a set ``[B, L]`` bool whose probability is not known."""
    return positions.long(), torch.zeros(len(positions), device=positions.device)
