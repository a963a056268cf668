"""Corruption: which tokens of a finished completion are masked, and which of those are scored with what weight.

A completion is what stands up to and including the first end token; what follows is always masked in the input and
never scored, so that it tells nothing about the length. Each process names the likelihood that
``mean over maskings of sum(weight * log p)`` estimates without bias:

- ``uniform`` (LLaDA, arXiv 2502.09992, in its low-variance form): l ~ U{1..n} of n tokens, weight n / l. The any-order
  ELBO. The l of a completion's maskings are stratified.
- ``bernoulli`` (LLaDA): t ~ U(0, 1), every token with probability t, weight 1 / t. The any-order ELBO.
- ``coupled`` (arXiv 2506.20639): a mask and its complement, so that a pair scores every token once. l ~ U{0..n}, and a
  token that is scored among s masked ones weighs (n + 1) / s. The any-order ELBO (with the published weight n / s it
  would not be).
- ``block`` (SPG, arXiv 2510.09541): one block picked at random, earlier ones clean, later ones masked, l ~ U{1..size}
  inside, weight blocks * size / l. The ELBO of decoding blocks from left to right.
- ``full`` (d1, arXiv 2504.12216): everything masked, weight 1. The mean-field surrogate, biased for either.

Masking clean tokens as well (``p_mask_prompt``, of the prompt and of earlier blocks) is a regulariser; with it no
estimate is unbiased.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_gym.types import Canvas


@dataclass
class Corruption:
    """n maskings of B completions of L positions, after prompts of P tokens."""

    masked: Tensor
    """``[n, B, L]`` bool: masked in the input."""
    scored: Tensor
    """``[n, B, L]`` bool: masked, part of the completion, and scored."""
    weight: Tensor
    """``[n, B, L]`` float32: weight of a scored token's log-probability, 0 elsewhere."""
    prompt_masked: Tensor
    """``[n, B, P]`` bool."""

    def __getitem__(self, rows) -> Corruption:
        """The maskings of some completions."""
        return Corruption(self.masked[:, rows], self.scored[:, rows], self.weight[:, rows], self.prompt_masked[:, rows])


KINDS = ("uniform", "bernoulli", "coupled", "block", "full")


def completion_mask(tokens: Tensor, eos_token_ids: Tensor) -> Tensor:
    """``[B, L]`` bool: positions up to and including the first end token."""
    ends = torch.isin(tokens, eos_token_ids)
    return (ends.cumsum(dim=1) - ends.long()) == 0


def corrupt(
    kind: str,
    completion: Tensor,
    prompt_mask: Tensor,
    maskings: int,
    generator: torch.Generator,
    *,
    block_length: int | None = None,
    p_mask_prompt: float = 0.0,
) -> Corruption:
    """Draw maskings.

    Args:
        kind: one of `KINDS`.
        completion: ``[B, L]`` bool, see `completion_mask`.
        prompt_mask: ``[B, P]`` bool, False at padding.
        maskings: n, even for "coupled".
        generator: all that is drawn comes from it.
        block_length: of "block", a divisor of L.
        p_mask_prompt: probability of masking a clean token of the prompt or of an earlier block.

    Raises:
        ValueError: an unknown kind, an argument that does not fit it, or a completion without a token to score.
    """
    check_corruption(kind, maskings, completion.shape[1], block_length, p_mask_prompt)
    if (empty := ~completion.any(dim=1)).any():
        raise ValueError(f"corruption={kind!r}: completions {empty.nonzero()[:, 0].tolist()} have no token to score.")
    shape, device = (maskings, *completion.shape), completion.device

    def uniforms(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, device=device)

    inside = completion.expand(shape)  # what may be masked and scored
    size = inside.sum(dim=-1, keepdim=True)
    blocks: int | Tensor = 1
    clean = torch.zeros(shape, dtype=torch.bool, device=device)
    if kind == "block":
        assert block_length is not None  # checked above
        block = torch.arange(shape[-1], device=device) // block_length
        counts = torch.where(completion, block, 0).amax(dim=1)[None, :, None] + 1  # up to the block with the end
        picked = (uniforms(*shape[:2], 1) * counts).long()
        inside, clean, blocks = inside & (block == picked), block < picked, counts
        size = inside.sum(dim=-1, keepdim=True)

    if kind == "full":
        scored, weight = inside, inside.float()
    elif kind == "bernoulli":
        share = 1 - uniforms(*shape[:2], 1)  # in (0, 1]: it is divided by
        scored = (uniforms(*shape) < share) & inside
        weight = scored / share
    elif kind == "coupled":
        half = inside[: maskings // 2]
        chosen = _some_of(half, (uniforms(*half.shape[:2], 1) * (size[: maskings // 2] + 1)).long(), uniforms)
        scored = torch.cat([chosen, half & ~chosen])
        weight = scored * (size + 1) / scored.sum(dim=-1, keepdim=True).clamp(min=1)
    else:
        strata = uniforms(*shape[:2]).argsort(dim=0)[..., None]
        count = ((strata + uniforms(*shape[:2], 1)) / maskings * size).long().clamp(max=size - 1) + 1
        scored = _some_of(inside, count, uniforms)
        weight = scored * (blocks * size / count)

    masked = ~clean & ~(inside & ~scored)
    prompt_masked = torch.zeros((maskings, *prompt_mask.shape), dtype=torch.bool, device=device)
    if p_mask_prompt:
        masked = masked | (uniforms(*shape) < p_mask_prompt) & clean
        prompt_masked = (uniforms(*prompt_masked.shape) < p_mask_prompt) & prompt_mask
    return Corruption(masked, scored, weight, prompt_masked)


def check_corruption(
    kind: str, maskings: int, length: int, block_length: int | None = None, p_mask_prompt: float = 0.0
) -> None:
    """Refuse what `corrupt` cannot do, before anything is sampled. Raises ValueError."""
    if kind not in KINDS:
        raise ValueError(f"corruption={kind!r}: must be one of {', '.join(KINDS)}.")
    if maskings < 1 or (kind == "coupled" and maskings % 2):
        raise ValueError(f"maskings={maskings}: must be 1 or more, and even for 'coupled' (a mask and its complement).")
    if kind == "block" and (not block_length or block_length < 1 or length % block_length):
        raise ValueError(f"corruption='block' with block_length={block_length}: must divide gen_length={length}.")
    if not 0 <= p_mask_prompt < 1:
        raise ValueError(f"p_mask_prompt={p_mask_prompt}: must be in [0, 1); at 1, nothing is left to predict from.")


def corrupted_canvas(
    prompt: Tensor, prompt_mask: Tensor, tokens: Tensor, corruption: Corruption, mask_token_id: int
) -> Canvas:
    """The n x B masked canvases as rows, masking by masking: what `Denoiser.score` takes."""
    n = len(corruption.masked)
    masked = corruption.masked.flatten(0, 1)
    prompt = prompt.expand(n, *prompt.shape).masked_fill(corruption.prompt_masked, mask_token_id)
    return Canvas(
        prompt=prompt.flatten(0, 1),
        prompt_mask=prompt_mask.repeat(n, 1),
        tokens=tokens.repeat(n, 1).masked_fill(masked, mask_token_id),
        masked=masked,
        filled=torch.zeros_like(masked),
        probability=torch.zeros(masked.shape, device=masked.device),
        steps=masked.new_zeros(len(masked), dtype=torch.int64),
    )


def _some_of(inside: Tensor, count: Tensor, uniforms) -> Tensor:
    """``count`` ``[n, B, 1]`` of the positions ``inside`` ``[n, B, L]``, every subset as likely as another."""
    ranks = uniforms(*inside.shape).masked_fill(~inside, 2.0).argsort(dim=-1).argsort(dim=-1)
    return (ranks < count) & inside
