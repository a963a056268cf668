"""The types that cross the project's borders. Batch first: B rows, L completion positions, k top probabilities.

Arrays are torch tensors inside the project; the environments turn them into NumPy where a user asks for it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Indices = Sequence[int] | np.ndarray
"""Indices of problems or rows."""


@dataclass(frozen=True)
class Problem:
    """One problem of a task."""

    id: str
    """Unique within task and dataset, for example ``gsm8k/embedded/test/17``."""
    prompt: str
    """What the denoiser is shown, before any chat template."""
    answer: Any
    """What the verifier needs to judge a completion; its form belongs to the task."""
    tokens: Tensor | None = None
    """1-D int64: the prompt as tokens, taken as they are; None: the text is tokenized."""


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one completion."""

    correct: bool
    """Exact correctness: what evaluation reports."""
    score: float
    """In [0, 1], possibly with partial credit: what training may use."""
    answer: str | None
    """The answer that was read from the completion, None where there was none."""
    undecided: str | None = None
    """None, or why no verdict was reached, a few words: "timed out", "not compared", "the sandbox was ended"."""


@dataclass
class Canvas:
    """Completions in the making, beside their prompts."""

    prompt: Tensor
    """``[B, P]`` int64, left-padded with any token."""
    prompt_mask: Tensor
    """``[B, P]`` bool: True for real prompt tokens, False for padding."""
    tokens: Tensor
    """``[B, L]`` int64: the mask token where ``masked``."""
    masked: Tensor
    """``[B, L]`` bool: not yet unmasked."""
    filled: Tensor
    """``[B, L]`` bool: filled in after the end of the text, at no cost; masked again if that end is taken back."""
    probability: Tensor
    """``[B, L]`` float32: untempered probability of each written token at the step that wrote it; 0 elsewhere."""
    steps: Tensor
    """``[B]`` int64: steps taken, which is the number of denoiser forward passes that the row has used (NFE)."""

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def prompt_length(self) -> Tensor:
        """``[B]`` int64: real tokens of the prompt."""
        return self.prompt_mask.sum(dim=1)

    def __getitem__(self, rows) -> Canvas:
        """The canvas of some rows: a slice, an index tensor or a boolean mask."""
        return _take(self, rows)

    def put(self, rows: Tensor, part: Canvas) -> Canvas:
        """A new canvas in which some rows are those of ``part``, whose prompts are as wide."""
        return _put(self, rows, part)


@dataclass
class Outline:
    """What the host knows of a canvas, so that it need not wait for the device; all on the CPU."""

    masked: Tensor
    """``[B, L]`` bool: not yet unmasked."""
    steps: Tensor
    """``[B]`` int64: steps taken."""
    prompt_length: Tensor
    """``[B]`` int64: real tokens of the prompt."""

    def __getitem__(self, rows) -> Outline:
        """The outline of some rows: a slice, or an index tensor on the CPU."""
        return _take(self, rows)

    def put(self, rows: Tensor, part: Outline) -> Outline:
        """A new outline in which some rows are those of ``part``."""
        return _put(self, rows, part)


CONFIDENCES = ("untempered", "tempered")


@dataclass(frozen=True)
class TokenSampling:
    """How tokens are drawn from the denoiser's logits, and what it then says of its confidence."""

    temperature: float = 0.0
    """0 takes the argmax, else tokens are drawn from softmax(logits / temperature)."""
    top_p: float = 1.0
    """Only the most probable tokens are drawn, as few as have this probability together; in (0, 1]."""
    top_k: int | None = None
    """Only this many of the most probable tokens are drawn; None: all."""
    confidence: str = "untempered"
    """Whose probabilities and entropy are shown: "untempered", of softmax(logits); or "tempered", of the distribution
    that tokens are drawn from."""
    end_token_penalty: float = 0.0
    """Subtracted from the logit of the token that fills a canvas after its end, before everything else; 0 or more.
    Other end tokens, such as LLaDA's <|eot_id|>, keep theirs."""
    end_tokens_last: bool = False
    """Whether confidence is 0 where the token to be written ends a completion."""

    def check(self) -> None:
        """Refuse values out of range. Raises ValueError."""
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: must be 0 (argmax) or more, and finite.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0, and at most 1 (all tokens).")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: must be 1 or more, or None (all tokens).")
        if self.confidence not in CONFIDENCES:
            raise ValueError(f"confidence={self.confidence!r}: must be 'untempered' or 'tempered'.")
        if not 0 <= self.end_token_penalty < math.inf:
            raise ValueError(
                f"end_token_penalty={self.end_token_penalty}: must be 0 or more, and finite; 1e9 never writes it."
            )

    @property
    def leaves_out(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.top_p < 1 or self.top_k is not None


@dataclass
class Prediction:
    """What the denoiser says of every completion position of a canvas, given all that is unmasked."""

    token: Tensor
    """``[B, L]`` int64: the token that would be written (argmax, or drawn at a temperature)."""
    probability: Tensor
    """``[B, L]`` float32: untempered probability of ``token``."""
    draw_log_prob: Tensor
    """``[B, L]`` float32: log-probability with which ``token`` was drawn; 0 for the argmax."""
    confidence: Tensor
    """``[B, L, k]`` float32: the k highest probabilities, descending; see `TokenSampling`."""
    entropy: Tensor
    """``[B, L]`` float32: entropy in nats, of the same distribution."""


@dataclass
class Score:
    """Log-probabilities and centred logits of target tokens at scored positions, zeros elsewhere; differentiable."""

    log_prob: Tensor
    """``[B, L]`` float32: log-probability of the token."""
    centred_logit: Tensor
    """``[B, L]`` float32: its logit minus the mean of all tokens' logits (arXiv 2605.29398)."""


@dataclass
class Observation:
    """What a sampler sees before it chooses the positions to unmask."""

    confidence: Tensor
    """``[B, L, k]`` float32: top-k probabilities, 0 where already unmasked."""
    entropy: Tensor
    """``[B, L]`` float32: entropy in nats, 0 where already unmasked."""
    token: Tensor
    """``[B, L]`` int64: the token that would be written; the written token where already unmasked."""
    masked: Tensor
    """``[B, L]`` bool: not yet unmasked."""
    eligible: Tensor
    """``[B, L]`` bool: masked and inside the active block; the positions that may be chosen."""
    progress: Tensor
    """``[B]`` float32: steps taken so far / L."""
    probability: Tensor
    """``[B, L]`` float32: untempered probability of ``token``: now, or at the step that wrote it; 0 where filled in."""

    def __len__(self) -> int:
        return self.masked.shape[0]

    def __getitem__(self, rows) -> Observation:
        """The observation of some rows: a slice, an index tensor or a boolean mask."""
        return _take(self, rows)

    def put(self, rows: Tensor, seen: Observation) -> Observation:
        """A new observation in which some rows are those of ``seen``."""
        return _put(self, rows, seen)

    @staticmethod
    def cat(parts: list[Observation]) -> Observation:
        """Rows of several observations, one after the other."""
        return Observation(*(torch.cat([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Observation)))


@dataclass
class Action:
    """What a sampler does to a canvas in one step."""

    unmask: Tensor
    """``[B, L]`` bool: positions to unmask; those that are not eligible are ignored."""
    remask: Tensor
    """``[B, L]`` bool: written positions to take back, which are then masked again; others are ignored."""

    @staticmethod
    def unmasking(positions: Tensor) -> Action:
        """Unmask ``positions`` ``[B, L]`` bool, and take nothing back."""
        return Action(positions, torch.zeros_like(positions))


@dataclass
class Rollout:
    """Finished episodes, E of them, and their N steps in the order in which they were taken."""

    problems: list[Problem]
    """``[E]``."""
    completions: list[str]
    """``[E]``: the text, "" where the step limit ended the episode."""
    tokens: Tensor
    """``[E, L]`` int64: the final canvas."""
    score: Tensor
    """``[E]`` float32: the verifier's score."""
    correct: Tensor
    """``[E]`` bool: exactly right."""
    undecided: list[str | None]
    """``[E]``: None, or why there was no verdict, which counts as wrong."""
    nfe: Tensor
    """``[E]`` int64: denoiser forwards."""
    reward: Tensor
    """``[E]`` float32."""
    observation: Observation
    """N rows: what the policy saw at each step."""
    picks: Tensor
    """``[N, L]`` int64: what it sampled, see `dllm_gym.agents.samplers.distributions`."""
    log_prob: Tensor
    """``[N]`` float32: log-probability of ``picks``; 0 if the policy reports none."""
    episode: Tensor
    """``[N]`` int64 in 0..E-1: the episode that a step belongs to."""

    def __len__(self) -> int:
        return len(self.problems)

    @staticmethod
    def cat(parts: list[Rollout]) -> Rollout:
        """The episodes of several rollouts with kept steps, one after the other."""
        offsets = torch.tensor([0, *(len(part) for part in parts)]).cumsum(dim=0).tolist()
        tensors = ("tokens", "score", "correct", "nfe", "reward", "picks", "log_prob")
        return Rollout(
            problems=[problem for part in parts for problem in part.problems],
            completions=[text for part in parts for text in part.completions],
            undecided=[reason for part in parts for reason in part.undecided],
            observation=Observation.cat([part.observation for part in parts]),
            episode=torch.cat([part.episode + offset for part, offset in zip(parts, offsets, strict=False)]),
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in tensors},
        )


def _take(batch, rows):
    """The same batch type with only some rows."""
    return dataclasses.replace(batch, **{f.name: getattr(batch, f.name)[rows] for f in dataclasses.fields(batch)})


def _put(batch, rows: Tensor, part):
    """The same batch type with some rows replaced."""
    pairs = ((getattr(batch, f.name), getattr(part, f.name)) for f in dataclasses.fields(batch))
    return type(batch)(*(mine.index_copy(0, rows, theirs) for mine, theirs in pairs))
