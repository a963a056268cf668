"""Decoding as pure functions on a canvas: the only place that writes tokens, or takes them back.

One step of decoding is ``observe -> (a sampler chooses an action) -> commit``. Blocks are decoded left to right. The
active block follows from what is masked, so nothing but the canvas has to be carried along.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dllm_gym.types import Action, Canvas, Observation, Prediction


def blank(prompts: list[Tensor], gen_length: int, mask_token_id: int) -> Canvas:
    """Fully masked canvases of ``gen_length`` tokens after left-padded ``prompts`` (a list of 1-D int64 tensors)."""
    prompt, prompt_mask = pad_left(prompts)
    shape = (len(prompts), gen_length)
    return Canvas(
        prompt=prompt,
        prompt_mask=prompt_mask,
        tokens=prompt.new_full(shape, mask_token_id),
        masked=prompt_mask.new_ones(shape),
        filled=prompt_mask.new_zeros(shape),
        probability=prompt.new_zeros(shape, dtype=torch.float32),
        steps=prompt.new_zeros(len(prompts)),
    )


def pad_left(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack 1-D tensors: ``[B, P]`` int64 with zeros on the left, and ``[B, P]`` bool, True at real tokens."""
    lengths = torch.tensor([len(p) for p in prompts])
    prompt = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
    prompt_mask = torch.arange(prompt.shape[1]) >= prompt.shape[1] - lengths[:, None]
    return prompt, prompt_mask.to(prompt.device)


def blocks(masked: Tensor, block_length: int, offset: Tensor | int = 0) -> tuple[Tensor, Tensor]:
    """The block of each position ``[B, L]`` int64, and the active one of each row ``[B, 1]``.

    Blocks are decoded left to right: the active one is the leftmost that has a masked position.

    Args:
        masked: ``[B, L]`` bool.
        block_length: positions per block, counted from the first position of the completion.
        offset: ``[B, 1]`` int64, so many of the prompt's last tokens belong to the first block.
    """
    block = (torch.arange(masked.shape[1], device=masked.device) + offset).expand(masked.shape) // block_length
    return block, block.gather(1, masked.to(torch.uint8).argmax(dim=1, keepdim=True))


def eligible(masked: Tensor, block_length: int, offset: Tensor | int = 0) -> Tensor:
    """``[B, L]`` bool: masked positions of the active block. Arguments as in `blocks`."""
    block, active = blocks(masked, block_length, offset)
    return masked & (block == active)


def observe(canvas: Canvas, prediction: Prediction, block_length: int, offset: Tensor | int = 0) -> Observation:
    """What a policy may see of a canvas and the denoiser's prediction for it. Blocks as in `blocks`."""
    return Observation(
        confidence=prediction.confidence,
        entropy=prediction.entropy,
        token=torch.where(canvas.masked, prediction.token, canvas.tokens),
        masked=canvas.masked,
        eligible=eligible(canvas.masked, block_length, offset),
        progress=canvas.steps / canvas.tokens.shape[1],
        probability=torch.where(canvas.masked, prediction.probability, canvas.probability),
    )


def before(observation: Observation, prompts: list[Tensor], mask_token_id: int) -> Canvas:
    """The canvases of B steps before they were taken, from what was seen of them and B prompts, 1-D int64 tensors.

    What was filled in, probabilities and steps are not told apart: they are those of a blank canvas.
    """
    canvas = blank(prompts, observation.masked.shape[1], mask_token_id)
    tokens = torch.where(observation.masked, canvas.tokens, observation.token)
    return dataclasses.replace(canvas, tokens=tokens, masked=observation.masked)


def commit(
    canvas: Canvas,
    observation: Observation,
    action: Action,
    *,
    mask_token_id: int,
    eos_token_id: int,
    eos_token_ids: Tensor | None,
) -> Canvas:
    """Write the predicted tokens at the positions to unmask, take others back, and count the step.

    Args:
        canvas: B rows; rows in which nothing is eligible stay as they are.
        observation: of that canvas; its ``token`` is what is written.
        action: positions to unmask and to take back.
        mask_token_id: stands where something is masked.
        eos_token_id: fills the positions after the end.
        eos_token_ids: ``[E]`` int64, tokens that end a completion. Once one of them and everything before it is
            written, the masked positions after it are filled at no cost. None: nothing is filled.
    """
    running = observation.eligible.any(dim=1)
    masked = canvas.masked | canvas.filled  # whether the text has ended is decided anew
    written = action.unmask & observation.eligible
    taken = action.remask & ~masked & running[:, None]
    masked = (masked & ~written) | taken
    tokens = torch.where(written, observation.token, canvas.tokens)
    filled = torch.zeros_like(masked)
    if eos_token_ids is not None:
        complete_so_far = masked.cumsum(dim=1) == 0
        filled = ((torch.isin(tokens, eos_token_ids) & complete_so_far).cumsum(dim=1) > 0) & masked
        masked = masked & ~filled
    return Canvas(
        prompt=canvas.prompt,
        prompt_mask=canvas.prompt_mask,
        tokens=tokens.masked_fill(masked, mask_token_id).masked_fill(filled, eos_token_id),
        masked=masked,
        filled=filled,
        probability=torch.where(written, observation.probability, canvas.probability).masked_fill(taken, 0.0),
        steps=canvas.steps + running,
    )


def log_likelihood(canvas: Canvas) -> Tensor:
    """``[B]`` float32, nats: the log-probability of every token that stands, at the step that wrote it, summed."""
    written = ~canvas.masked & ~canvas.filled
    return torch.where(written, canvas.probability.log(), 0.0).sum(dim=1)


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
