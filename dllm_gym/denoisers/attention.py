"""Attention patterns: which positions a position of a denoiser's input sees.

- "bidirectional": every position sees every other (LLaDA, Dream, A2D).
- "prompt-causal": the prompt sees only itself, and the completion sees everything. The keys and values of a prompt
  never change while its completion is decoded.
- "block-causal": a position sees its own block and all earlier ones; blocks are counted from the first real token
  (BD3-LM, arXiv 2503.09573; SDAR, arXiv 2510.06303). The keys and values of a finished block never change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PATTERNS = ("bidirectional", "prompt-causal", "block-causal")


@dataclass(frozen=True)
class AttentionPattern:
    """An attention pattern, as a denoiser has it."""

    name: str = "bidirectional"
    """One of `PATTERNS`."""
    block_size: int | None = None
    """Number of positions per block of "block-causal"."""

    def __post_init__(self):
        if self.name not in PATTERNS:
            raise ValueError(f"attention_pattern={self.name!r}: must be one of {', '.join(PATTERNS)}.")
        size = self.block_size
        if self.name == "block-causal" and (type(size) is not int or size < 1):
            raise ValueError(f"block_size={size!r}: 'block-causal' needs a number of positions, 1 or more.")

    def sees(self, query: Tensor, key: Tensor, prompt_length: Tensor) -> Tensor:
        """``[B, Q, K]`` bool: whether the query position sees the key position. Padding is never seen.

        Args:
            query, key: ``[B, Q]`` and ``[B, K]`` int64, positions that count from the first real token; padding is -1.
            prompt_length: ``[B]`` int64, real tokens of the prompt.
        """
        query, key = query[:, :, None], key[:, None, :]
        if self.name == "bidirectional":
            return (key >= 0).expand(-1, query.shape[1], -1)
        if self.name == "prompt-causal":
            length = prompt_length[:, None, None]
            return (key >= 0) & ((query >= length) | (key < length))
        size = self.block_size or 1  # never None here
        return (key >= 0) & (key.div(size, rounding_mode="floor") <= query.div(size, rounding_mode="floor"))


BIDIRECTIONAL = AttentionPattern()


def count_positions(attention_mask: Tensor) -> Tensor:
    """``[B, T]`` int64: positions from the first real token on; -1 at padding (``attention_mask`` ``[B, T]`` False)."""
    positions = attention_mask.long().cumsum(dim=1) - 1
    return positions.masked_fill(~attention_mask.bool(), -1)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, 1, Q, K]``, which transformers adds to attention scores: 0 where ``visible`` ``[B, Q, K]``, else very low.

    Not minus infinity: a padded query that sees nothing would become NaN.
    """
    low = torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, low)[:, None]
