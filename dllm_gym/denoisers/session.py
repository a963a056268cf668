"""A decoding session: the rows that somebody decodes with a denoiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dllm_gym import decoding
from dllm_gym.denoisers.base import ARGMAX, Denoiser
from dllm_gym.transfer import onto, read
from dllm_gym.types import Action, Canvas, Indices, Observation, Outline, Prediction, TokenSampling

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
        outline: what the host knows of them; read from the device once a step, by `commit`.
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
        self.outline = Outline(*map(read, (canvas.masked, canvas.steps, canvas.prompt_length)))
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
        """``[R]`` int64, on the CPU: token positions forwarded for each row since it began."""
        return self._memory.positions

    def begin(self, rows: Indices, prompts: Sequence[Tensor]) -> None:
        """Put new prompts into some rows, whose completions are then fully masked."""
        if self._prompts is None:
            pairs = zip(self.canvas.prompt, self.canvas.prompt_mask, strict=True)
            self._prompts = [tokens[real] for tokens, real in pairs]
        for row, tokens in zip(rows, prompts, strict=True):
            self._prompts[row] = tokens
        known = torch.as_tensor(rows)
        (index,) = onto(self.denoiser.device, known)
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
        self.outline = Outline(
            masked=self.outline.masked.index_fill(0, known, True),
            steps=self.outline.steps.index_fill(0, known, 0),
            prompt_length=torch.tensor([len(tokens) for tokens in self._prompts]),
        )
        self._memory.forget(known)

    def observe(
        self,
        rows: Tensor | slice = EVERY,
        k: int = 1,
        sampling: TokenSampling = ARGMAX,
        uniforms: Tensor | None = None,
        check: bool = True,
    ) -> tuple[Observation, Prediction]:
        """One forward pass for some rows: what a sampler sees of them, and the prediction behind it.

        A position that is masked but not predicted, because the denoiser or the cache does not look beyond the active
        block, has confidence and entropy 0.

        Args:
            rows: their indices on the CPU, ascending; all unless given.
            k, sampling, uniforms: as in `Denoiser.predict`.
            check: wait for the device, and see whether all is finite. If False, `commit` does.

        Raises:
            FloatingPointError: as `Denoiser.predict`.
        """
        canvas, outline = self.canvas[self._on_device(rows)], self.outline[rows]
        at = outline.masked
        if not self._memory.looks_ahead:
            at = decoding.eligible(at, self.block_length, self.denoiser.block_offset(outline.prompt_length))
        index = torch.arange(len(self.canvas))[rows]
        prediction = self.denoiser.predict(
            canvas,
            k,
            sampling,
            uniforms,
            at=at,
            encode=lambda canvas, at: self._memory.encode(canvas, outline, index, at),
            check=check,
        )
        offset = self.denoiser.block_offset(canvas.prompt_length)
        return decoding.observe(canvas, prediction, self.block_length, offset), prediction

    def commit(self, observation: Observation, action: Action, rows: Tensor | slice = EVERY) -> None:
        """Do what a sampler chose to the rows that it saw, and count the step. Waits for the device, once.

        Raises:
            FloatingPointError: what it saw is not finite.
        """
        index = self._on_device(rows)
        canvas, outline = self.canvas[index], self.outline[rows]
        part = decoding.commit(
            canvas,
            observation,
            action,
            mask_token_id=self.denoiser.mask_token_id,
            eos_token_id=self.denoiser.eos_token_id,
            eos_token_ids=self.end_tokens if self.stop_at_eos else None,
        )
        finite = observation.entropy.isfinite().all(dim=1)
        seen = read(torch.cat([part.masked, finite[:, None]], dim=1))
        if not seen[:, -1].all():
            raise FloatingPointError(self.denoiser.not_finite(canvas))
        stepped = Outline(seen[:, :-1], outline.steps + outline.masked.any(dim=1), outline.prompt_length)
        if isinstance(rows, slice) or isinstance(index, slice):
            self.canvas, self.outline = part, stepped
        else:
            self.canvas, self.outline = self.canvas.put(index, part), self.outline.put(rows, stepped)

    def clear(self) -> None:
        """Empty all rows: no prompts, and nothing masked."""
        self._prompts = [self.canvas.prompt.new_zeros(0)] * len(self.canvas)
        empty = decoding.blank(self._prompts, self.canvas.tokens.shape[1], self.denoiser.mask_token_id)
        self.canvas = dataclasses.replace(empty, masked=torch.zeros_like(empty.masked))
        self.outline = Outline(*(torch.zeros_like(field) for field in vars(self.outline).values()))
        self._memory.forget(torch.arange(len(self.canvas)))

    def _on_device(self, rows: Tensor | slice) -> Tensor | slice:
        return rows if isinstance(rows, slice) else onto(self.denoiser.device, rows)[0]
