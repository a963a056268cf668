"""Decoding as pure functions on a canvas: the only place that writes tokens.

One step of decoding is ``observe -> (a policy chooses a set) -> commit``. Blocks are decoded left to right; which
block is active follows from what is still masked, so nothing but the canvas has to be carried along.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_gym.types import Canvas, Observation, Prediction


def blank(prompts: list[Tensor], gen_length: int, mask_token_id: int) -> Canvas:
    """Fully masked canvases of ``gen_length`` tokens after left-padded ``prompts`` (a list of 1-D int64 tensors)."""
    prompt, prompt_mask = pad_left(prompts)
    shape = (len(prompts), gen_length)
    return Canvas(
        prompt=prompt,
        prompt_mask=prompt_mask,
        tokens=prompt.new_full(shape, mask_token_id),
        masked=prompt_mask.new_ones(shape),
        steps=prompt.new_zeros(len(prompts)),
    )


def pad_left(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack 1-D tensors: ``[B, P]`` int64 with zeros on the left, and ``[B, P]`` bool, True at real tokens."""
    lengths = torch.tensor([len(p) for p in prompts])
    prompt = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
    prompt_mask = torch.arange(prompt.shape[1]) >= prompt.shape[1] - lengths[:, None]
    return prompt, prompt_mask.to(prompt.device)


def eligible(masked: Tensor, block_length: int) -> Tensor:
    """``[B, L]`` bool: masked positions of the leftmost block that still has one."""
    block = torch.arange(masked.shape[1], device=masked.device) // block_length
    active = block[masked.to(torch.uint8).argmax(dim=1)]
    return masked & (block == active[:, None])


def observe(canvas: Canvas, prediction: Prediction, block_length: int) -> Observation:
    """What a policy may see of a canvas and the denoiser's prediction for it."""
    return Observation(
        confidence=prediction.confidence,
        entropy=prediction.entropy,
        token=torch.where(canvas.masked, prediction.token, canvas.tokens),
        masked=canvas.masked,
        eligible=eligible(canvas.masked, block_length),
        progress=canvas.steps / canvas.tokens.shape[1],
    )


def commit(
    canvas: Canvas, observation: Observation, unmask: Tensor, eos_token_ids: Tensor | None, eos_token_id: int
) -> Canvas:
    """Write the predicted tokens at the eligible positions of ``unmask``, and count the step.

    Args:
        canvas: B rows; rows in which nothing is eligible stay as they are.
        observation: of that canvas; its ``token`` is what is written.
        unmask: ``[B, L]`` bool; bits outside the eligible positions are ignored.
        eos_token_ids: ``[E]`` int64, tokens that end a completion: where one stands decoded and all before it is
            decoded too, the masked positions after it are filled with ``eos_token_id`` at no cost. None: no filling.
        eos_token_id: what fills the positions after the end.
    """
    written = unmask & observation.eligible
    tokens = torch.where(written, observation.token, canvas.tokens)
    masked = canvas.masked & ~written
    if eos_token_ids is not None:
        decoded_so_far = masked.cumsum(dim=1) == 0
        ended = ((torch.isin(tokens, eos_token_ids) & decoded_so_far).cumsum(dim=1) > 0) & masked
        tokens = tokens.masked_fill(ended, eos_token_id)
        masked = masked & ~ended
    return Canvas(canvas.prompt, canvas.prompt_mask, tokens, masked, canvas.steps + observation.eligible.any(dim=1))


def with_best(unmask: Tensor, observation: Observation, score: Tensor | None = None) -> Tensor:
    """``unmask`` with one position added in rows where no eligible one is chosen: the best by ``score`` ``[B, L]``.

    The score is the confidence unless given. Rows with nothing eligible stay empty.
    """
    score = observation.confidence[..., 0] if score is None else score
    best = score.masked_fill(~observation.eligible, -torch.inf).argmax(dim=1, keepdim=True)
    empty = ~(unmask & observation.eligible).any(dim=1, keepdim=True)
    return unmask | (empty & observation.eligible & torch.zeros_like(unmask).scatter_(1, best, True))


def best_n(score: Tensor, eligible: Tensor, n: int | Tensor) -> Tensor:
    """The n eligible positions with the highest score in each row, all where there are fewer; n: int or ``[B, 1]``."""
    rank = score.masked_fill(~eligible, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank < n) & eligible


def completions(canvas: Canvas, eos_token_ids: Tensor) -> list[Tensor]:
    """The tokens of each row before its first end token: a list of 1-D int64 tensors."""
    ended = torch.isin(canvas.tokens, eos_token_ids).cumsum(dim=1) > 0
    lengths = (~ended).sum(dim=1).tolist()
    return [tokens[:length] for tokens, length in zip(canvas.tokens, lengths, strict=True)]
