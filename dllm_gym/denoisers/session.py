"""A decoding session: the rows that somebody decodes with a denoiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dllm_gym import decoding
from dllm_gym.denoisers.base import ARGMAX, Denoiser
from dllm_gym.types import Action, Canvas, Indices, Observation, Prediction, TokenSampling

EVERY = slice(None)
"""All rows."""


class DecodingSession:
    """Prompts and canvases of R rows, and all that is kept of them from one forward pass to the next.

    Whoever decodes has a session of its own. The denoiser itself has no state, because threads share it.

    Args:
        denoiser: makes the predictions.
        canvas: the rows as they stand.
        block_length: blocks are decoded left to right; the length of the canvas for full diffusion.
        stop_at_eos: fill what follows the end of a text at no cost.
        cache: what is kept between forward passes; see `Denoiser.caches`. "auto" takes what is exact.

    Attributes:
        canvas: the rows as they stand, never changed in place.
        end_tokens: ``[E]`` int64, the tokens that end a completion.

    Raises:
        ValueError: a cache that the denoiser does not have.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        canvas: Canvas,
        block_length: int,
        *,
        stop_at_eos: bool = True,
        cache: str = "auto",
    ):
        self.denoiser = denoiser
        self.canvas = canvas
        self.block_length = block_length
        self.stop_at_eos = stop_at_eos
        self.end_tokens = torch.tensor(sorted(denoiser.eos_token_ids), device=denoiser.device)
        self._memory = denoiser.make_memory(cache, len(canvas), block_length)
        self._prompts: list[Tensor] | None = None  # read off the canvas when they are needed: it may have many rows

    @classmethod
    def blank(
        cls, denoiser: Denoiser, prompts: Sequence[Tensor], gen_length: int, block_length: int, **settings
    ) -> DecodingSession:
        """A session whose rows are fully masked, after prompts that are 1-D int64 tensors."""
        canvas = decoding.blank(list(prompts), gen_length, denoiser.mask_token_id)
        return cls(denoiser, canvas, block_length, **settings)

    @property
    def positions(self) -> Tensor:
        """``[R]`` int64: token positions forwarded for each row since it began."""
        return self._memory.positions

    def begin(self, rows: Indices, prompts: Sequence[Tensor]) -> None:
        """Put new prompts into some rows, whose completions are then fully masked."""
        if self._prompts is None:
            pairs = zip(self.canvas.prompt, self.canvas.prompt_mask, strict=True)
            self._prompts = [tokens[real] for tokens, real in pairs]
        for row, tokens in zip(rows, prompts, strict=True):
            self._prompts[row] = tokens
        index = torch.as_tensor(rows, device=self.denoiser.device)
        prompt, prompt_mask = decoding.pad_left(self._prompts)
        self.canvas = Canvas(
            prompt=prompt,
            prompt_mask=prompt_mask,
            tokens=self.canvas.tokens.index_fill(0, index, self.denoiser.mask_token_id),
            masked=self.canvas.masked.index_fill(0, index, True),
            filled=self.canvas.filled.index_fill(0, index, False),
            probability=self.canvas.probability.index_fill(0, index, 0.0),
            steps=self.canvas.steps.index_fill(0, index, 0),
        )
        self._memory.forget(index)

    def observe(
        self,
        rows: Tensor | slice = EVERY,
        k: int = 1,
        sampling: TokenSampling = ARGMAX,
        uniforms: Tensor | None = None,
    ) -> tuple[Observation, Prediction]:
        """One forward pass for some rows: what a sampler sees of them, and the prediction behind it.

        A position that is masked but not predicted, because the denoiser or the cache does not look beyond the active
        block, has confidence and entropy 0.

        Args:
            rows: their indices, ascending; all unless given.
            k, sampling, uniforms: as in `Denoiser.predict`.

        Raises:
            FloatingPointError: as `Denoiser.predict`.
        """
        canvas = self.canvas[rows]
        index = torch.arange(len(self.canvas), device=self.denoiser.device)[rows]
        offset = self.denoiser.block_offset(canvas)
        ahead = self._memory.looks_ahead
        prediction = self.denoiser.predict(
            canvas,
            k,
            sampling,
            uniforms,
            at=canvas.masked if ahead else decoding.eligible(canvas.masked, self.block_length, offset),
            encode=lambda canvas, at: self._memory.encode(canvas, index, at),
        )
        return decoding.observe(canvas, prediction, self.block_length, offset), prediction

    def commit(self, observation: Observation, action: Action, rows: Tensor | slice = EVERY) -> None:
        """Do what a sampler chose to the rows that it saw, and count the step."""
        part = decoding.commit(
            self.canvas[rows],
            observation,
            action,
            mask_token_id=self.denoiser.mask_token_id,
            eos_token_id=self.denoiser.eos_token_id,
            eos_token_ids=self.end_tokens if self.stop_at_eos else None,
        )
        self.canvas = part if isinstance(rows, slice) else self.canvas.put(rows, part)

    def clear(self) -> None:
        """Empty all rows: no prompts, and nothing masked."""
        self._prompts = [self.canvas.prompt.new_zeros(0)] * len(self.canvas)
        empty = decoding.blank(self._prompts, self.canvas.tokens.shape[1], self.denoiser.mask_token_id)
        self.canvas = dataclasses.replace(empty, masked=torch.zeros_like(empty.masked))
        self._memory.forget(torch.arange(len(self.canvas), device=self.denoiser.device))
